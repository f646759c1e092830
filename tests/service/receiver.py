"""A web server that receives webhooks, counts who connects, and answers as it is told."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.listening import listening


@dataclass(frozen=True)
class Hit:
    """One request that came in."""

    path: str
    headers: dict[str, str]
    body: bytes


class Receiver:
    """`answers` are used up one by one, the last for ever: statuses, or functions that write to the connection."""

    def __init__(self, answers: list[Any], host: str, context: ssl.SSLContext | None) -> None:
        self.answers = answers
        self.hits: list[Hit] = []
        self.num_connections = 0
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                receiver._answer(self)

            do_GET = do_POST

            def log_message(self, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def process_request(self, request: Any, client_address: Any) -> None:
                receiver.num_connections += 1
                super().process_request(request, client_address)

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # the client went away

        self.server = Server((host, 0), Handler)
        if context is not None:
            self.server.socket = context.wrap_socket(
                self.server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.port: int = self.server.server_address[1]
        self.url = f"http://{host}:{self.port}/hook"

    def ids(self) -> list[str]:
        return [hit.headers["webhook-id"] for hit in self.hits]

    def wait(self, count: int, patience_s: float = 10) -> None:
        """Until so many requests have come."""
        until = time.monotonic() + patience_s
        while len(self.hits) < count:
            assert time.monotonic() < until, f"{len(self.hits)} of {count} requests came"
            time.sleep(0.01)

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("content-length", 0)))
        headers = {name.lower(): value for name, value in handler.headers.items()}
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        self.hits.append(Hit(handler.path, headers, body))
        if callable(answer):
            answer(handler)
            return
        handler.send_response(answer)
        handler.send_header("content-length", "0")
        handler.end_headers()


@contextmanager
def receiving(*answers: Any, host: str = "127.0.0.1", context: ssl.SSLContext | None = None) -> Iterator[Receiver]:
    receiver = Receiver(list(answers) or [200], host, context)
    with listening(receiver.server):
        yield receiver


def silent(event: threading.Event) -> Callable[[BaseHTTPRequestHandler], None]:
    """No answer until the event."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        event.wait(20)

    return answer


def redirect(to: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(307)
        handler.send_header("location", to)
        handler.send_header("content-length", "0")
        handler.end_headers()

    return answer


def endless(handler: BaseHTTPRequestHandler) -> None:
    """A body without an end."""
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b"x" * 65536)


def biscuit(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("set-cookie", "who=me; Path=/")
    handler.send_header("content-length", "0")
    handler.end_headers()
