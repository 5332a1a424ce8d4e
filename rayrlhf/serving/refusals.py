"""Refusals in the form of OpenAI's errors, whose clients turn them into exceptions.

{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}
"""

import json
from collections.abc import Mapping

from starlette.responses import Response

KINDS = {
    400: ("invalid_request_error", "bad_request"),
    401: ("authentication_error", "invalid_api_key"),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    409: ("invalid_request_error", "conflict"),
    413: ("invalid_request_error", "request_too_large"),
    422: ("invalid_request_error", "invalid_value"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    500: ("server_error", "internal_error"),
    503: ("server_error", "unavailable"),
    504: ("server_error", "timeout"),
}
HEADERS: dict[int, dict[str, str]] = {
    401: {"www-authenticate": "Bearer"},
    429: {"retry-after": "1"},
    503: {"retry-after": "2"},
}


class Refusal(Exception):
    """A request is not answered: status, the reason in words, and the field that is to blame."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param

    @property
    def body(self) -> bytes:
        """The error as JSON."""
        return error_body(self.status, self.message, self.param)

    def response(self, headers: Mapping[str, str] | None = None) -> Response:
        """Return the answer to send."""
        return Response(
            self.body,
            self.status,
            {**HEADERS.get(self.status, {}), **(headers or {})},
            media_type="application/json",
        )


def error_body(status: int, message: str, param: str | None = None) -> bytes:
    """Return an error as JSON in OpenAI's form."""
    kind, code = KINDS.get(status, KINDS[500 if status >= 500 else 400])
    error = {"message": message, "type": kind, "param": param, "code": code}
    return json.dumps({"error": error}).encode()
