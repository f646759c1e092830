"""The API made to fail at every place where it writes or speaks to Ray, under load; then what must be true is checked.

    python -m tests.chaos.api [--rounds 5] [--store sqlite|postgres] [--only store.commit:kill9 …]

For each failpoint and action: serve a home with that failpoint set, while clients submit; once it has struck, end the
process where it has not ended itself, and serve the home again. After the rounds it is served without failpoints until
nothing waits or runs. Some of the jobs lose a driver, and go on from a checkpoint. A fake on a socket stands for Ray.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import random
import secrets
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from scheduler.failpoints import ACTIONS, DIRECTORY, NAMES, VARIABLE
from tests.bench.report import publish, target
from tests.bench.service import database_of, server
from tests.chaos.checker import RULES, History, check, counts, read_jobs, runs_of, told
from tests.chaos.load import Clients
from tests.service.conftest import FakeRay
from tests.service.ray_server import ray_server

PLACES = tuple(name for name in NAMES if name.startswith(("store.", "supervisor.")))
PAIRS = tuple(itertools.product(PLACES, ACTIONS))
KINDS: tuple[Mapping[str, str], ...] = ({}, {"saves": "1"}, {"saves": "1", "deaths": "1"})
LOAD_S = 1.0  # a round at most, and of one that strikes without ending the process how long that goes on
STRIKES_S = 6.0  # how long a round waits for its failpoint
READY_S = 5.0
DRAIN_S = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--store", action="append", choices=["sqlite", "postgres"])
    parser.add_argument("--only", nargs="*", default=[f"{name}:{action}" for name, action in PAIRS])
    given = parser.parse_args()
    pairs = [(name, action) for name, _, action in (each.partition(":") for each in given.only)]
    rows, targets = rows_and_targets(given.rounds, given.store or ["sqlite"], pairs)
    publish("chaos_api", rows, targets, f"{given.rounds} rounds each")


def rows_and_targets(
    rounds: int, stores: Sequence[str] = ("sqlite",), pairs: Sequence[tuple[str, str]] = PAIRS
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A row for each store, failpoint and action, and what is asked of all of them together."""
    rows = [row for store in stores for row in _rows(store, rounds, pairs)]
    targets = [target(f"API: {rule}", sum(row[rule] for row in rows), "==", 0) for rule in RULES]
    targets += [
        target("API: jobs left without an end", sum(row["left"] for row in rows), "==", 0),
        target("API: rounds in which the failpoint did not strike", sum(row["missed"] for row in rows), "==", 0),
        target("API: ready max s", max(row["ready max s"] for row in rows), "<=", READY_S),
    ]
    return rows, targets


def _rows(store: str, rounds: int, pairs: Sequence[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    for name, action in pairs:
        with tempfile.TemporaryDirectory(prefix="d2ft-chaos-") as home, database_of(store) as url:
            yield {"store": store, "name": name, "action": action, **measure(Path(home), url, name, action, rounds)}


def measure(home: Path, url: str | None, name: str, action: str, rounds: int) -> dict[str, Any]:
    """Fail at one place in one way, so many times; what was found wrong afterwards."""
    ray, clients, ready, missed = FakeRay(drives=True), Clients(2, pause_s=0.05, kinds=KINDS), [], 0
    clients.start()
    with ray_server(ray) as address:
        settings = {"D2FT_RAY_ADDRESS": address, "D2FT_POLL_S": "0.05", "D2FT_RECONCILE_S": "1", "D2FT_LEASE_S": "1"}
        settings |= {"D2FT_MAX_RUNNING": "8"}
        for _ in range(rounds):
            with _failing(home, name, action) as (failpoints, struck):
                begin = time.perf_counter()
                with server(home, url, {**settings, **failpoints}) as (port, process, key):
                    ready.append(time.perf_counter() - begin)
                    clients.port, clients.key = port, key
                    missed += not _wait(struck, process)
                    _go_on_or_end(process, action)
        clients.stop()
        begin = time.perf_counter()
        with server(home, url, {**settings, "D2FT_MAX_RUNNING": "50"}):
            ready.append(time.perf_counter() - begin)
            jobs = _drained(url or f"sqlite:///{home / 'd2ft.db'}")
    ray.join()
    findings = check(History(jobs, clients.accepted, clients.unknown, runs_of(ray)))
    findings["doubled"] += [f"{key} was promised two jobs" for key in clients.mismatches]
    for line in told(findings):
        print(f"{name} {action}: {line}", flush=True)
    states = [job.state for job in jobs]
    return {
        "accepted": len(clients.accepted),
        "unknown": len(clients.unknown),
        **counts(findings),
        "succeeded": states.count("succeeded"),
        "left": sum(not state.is_final for state in states),
        "retried": sum(len(job.attempts) > 1 for job in jobs),
        "missed": missed,
        "ready max s": max(ready),
    }


@contextlib.contextmanager
def _failing(home: Path, name: str, action: str) -> Iterator[tuple[dict[str, str], Path]]:
    """(environment with the failpoint, the folder that has a file once it has struck).

    Not at the first commits: they are the start's own.
    """
    struck = home / f"struck-{secrets.token_hex(4)}"
    struck.mkdir(parents=True)
    at = random.randint(8, 30) if name == "store.commit" else random.randint(1, 4)
    yield {VARIABLE: f"{name}:{action}@{at}", DIRECTORY: str(struck)}, struck


def _wait(struck: Path, process: psutil.Process) -> bool:
    """Whether the failpoint struck in time."""
    deadline = time.monotonic() + STRIKES_S
    while time.monotonic() < deadline and process.status() != psutil.STATUS_ZOMBIE:
        if any(struck.iterdir()):
            return True
        time.sleep(0.02)
    return any(struck.iterdir())


def _go_on_or_end(process: psutil.Process, action: str) -> None:
    """Leave a process that goes on some time, then kill it; one that hangs is killed as a watchdog would."""
    if action != "kill9":
        time.sleep(random.uniform(0.2, LOAD_S))
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()
        process.wait(10)


def _drained(url: str) -> Any:
    """All jobs once none of them waits or runs, or as they are after a time that is long for that."""
    deadline = time.monotonic() + DRAIN_S
    while True:
        jobs = read_jobs(url)
        if time.monotonic() > deadline or all(job.state.is_final for job in jobs):
            return read_jobs(url)  # tables are read one after the other, so the last change may be in some of them only
        time.sleep(0.3)


if __name__ == "__main__":
    main()
