"""The API killed with SIGKILL under load, again and again: nothing accepted is lost, nothing runs twice.

    python -m tests.bench.killed [--rounds 25] [--store sqlite|postgres]

Clients submit without pause, each with its own Idempotency-Key and sending again what was not answered; a fake of Ray's
Jobs API on a socket counts what is started. After every kill the same home is served again. At the end the store, the
fake and the clients' notes are compared.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from service.lifecycle import JobState
from service.store import JobQuery, Store
from tests.bench.report import publish, target
from tests.bench.service import database_of, quantile, server
from tests.chaos.checker import RULES, History, check, counts, read_jobs, runs_of, told
from tests.chaos.load import Clients
from tests.service.conftest import FakeRay
from tests.service.ray_server import ray_server

CLIENTS = 4


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
        for name, comparison, limit in (*((rule, "==", 0) for rule in RULES), ("ready max s", "<=", 5.0))
    ]  # fmt: skip
    publish("killed", rows, targets, f"{given.rounds} kills, {CLIENTS} clients")


def measure(home: Path, url: str | None, rounds: int) -> dict[str, Any]:
    """Kill and serve again, so many times; what was found wrong afterwards."""
    ray, clients, ready = FakeRay(drives=True), Clients(CLIENTS), []
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
    jobs = read_jobs(url or f"sqlite:///{home / 'd2ft.db'}")
    findings = check(History(jobs, clients.accepted, clients.unknown, runs_of(ray)))
    findings["doubled"] += [f"{key} was promised two jobs" for key in clients.mismatches]
    print(*told(findings), sep="\n", flush=True)
    succeeded = sum(job.state is JobState.SUCCEEDED for job in jobs)
    return {
        "accepted": len(clients.accepted),
        **counts(findings),
        "succeeded": succeeded,
        "others": len(jobs) - succeeded,
        "500s": sum(count for status, count in clients.answers.items() if status >= 500),
    }


if __name__ == "__main__":
    main()
