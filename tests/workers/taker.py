"""A stand-in for the service that runs post to, on a real socket."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.listening import listening


class Taker:
    """Takes events as the real one does, and lists runs; `answers` are statuses or bodies to give first, instead."""

    def __init__(self):
        self.posts, self.events, self.answers, self.want, self.listed = [], [], [], None, []
        self.offset, self.port = 0, 0
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def take(self, path, headers, body):
        with self.lock:
            self.posts.append((time.monotonic(), headers, body))
            if self.answers:
                answer = self.answers.pop(0)
                return (answer, {}) if isinstance(answer, int) else (200, answer)
            if path == "/v1/runs":
                self.listed.append((headers, body))
                return 201, {"job_id": "ftjob_1", "attempt": 1, "token": "run_of_this_attempt", "url": "http://x/y"}
            for event in body["events"]:
                assert event["seq"] > self.offset, "twice or out of order"
                self.events.append(event)
                self.offset = event["seq"]
            return 200, {"offset": self.offset, "want": self.want}


@contextmanager
def taking() -> Iterator[Taker]:
    """One that takes during the block."""
    taker = Taker()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert len(body) < 700_000
            status, answer = taker.take(self.path, dict(self.headers), json.loads(body))
            content = json.dumps(answer).encode() if isinstance(answer, dict) else answer
            self.send_response(status)
            if status == 302:
                self.send_header("Location", f"{taker.url}/elsewhere")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    taker.port = server.server_address[1]
    with listening(server):
        yield taker
