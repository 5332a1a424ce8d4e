"""Who is there: a secret that all labellers share, and signed cookies that say a name.

A cookie is name, time and an HMAC over both with a key derived from the secret: no session is kept,
so they outlive the server, and a new secret ends them all.
"""

import base64
import hashlib
import hmac
import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

from rayrlhf.config import RecipeError

VARIABLE = "RAYRLHF_LABEL_SECRET"
FILE = "secret"
MIN_SECRET = 12
"""Characters: fewer could be guessed."""
COOKIE = "rayrlhf_label"
COOKIE_S = 30 * 24 * 3600
"""Seconds after which people sign in again."""


def load_secret(folder: Path, variable: str = VARIABLE, file_name: str = FILE) -> tuple[str, bool]:
    """Return the secret, and whether it was made just now.

    It is that of the environment variable, else the one in `folder`, which only its owner can
    read. Raises RecipeError for one that is too short.
    """
    given = os.environ.get(variable)
    if given is not None:
        given = given.strip()  # a secret that a file holds often ends with a newline
        if len(given) < MIN_SECRET:
            raise RecipeError(
                f"{variable} has {len(given)} characters, but fewer than {MIN_SECRET} can be "
                "guessed: set a longer one, or unset it to have one made"
            )
        return given, False
    file = folder / file_name
    if file.is_file():
        return file.read_text(encoding="utf-8").strip(), False
    made = secrets.token_urlsafe(18)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(f"{made}\n")
        stream.flush()
        os.fsync(stream.fileno())
    return made, True


class Sessions:
    """Signs people in, and knows them again."""

    def __init__(self, secret: str, labellers: Sequence[str]) -> None:
        """`labellers` are the names with which people may sign in, in any case."""
        self._secret = secret.encode()
        self._key = hashlib.sha256(b"rayrlhf label cookie\0" + self._secret).digest()
        self._names = {name.casefold(): name for name in labellers}

    def sign_in(self, name: str, secret: str) -> str | None:
        """Return the labeller's name as the recipe writes it; None for a wrong name or secret."""
        # Both are looked at in any case, so that the time says nothing of either.
        right = hmac.compare_digest(secret.strip().encode(), self._secret)
        known = self._names.get(" ".join(name.split()).casefold())
        return known if right else None

    def issue(self, name: str) -> str:
        """Return the cookie of a person."""
        text = f"{base64.urlsafe_b64encode(name.encode()).decode()}.{int(time.time())}"
        return f"{text}.{self._signature(text)}"

    def read(self, cookie: str | None) -> str | None:
        """Return the name that a cookie says; None when it is forged, too old or of nobody now."""
        text, _, signature = (cookie or "").rpartition(".")
        if not hmac.compare_digest(signature.encode(), self._signature(text).encode()):
            return None
        name, _, issued = text.partition(".")
        if time.time() - int(issued) > COOKIE_S:
            return None
        return self._names.get(base64.urlsafe_b64decode(name).decode().casefold())

    def _signature(self, text: str) -> str:
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()
