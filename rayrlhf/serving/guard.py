"""What every request passes: its size, where it comes from, the headers of every answer.

Errors are JSON of one form, {"error": {"code": ..., "message": ...}}, whoever raises them.
"""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DBAPIError
from starlette.exceptions import HTTPException

from rayrlhf.serving.arena import Silent
from rayrlhf.serving.store import Conflict, Unknown

MAX_BYTES = 128 * 1024
"""Of a request's body: several times the longest prompt and note."""
CODES = {
    400: "bad_request",
    401: "signed_out",
    403: "forbidden",
    404: "unknown",
    405: "method",
    409: "conflict",
    413: "too_large",
    415: "media_type",
    422: "invalid",
    424: "silent",
    503: "unavailable",
}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Guard:
    """ASGI middleware: refuse long bodies and requests of other sites, add headers."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BYTES:
                # Of all exceptions, FastAPI passes only this one on while it reads a body.
                raise HTTPException(413, _TOO_LARGE)
            return message

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = dict(HEADERS)
                cached = not scope["path"].startswith("/api/")
                added["cache-control"] = "no-cache" if cached else "no-store"
                message["headers"] = [
                    *message.get("headers", []),
                    *((name.encode(), value.encode()) for name, value in added.items()),
                ]
            await send(message)

        refusal = None
        if int(headers.get(b"content-length", "0") or 0) > MAX_BYTES:
            refusal = problem(413, _TOO_LARGE)
        elif scope["method"] not in ("GET", "HEAD") and not _same_site(headers):
            refusal = problem(403, _other_site(headers))
        if refusal is not None:
            await refusal(scope, receive, with_headers)
        else:
            await self._app(scope, counted, with_headers)


_TOO_LARGE = f"the request is longer than {MAX_BYTES // 1024} KiB: shorten the text"


def _same_site(headers: dict[bytes, str]) -> bool:
    """Tell whether a page of this server sends the request, or a program that is no browser."""
    origin = headers.get(b"origin")
    return origin is None or urlsplit(origin).netloc == headers.get(b"host")


def _other_site(headers: dict[bytes, str]) -> str:
    return (
        f"the request comes from another site, {headers[b'origin'][:200]}, than "
        f"{headers.get(b'host', '')[:200]}: where a proxy is between, let it pass on the Host "
        "header"
    )


def problem(status: int, message: str) -> JSONResponse:
    """Return an error in its one form."""
    code = CODES.get(status, "error")
    return JSONResponse({"error": {"code": code, "message": message}}, status_code=status)


def install(app: FastAPI) -> None:
    """Put the guard before an app, and its errors into one form."""
    app.add_middleware(Guard)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return problem(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        return problem(422, f"{place}: {first['msg']}" if place else str(first["msg"]))

    @app.exception_handler(Unknown)
    async def unknown(_: Request, error: Unknown) -> JSONResponse:
        return problem(404, str(error))

    @app.exception_handler(Conflict)
    async def conflict(_: Request, error: Conflict) -> JSONResponse:
        return problem(409, str(error))

    @app.exception_handler(Silent)
    async def silent(_: Request, error: Silent) -> JSONResponse:
        return problem(424, str(error))  # a page repeats a 503 by itself

    @app.exception_handler(DBAPIError)
    async def unavailable(_: Request, error: DBAPIError) -> JSONResponse:
        # The page keeps what it sent and sends it again; the replica's log has the reason.
        print(f"label: the database refused: {error}", flush=True)
        return problem(503, "the database does not answer; nothing is lost, the page tries again")
