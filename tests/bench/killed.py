"""The API killed with SIGKILL under load, again and again: nothing accepted is lost, nothing runs twice.

    python -m tests.bench.killed [--rounds 25] [--store sqlite|postgres]

Clients submit without pause, each with its own Idempotency-Key and sending again what was not answered; a fake of Ray's
Jobs API on a socket counts what is started. After every kill the same home is served again. At the end the store, the
fake and the clients' notes are compared.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import secrets
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from service.lifecycle import JobState, may_move
from service.store import JobQuery, Store
from tests.bench.report import publish, target
from tests.bench.service import database_of, quantile, server
from tests.service.conftest import FakeRay
from tests.service.ray_server import ray_server

CLIENTS = 4
STEPS = 3


class Clients:
    """Threads that submit and remember what was promised to them."""

    def __init__(self) -> None:
        self.port: int | None = None
        self.key = ""
        self.accepted: dict[str, str] = {}  # Idempotency-Key → job id
        self.answers: Counter[int] = Counter()
        self.mismatches: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._submit, daemon=True) for _ in range(CLIENTS)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)

    def _submit(self) -> None:
        key = secrets.token_hex(12)
        while not self._stop.is_set():
            job_id = self._post(key)
            if job_id is None:
                time.sleep(0.05)
                continue
            if self.accepted.setdefault(key, job_id) != job_id:
                self.mismatches.append(key)
            # Every tenth is sent once more, though it was answered: it must be the same job.
            if random.random() > 0.1:
                key = secrets.token_hex(12)

    def _post(self, key: str) -> str | None:
        """The job's id, or None where no answer came."""
        if self.port is None:
            return None
        body = json.dumps({"steps": STEPS, "name": key})
        headers = {
            "Authorization": f"Bearer {self.key}", "Content-Type": "application/json", "Idempotency-Key": key
        }  # fmt: skip
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("POST", "/v1/jobs", body, headers)
            answer = connection.getresponse()
            content = answer.read()
            self.answers[answer.status] += 1
            return str(json.loads(content)["id"]) if answer.status == 201 else None
        except (OSError, http.client.HTTPException, ValueError):
            return None
        finally:
            connection.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--store", action="append", choices=["sqlite", "postgres"])
    given = parser.parse_args()
    rows = []
    for store in given.store or ["sqlite", "postgres"]:
        with tempfile.TemporaryDirectory(prefix="d2ft-killed-") as home, database_of(store) as url:
            rows.append({"store": store, **measure(Path(home), url, given.rounds)})
    targets = [
        target(f"{row['store']}: {name}", row[name], comparison, limit)
        for row in rows
        for name, comparison, limit in (
            ("lost", "==", 0), ("doubled", "==", 0), ("run twice", "==", 0), ("illegal moves", "==", 0),
            ("ready max s", "<=", 5.0),
        )
    ]  # fmt: skip
    publish("killed", rows, targets, f"{given.rounds} kills, {CLIENTS} clients")


def measure(home: Path, url: str | None, rounds: int) -> dict[str, Any]:
    """Kill and serve again, so many times; what was found wrong afterwards."""
    ray, clients, ready = FakeRay(drives=True), Clients(), []
    clients.start()
    with ray_server(ray) as address:
        env = {"D2FT_RAY_ADDRESS": address, "D2FT_POLL_S": "0.05", "D2FT_RECONCILE_S": "1", "D2FT_LEASE_S": "1"}
        for _ in range(rounds):
            begin = time.perf_counter()
            with server(home, url, env) as (port, process, key):
                ready.append(time.perf_counter() - begin)
                clients.port, clients.key = port, key
                time.sleep(random.uniform(0.2, 2.5))
                process.kill()
                process.wait(10)
        clients.stop()
        with server(home, url, {**env, "D2FT_MAX_RUNNING": "50"}):
            wait_until_all_ended(home, url)
        ray.join()
    return {**compare(home, url, ray, clients), "ready max s": max(ready), "ready p50 s": quantile(ready, 0.5)}


def wait_until_all_ended(home: Path, url: str | None) -> None:
    store = Store(url or f"sqlite:///{home / 'd2ft.db'}")
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        open_states = tuple(state for state in JobState if not state.is_final)
        if not store.jobs.list(JobQuery(limit=1, status=open_states)).data:
            break
        time.sleep(0.5)
    store.close()


def compare(home: Path, url: str | None, ray: FakeRay, clients: Clients) -> dict[str, Any]:
    """What the clients were promised beside what the store and Ray have."""
    store = Store(url or f"sqlite:///{home / 'd2ft.db'}")
    jobs: dict[str, Any] = {}
    query = JobQuery(limit=100, order="asc")
    while True:
        page = store.jobs.list(query)
        jobs |= {job.id: job for job in page.data}
        if not page.has_more:
            break
        query = JobQuery(limit=100, order="asc", after=page.last_id)
    names = Counter(job.name for job in jobs.values())
    started = Counter(submission_id.rpartition("-a")[0] for submission_id in ray.jobs)
    illegal = sum(_illegal(store, job_id) for job_id in jobs)
    states = Counter(job.status for job in jobs.values())
    store.close()
    return {
        "accepted": len(clients.accepted),
        "lost": sum(job_id not in jobs for job_id in clients.accepted.values()),
        "doubled": sum(count - 1 for count in names.values()) + len(clients.mismatches),
        "run twice": sum(count - 1 for count in started.values()),
        "illegal moves": illegal,
        "succeeded": states["succeeded"],
        "others": sum(states.values()) - states["succeeded"],
        "500s": sum(count for status, count in clients.answers.items() if status >= 500),
    }


def _illegal(store: Store, job_id: str) -> int:
    """Moves in a job's history that do not follow from each other or from the table."""
    wrong, state, after = 0, "validating", 0
    while True:
        page = store.records.events(job_id, after=after, limit=100)
        for event in page.data:
            wrong += event.seq != after + 1
            after = event.seq
            if event.type == "job.status" and event.data["from"] != event.data["to"]:
                old, new = event.data["from"], event.data["to"]
                wrong += old != state or not may_move(JobState(old), JobState(new))
                state = new
        if not page.has_more:
            return wrong


if __name__ == "__main__":
    main()
