"""A client of HTTP endpoints that take JSON in a POST and answer JSON.

A request is repeated after an error that may pass (408, 429, 5xx, a timeout, a connection that
fails), with pauses that double, and the whole of each attempt has `timeout_s`. Proxies are those of
the environment; redirects are not followed, because they would turn a POST into a GET and hand the
headers on.
"""

import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from rayrlhf.config import RecipeError, backoff_s

PASSING = (408, 429)
"""Errors below 500 that may pass."""
REFUSED = (400, 413, 422)
"""Errors that speak of what was sent: another body may be answered."""
LONGEST_ANSWER = 1 << 24
"""Bytes of an answer that are read at most."""


class Refused(RecipeError):
    """An endpoint does not take this body."""


class EndpointDown(RuntimeError):
    """An endpoint did not answer, or with an error that may pass, however often it was asked."""


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """Makes a redirect an error."""

    def redirect_request(self, *_: Any) -> None:
        """Return no request to follow."""


class Endpoint:
    """Asks one URL; several threads may ask at the same time."""

    def __init__(  # noqa: PLR0913 (what a recipe says of an endpoint)
        self,
        key: str,
        url: str,
        *,
        headers: Mapping[str, str],
        timeout_s: float,
        retries: int,
        sign_in: str,
    ) -> None:
        """`key` names it in errors, `sign_in` is the advice to one that is refused."""
        self.key, self.timeout_s, self.retries = key, timeout_s, retries
        self._url, self._sign_in = url, sign_in
        self._headers = {
            "Content-Type": "application/json",
            "Accept": "application/json",
            **headers,
        }
        self._open = urllib.request.build_opener(NoRedirects).open
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Let requests that wait to be repeated end with EndpointDown: nobody needs them."""
        self._stopped.set()

    def ask(self, body: Mapping[str, Any]) -> Any:
        """Return the JSON that `body` is answered with, asked for again where that may help.

        Raises RecipeError for an error that stays and an answer that is not JSON, Refused among
        these where another body may be answered, EndpointDown for errors that did not pass.
        """
        answer = self._ask(json.dumps(body).encode())
        try:
            return json.loads(answer)
        except ValueError:
            raise RecipeError(f"{self.key}: its answer is not JSON{quoted(answer)}") from None

    def _ask(self, body: bytes) -> bytes:
        attempts = 1 + self.retries
        for attempt in range(attempts):
            try:
                return self._post(body)
            except urllib.error.HTTPError as error:
                said = f"it answered {error.code} {error.reason}{quoted(_head_of(error))}"
                if error.code < 500 and error.code not in PASSING:
                    kind = Refused if error.code in REFUSED else RecipeError
                    raise kind(f"{self.key}: {said}{self._advice(error)}") from None
            except (OSError, http.client.HTTPException) as error:
                said = _reason(error, self.timeout_s)
            if attempt + 1 == attempts:
                break
            if self._stopped.wait(backoff_s(attempt)):
                raise EndpointDown(f"{self.key}: {said}, and other requests failed for good")
        raise EndpointDown(f"{self.key}: {said} (asked {attempts} times)")

    def _post(self, body: bytes) -> bytes:
        """Return the body of the answer; raises OSError, HTTPException, or HTTPError."""
        ends = time.monotonic() + self.timeout_s
        request = urllib.request.Request(self._url, body, self._headers, method="POST")
        answer = bytearray()
        with self._open(request, timeout=self.timeout_s) as response:
            # The time of a socket is that of one read: an answer that drips is not late there.
            while part := response.read1(1 << 16):
                answer += part
                if time.monotonic() > ends:
                    raise TimeoutError
                if len(answer) > LONGEST_ANSWER:
                    raise RecipeError(
                        f"{self.key}: its answer is longer than {LONGEST_ANSWER >> 20} MiB: let it "
                        "answer what it is asked for only"
                    )
        return bytes(answer)

    def _advice(self, error: urllib.error.HTTPError) -> str:
        if 300 <= error.code < 400:
            return f": set url to where it is, {error.headers.get('Location')}"
        if error.code in (401, 403):
            return f": {self._sign_in}"
        return ": correct url, or what the endpoint makes of a request"


def authorization(key: str, key_env: str | None) -> dict[str, str]:
    """Return the header with the API key in the variable `key_env`; {} for None.

    Raises RecipeError, opened by `key`, where it has none; the error never shows a value.
    """
    if key_env is None:
        return {}
    value = os.environ.get(key_env, "").strip()
    if not value or not (value.isascii() and value.isprintable()):
        problem = "holds no key" if value else "is not set"
        raise RecipeError(
            f"{key}: the variable key_env={key_env} {problem}: set it to the key of the API, or "
            "take key_env out"
        )
    return {"Authorization": f"Bearer {value}"}


def quoted(body: bytes) -> str:
    """Return how a text from outside begins, in quotes and after a colon; nothing for nothing."""
    text = " ".join(body[:200].decode("utf-8", "replace").split())
    return f": {text!r}" if text else ""


def _reason(error: Exception, timeout_s: float) -> str:
    """Return what went wrong with a connection."""
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return f"it did not answer within timeout_s={timeout_s:g} s"
    return f"there is no answer ({type(cause).__name__}: {cause})"


def _head_of(error: urllib.error.HTTPError) -> bytes:
    """Return how the body of an error begins, as far as there is one."""
    try:
        return error.read(300)
    except (OSError, http.client.HTTPException):
        return b""
