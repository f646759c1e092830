"""The service's side of a sweep on a real socket: jobs without a model, which make a step each time one looks."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.listening import listening

TOKEN = "token-of-the-attempt"
OVER = ("succeeded", "failed", "cancelled")
End = Callable[[dict[str, Any]], Mapping[str, Any]]


def plain(job: dict[str, Any]) -> Mapping[str, Any]:
    """How jobs end unless a test says otherwise: more compute, more accuracy, with less and less of it."""
    ratios = job["spec"].get("method", {}).get("ratios", {"full": 5})
    gflop = 20.0 * ratios["full"] * job["total_steps"]
    figures = {"accuracy": 1 - 1 / (1 + gflop / 100), "gflop": gflop, "mb": 1.0, "seconds": gflop / 100, "steps": 5}
    return {"status": "succeeded", "figures": figures}


class FakeService:
    """`end` says how a job ends; `answers` are statuses to give first, instead; `log` has every request."""

    def __init__(self, end: End = plain, steps: int = 3) -> None:
        self.end, self.steps = end, steps
        self.jobs: dict[str, dict[str, Any]] = {}
        self.log: list[tuple[str, str]] = []
        self.events: list[dict[str, Any]] = []
        self.answers: list[int] = []
        self.offset = 0
        self.url = ""
        self.lock = threading.Lock()

    def answer(self, method: str, path: str, body: dict[str, Any], token: str | None) -> tuple[int, dict[str, Any]]:
        with self.lock:
            self.log.append((method, path))
            if self.answers:
                return self.answers.pop(0), {"detail": "not now", "code": "told_so"}
            if token != f"Bearer {TOKEN}":
                return 401, {"detail": "whose token is this?"}
            if path == "/v1/runs/events":
                return 200, self._take(body)
            if (method, path) == ("POST", "/v1/runs/trials"):
                return 200, self._start(body)
            if (method, path) == ("GET", "/v1/runs/trials"):
                return 200, {"data": [self._look(job) for job in self.jobs.values()]}
            job = self.jobs[path.split("/")[-2]]
            job |= {} if job["status"] in OVER else {"status": "cancelled"}
            return 200, job

    def _take(self, body: dict[str, Any]) -> dict[str, Any]:
        """Events of one attempt; those of the next begin at 0 again, as its file does."""
        for event in body["events"]:
            self.events.append(event)
            self.offset = event["seq"]
        return {"offset": self.offset, "want": None}

    def _start(self, body: dict[str, Any]) -> dict[str, Any]:
        job = {"job_id": f"job-{len(self.jobs)}", "status": "queued", "step": 0, "total_steps": self.steps}
        empty = {"accuracy": None, "loss": None, "figures": None, "error": None}
        return self._public(self.jobs.setdefault(body["key"], {**body, **job, **empty}))

    def _look(self, job: dict[str, Any]) -> dict[str, Any]:
        if job["status"] not in OVER:
            ratios = job["spec"].get("method", {}).get("ratios", {"full": 5})
            job |= {"status": "running", "step": job["step"] + 1, "loss": 1 / (1 + ratios["full"] * job["step"])}
            if job["step"] >= job["total_steps"]:
                job |= self.end(job)
        return self._public(job)

    def _public(self, job: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in job.items() if name != "spec"}


@contextmanager
def served(service: FakeService) -> Iterator[FakeService]:
    """Serve it; `url` is what a sweep's context has as `post_url`."""

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
            status, answer = service.answer(self.command, self.path, body, self.headers.get("Authorization"))
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = _answer

        def log_message(self, *_: object) -> None:
            """Silent."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """Silent: a driver that is killed breaks its connections."""

    server = Server(("127.0.0.1", 0), Handler)
    service.url = f"http://127.0.0.1:{server.server_address[1]}/v1/runs"
    with listening(server):
        yield service
