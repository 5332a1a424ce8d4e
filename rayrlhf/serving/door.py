"""What every request of the endpoint passes: who asks, how much, how many at a time, how long.

An ASGI middleware around the application. Only /healthz is open to everybody. Each refusal is in
the form of OpenAI's errors, and is given before the body is read where that is possible.
"""

import asyncio
import hmac
import time

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayrlhf.config import ServeLimits
from rayrlhf.serving.metering import Meters
from rayrlhf.serving.refusals import Refusal

OPEN = ("/healthz",)
CHANGES = "/admin/"
"""Requests below it wait for answers that are being made, and count as none."""
CHANGE_S = 600.0
"""Seconds that one of those may take besides that wait."""
HEADERS = ((b"cache-control", b"no-store"), (b"x-content-type-options", b"nosniff"))


class Door:
    """Lets a request in, or answers it."""

    def __init__(self, app: ASGIApp, token: str, limits: ServeLimits, meters: Meters) -> None:
        self._app, self._limits, self._meters = app, limits, meters
        self._wanted = f"Bearer {token}".encode()
        self._ongoing = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, begun = time.monotonic(), _Started(send)
        try:
            self._look(scope)
            await self._let_in(scope, receive, begun)
        except Refusal as refusal:
            await refusal.response()(scope, receive, begun)
        except Exception:
            begun.status = begun.status or 500
            raise
        finally:
            self._meters.count(scope["path"], begun.status, time.monotonic() - started)

    def _look(self, scope: Scope) -> None:
        """Raise Refusal for what can be told from the head of a request."""
        headers = dict(scope["headers"])
        given = headers.get(b"authorization", b"")
        if scope["path"] not in OPEN and not hmac.compare_digest(given, self._wanted):
            raise Refusal(
                401, "the token is missing or wrong: send it as `Authorization: Bearer TOKEN`"
            )
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._limits.max_body_bytes:
            raise Refusal(413, self._too_long)

    async def _let_in(self, scope: Scope, receive: Receive, send: "_Started") -> None:
        is_change = scope["path"].startswith(CHANGES)
        counts = scope["method"] == "POST" and not is_change
        if counts and self._ongoing >= self._limits.max_concurrent:
            raise Refusal(
                429,
                f"{self._limits.max_concurrent} requests are being answered, which is the limit "
                "of this server: try again in a moment",
            )
        seconds = self._limits.timeout_s + (CHANGE_S if is_change else 0)
        self._ongoing += counts
        self._meters.ongoing.set(self._ongoing)
        try:
            async with asyncio.timeout(seconds):
                await self._app(scope, self._counted(receive), send)
        except TimeoutError:
            late = Refusal(504, f"the answer was not done after {seconds:g} s, and is given up")
            if not send.status:
                raise late from None
            await send.end_stream(late)
        finally:
            self._ongoing -= counts
            self._meters.ongoing.set(self._ongoing)

    def _counted(self, receive: Receive) -> Receive:
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limits.max_body_bytes:
                # Of all exceptions, FastAPI passes only this one on while it reads a body.
                raise HTTPException(413, self._too_long)
            return message

        return counted

    @property
    def _too_long(self) -> str:
        return f"the request is longer than {self._limits.max_body_bytes} bytes: shorten it"


class _Started:
    """Sends an answer, and knows how far it is."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 0
        self._is_whole = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", []), *HEADERS]
        elif message["type"] == "http.response.body":
            self._is_whole = not message.get("more_body", False)
        await self._send(message)

    async def end_stream(self, refusal: Refusal) -> None:
        """Say in a stream of events that it breaks off, and end it."""
        if not self._is_whole:
            event = b"data: " + refusal.body + b"\n\n"
            await self({"type": "http.response.body", "body": event, "more_body": False})
