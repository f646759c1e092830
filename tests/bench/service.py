"""The control plane under load: one process of the API, thousands of queued jobs, hundreds of listeners.

    python -m tests.bench.service [--jobs 10000] [--store sqlite] [--store postgres]

Clients and server are processes of their own, the server pinned to one core and the clients to the others. A fake of
Ray's Jobs API takes the first job and never ends it, so that all others stay queued. Times are of the clients: a
request from its first byte sent to its last byte read, an event from the run's post to its arrival at a listener.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import random
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from service.home import ensure_key
from service.processes import child_env
from service.store import Store
from tests.bench.report import publish, target
from tests.service.conftest import FakeRay, free_port, write_catalogue
from tests.service.postgres import empty_database, running_postgres
from tests.service.ray_server import ray_server

CLIENTS = 8
LISTENERS = 500
EVENTS = 200
EVENTS_PER_S = 20.0
READS = 200
NAMES = ("lamp", "river", "cloud", "stone", "birch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--listeners", type=int, default=LISTENERS)
    parser.add_argument("--store", action="append", choices=["sqlite", "postgres"])
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for store in given.store or ["sqlite", "postgres"]:
        with (
            tempfile.TemporaryDirectory(prefix="d2ft-bench-") as home,
            database_of(store) as url,
            ray_server(FakeRay()) as ray,
        ):
            rows.append({"store": store, **measure(Path(home), url, ray, given.jobs, given.listeners)})
    targets = [each for row in rows for each in targets_of(row)]
    publish("service", rows, targets, f"{given.jobs} jobs, {CLIENTS} clients, {given.listeners} listeners")


def targets_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """What is asked of one process, on either store."""
    name = row["store"]
    return [
        target(f"{name}: accepted jobs per second", row["posts/s"], ">=", 200),
        target(f"{name}: POST p99 ms", row["post p99 ms"], "<=", 50),
        *(target(f"{name}: {what} p95 ms", row[f"{what} p95 ms"], "<=", 50) for what in ("list", "filter", "search")),
        target(f"{name}: events lost, repeated or out of order", row["events wrong"], "==", 0),
        target(f"{name}: event p95 s", row["event p95 s"], "<=", 1.0),
        target(f"{name}: RSS MB", row["rss MB"], "<=", 400),
    ]


def measure(home: Path, url: str | None, ray: str, num_jobs: int, num_listeners: int) -> dict[str, Any]:
    """All figures of one store."""
    with server(home, url, {"D2FT_RAY_ADDRESS": ray}) as (port, process, key):
        posts, ids = load(port, key, num_jobs)
        reads = {what: timed_reads(port, key, path) for what, path in queries(ids).items()}
        events, wrong = asyncio.run(listen(home, url, port, key, num_listeners))
        rss = process.memory_info().rss / 1e6
        cpu = sum(process.cpu_times()[:2])
    taken, latencies = posts
    return {
        "posts/s": num_jobs / taken,
        "post p50 ms": 1e3 * statistics.median(latencies),
        "post p99 ms": 1e3 * quantile(latencies, 0.99),
        **{f"{what} p95 ms": 1e3 * quantile(times, 0.95) for what, times in reads.items()},
        "event p50 s": statistics.median(events),
        "event p95 s": quantile(events, 0.95),
        "events wrong": wrong,
        "rss MB": rss,
        "server cpu s": cpu,
    }


def queries(ids: Sequence[str]) -> dict[str, Callable[[], str]]:
    """What is read while all jobs are there: pages anywhere, filters and searches that match few and many."""
    return {
        "list": lambda: f"/v1/jobs?limit=20&after={random.choice(ids)}",
        "filter": lambda: f"/v1/jobs?status=queued&metadata[team]={random.choice(NAMES)}&limit=20",
        "search": lambda: f"/v1/jobs?search={random.choice([*NAMES, 'nothing-like-it', ids[0][-8:].lower()])}",
        "get": lambda: f"/v1/jobs/{random.choice(ids)}",
    }


def load(port: int, key: str, num_jobs: int) -> tuple[tuple[float, list[float]], list[str]]:
    """((seconds for all, seconds of each POST), ids) of jobs made by several clients at once."""
    latencies: list[float] = []
    ids: list[str] = []
    errors: list[str] = []

    def client(count: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        for _ in range(count):
            name = f"{random.choice(NAMES)} {secrets.token_hex(3)}"
            body = json.dumps({"steps": 10, "name": name, "metadata": {"team": random.choice(NAMES)}})
            headers = {**_headers(key), "Idempotency-Key": secrets.token_hex(12)}
            begin = time.perf_counter()
            connection.request("POST", "/v1/jobs", body, headers)
            answer = connection.getresponse()
            content = answer.read()
            latencies.append(time.perf_counter() - begin)
            if answer.status != 201:
                errors.append(content.decode())
            else:
                ids.append(json.loads(content)["id"])
        connection.close()

    begin = time.perf_counter()
    threads = [threading.Thread(target=client, args=(num_jobs // CLIENTS,)) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise SystemExit(f"{len(errors)} POSTs failed, the first with {errors[0]}")
    return (time.perf_counter() - begin, latencies), ids


def timed_reads(port: int, key: str, path: Callable[[], str]) -> list[float]:
    """Seconds of one client's reads, one after another."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    times = []
    for _ in range(READS):
        begin = time.perf_counter()
        connection.request("GET", path(), headers=_headers(key))
        answer = connection.getresponse()
        answer.read()
        times.append(time.perf_counter() - begin)
        assert answer.status == 200, answer.status
    connection.close()
    return times


async def listen(home: Path, url: str | None, port: int, key: str, num_listeners: int) -> tuple[list[float], int]:
    """(seconds from a run's post to each arrival, events that a listener missed, saw twice or out of order)."""
    attempt = claim_one(home, url)
    begun = asyncio.Semaphore(0)
    listeners = [asyncio.create_task(one_listener(port, key, attempt.job_id, begun)) for _ in range(num_listeners)]
    for _ in range(num_listeners):
        await begun.acquire()
    await asyncio.to_thread(post_events, port, attempt.token)
    heard = await asyncio.gather(*listeners)
    expected = None
    delays, wrong = [], 0
    for seqs, late in heard:
        delays += late
        expected = expected or list(range(1, max(seqs) + 1))
        wrong += sum(a != b for a, b in zip(seqs, expected, strict=False)) + abs(len(seqs) - len(expected))
    return delays, wrong


def claim_one(home: Path, url: str | None) -> Any:
    """The attempt of the job that the cluster has."""
    store = Store(url or f"sqlite:///{home / 'd2ft.db'}")
    (attempt,) = store.attempts.open()
    store.close()
    return attempt


def post_events(port: int, token: str) -> None:
    """What a run tells, a step at a time; the last event ends the job, and with it the streams."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    begin = time.perf_counter()
    for i in range(1, EVENTS + 1):
        last = i == EVENTS
        data = {"status": "succeeded"} if last else {"step": i, "total_steps": EVENTS, "loss": 1.0 / i}
        event = {"seq": i, "at": time.time(), "type": "outcome" if last else "metrics", "data": data}
        body = json.dumps({"attempt": 1, "events": [event]})
        connection.request("POST", "/v1/runs/events", body, _headers(token))
        answer = connection.getresponse()
        text = answer.read()
        assert answer.status == 200, text
        time.sleep(max(0.0, begin + i / EVENTS_PER_S - time.perf_counter()))
    connection.close()


async def one_listener(port: int, key: str, job_id: str, begun: asyncio.Semaphore) -> tuple[list[int], list[float]]:
    """(numbers, delays) of the events that one listener hears until the stream ends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"GET /v1/jobs/{job_id}/events HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAccept: text/event-stream\r\n"
    writer.write(f"{head}Authorization: Bearer {key}\r\n\r\n".encode())
    seqs: list[int] = []
    delays: list[float] = []
    while line := await reader.readline():
        if line.startswith(b"id: "):
            seqs.append(int(line[4:]))
            if seqs[-1] == 1:
                begun.release()
        elif line.startswith(b"data: "):
            event = json.loads(line[6:])
            if event["type"] in ("metrics", "outcome"):
                delays.append(time.time() - event["created_at"])
        elif line == b"0\r\n":
            break
    writer.close()
    return seqs, delays


@contextmanager
def server(
    home: Path, url: str | None, settings: Mapping[str, str] | None = None
) -> Iterator[tuple[int, psutil.Process, str]]:
    """The API as a process on a core of its own; yields its port, its process and a key."""
    port = free_port()
    home.mkdir(exist_ok=True)
    key = ensure_key(home)
    # A service that has run before has its catalogue of models; making it would take the server's core for a while.
    write_catalogue(home, {})
    env = {
        **child_env(),
        "D2FT_HOME": str(home),
        "D2FT_PORT": str(port),
        "D2FT_MAX_QUEUED": "1000000",
        **(settings or {}),
    }
    if url:
        env["D2FT_DATABASE_URL"] = url
    with (home / "api.log").open("ab") as output:
        child = subprocess.Popen([sys.executable, "-m", "service.app"], env=env, stdout=output, stderr=output, cwd=home)
    process = psutil.Process(child.pid)
    cores = sorted(os.sched_getaffinity(0))
    try:
        process.cpu_affinity(cores[:1])
        os.sched_setaffinity(0, cores[1:] or cores)
        wait_ready(port, child)
        yield port, process, key
    finally:
        os.sched_setaffinity(0, cores)
        child.terminate()
        child.wait(20)


def wait_ready(port: int, child: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and child.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
        try:
            connection.request("GET", "/healthz")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.05)
        finally:
            connection.close()
    raise SystemExit("the API did not start")


@contextmanager
def database_of(store: str) -> Iterator[str | None]:
    """An empty database; None means SQLite in home."""
    if store == "sqlite":
        yield None
        return
    with running_postgres() as postgres, empty_database(postgres) as url:
        yield url


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _headers(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}


if __name__ == "__main__":
    main()
