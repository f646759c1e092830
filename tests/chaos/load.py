"""Clients that submit without pause, send again what was not answered, and remember what was promised to them."""

from __future__ import annotations

import http.client
import json
import random
import secrets
import threading
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

STEPS = 3


class Clients:
    """Threads that submit, each job by an Idempotency-Key of its own, to whichever port serves just now.

    `accepted` is the job that each key was promised, `sent` every key; `mismatches` were promised two jobs.
    """

    def __init__(self, count: int = 4, pause_s: float = 0.0, kinds: tuple[Mapping[str, str], ...] = ({},)) -> None:
        self.port: int | None = None
        self.key = ""
        self.accepted: dict[str, str] = {}
        self.sent: set[str] = set()
        self.answers: Counter[int] = Counter()
        self.mismatches: list[str] = []
        self._pause_s = pause_s
        self._kinds = kinds
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._submit, daemon=True) for _ in range(count)]

    @property
    def unknown(self) -> frozenset[str]:
        """Keys that were sent and never answered."""
        return frozenset(self.sent - self.accepted.keys())

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)

    def _submit(self) -> None:
        key, kind = secrets.token_hex(12), random.choice(self._kinds)
        while not self._stop.is_set():
            job_id = self._post(key, kind)
            if job_id is None:
                time.sleep(0.05)
                continue
            if self.accepted.setdefault(key, job_id) != job_id:
                self.mismatches.append(key)
            time.sleep(self._pause_s)
            # Every tenth is sent once more, though it was answered: it must be the same job.
            if random.random() > 0.1:
                key, kind = secrets.token_hex(12), random.choice(self._kinds)

    def _post(self, key: str, kind: Mapping[str, str]) -> str | None:
        """The job's id, or None where no answer came, or none that promises it."""
        if self.port is None:
            return None
        body = json.dumps({"steps": STEPS, "name": key, "metadata": kind})
        headers: dict[str, Any] = {
            "Authorization": f"Bearer {self.key}", "Content-Type": "application/json", "Idempotency-Key": key
        }  # fmt: skip
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            self.sent.add(key)
            connection.request("POST", "/v1/jobs", body, headers)
            answer = connection.getresponse()
            content = answer.read()
            self.answers[answer.status] += 1
            return str(json.loads(content)["id"]) if answer.status == 201 else None
        except (OSError, http.client.HTTPException, ValueError):
            return None
        finally:
            connection.close()
