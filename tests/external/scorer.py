"""An HTTP server that scores, in a thread of this process."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, Any]
"""Status, and what is sent: bytes as they are, the rest as JSON."""


class Scorer(ThreadingHTTPServer):
    """Answers `answer(body, number of the request)`, and remembers what it was asked."""

    daemon_threads = True

    def __init__(self, answer: Callable[[dict[str, Any], int], Answer]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = answer
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.pending = self.most_pending = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/score"

    def handle_error(self, *_: Any) -> None:
        """Say nothing of a client that did not wait."""


class Handler(BaseHTTPRequestHandler):
    server: Scorer

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            count = len(server.bodies)
            server.bodies.append(body)
            server.headers.append(self.headers)
            server.pending += 1
            server.most_pending = max(server.most_pending, server.pending)
        code, found = server.answer(body, count)
        with server.lock:
            server.pending -= 1
        sent = found if isinstance(found, bytes) else json.dumps(found).encode()
        self.send_response(code)
        if code == 302:
            self.send_header("Location", "http://elsewhere/score")
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def lengths(body: dict[str, Any], _: int) -> Answer:
    """Score every response with its number of characters."""
    return 200, {"scores": [len(text) for text in body["responses"]]}


@contextmanager
def serving(answer: Callable[[dict[str, Any], int], Answer]) -> Iterator[Scorer]:
    """Run a server while the block runs."""
    server = Scorer(answer)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
