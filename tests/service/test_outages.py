"""The API told to end, and a store that others keep locked: what was begun is answered, and nothing is a 500."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy.exc import OperationalError
from starlette.testclient import TestClient

from service import host
from service.home import read_secret
from service.store import JobQuery, Store, database
from tests.service.conftest import FakeRay, free_port
from tests.service.ray_server import ray_server
from tests.service.walk import received, status_of, store_of
from tests.waiting import until

ROOT = Path(__file__).parents[2]


@contextmanager
def api_process(home: Path, ray: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The server as a process of its own, on a home that has a catalogue; yields it and its port."""
    port = free_port()
    given = {"D2FT_HOME": str(home), "D2FT_PORT": str(port), "D2FT_RAY_ADDRESS": ray, "D2FT_LEASE_S": "60"}
    env = {**os.environ, **given, "D2FT_POLL_S": "0.05", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-m", "service.app"], env=env, stderr=subprocess.DEVNULL) as server:
        try:
            until(lambda: host._answers(f"http://127.0.0.1:{port}"))
            yield server, port
        finally:
            server.kill()


def test_told_to_end_it_answers_what_has_begun_gives_the_lease_back_and_leaves_drivers_alone(
    home: Path, models: object, ray: FakeRay
) -> None:
    with ray_server(ray) as address, api_process(home, address) as (server, port):
        auth = {"Authorization": f"Bearer {read_secret(home / 'key')}"}
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", headers=auth, trust_env=False) as api:
            running = api.post("/v1/jobs", json={"steps": 5}).json()["id"]
            until(lambda: ray.jobs)
        body = json.dumps({"steps": 7}).encode()
        lines = ["POST /v1/jobs HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
        lines += [f"Authorization: {auth['Authorization']}", f"Content-Length: {len(body)}", "", ""]
        with socket.create_connection(("127.0.0.1", port), 10) as begun:
            begun.sendall("\r\n".join(lines).encode() + body[:5])
            time.sleep(0.3)
            server.send_signal(signal.SIGTERM)
            until(lambda: not host._answers(f"http://127.0.0.1:{port}"))
            begun.sendall(body[5:])
            assert status_of(received(begun)) == 201
        server.wait(15)
        assert ray.stops == [] and ray.jobs[f"job-{running}-a1"]["status"] == "RUNNING"
    store = Store(f"sqlite:///{home / 'd2ft.db'}")
    assert store.leases.hold("supervisor", "the next", 1), "the lease would have run for a minute"
    assert store.attempts.open()[0].job_id == running
    store.close()


@contextmanager
def locked(path: Path, seconds: float) -> Iterator[None]:
    """Another program writes to the store, and takes its time."""
    begun = threading.Event()

    def write() -> None:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        begun.set()
        time.sleep(seconds)
        other.execute("COMMIT")
        other.close()

    writer = threading.Thread(target=write)
    writer.start()
    begun.wait(10)
    try:
        yield
    finally:
        writer.join()


def test_writes_wait_while_the_store_is_locked_for_a_moment(api: TestClient, home: Path) -> None:
    with locked(home / "d2ft.db", 1.0):
        began = time.monotonic()
        assert api.get("/v1/jobs").status_code == 200 and time.monotonic() - began < 0.8
        assert api.post("/v1/jobs", json={"steps": 2}).status_code == 201
    assert len(api.get("/v1/jobs").json()["data"]) == 1


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_MS", 300)


def test_of_a_store_that_stays_locked_writes_are_told_and_reads_served(
    impatient: None, home: Path, api: TestClient, submit: Callable[..., str]
) -> None:
    job_id = submit(steps=2)
    with locked(home / "d2ft.db", 3.0):
        began = time.monotonic()
        answers: list[Any] = []

        def write(path: str, body: dict[str, Any]) -> None:
            answers.append(api.post(path, json=body))

        asked: list[tuple[str, dict[str, Any]]] = [("/v1/jobs", {"steps": 3}), (f"/v1/jobs/{job_id}/cancel", {})]
        threads = [threading.Thread(target=write, args=each) for each in asked * 2]
        for thread in threads:
            thread.start()
        for path in (f"/v1/jobs/{job_id}", "/v1/jobs", f"/v1/jobs/{job_id}/events", "/v1/keys", "/healthz"):
            assert api.get(path).status_code == 200
        for thread in threads:
            thread.join()
        assert time.monotonic() - began < 2.5, "they wait beside each other, not one after another"
    assert {answer.status_code for answer in answers} == {503}
    assert all(answer.headers["Retry-After"] and answer.json()["code"] == "store_unavailable" for answer in answers)
    assert api.post(f"/v1/jobs/{job_id}/cancel").json()["status"] == "cancelled"


def test_a_full_disk_is_told_as_a_store_that_is_away(api: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OperationalError("INSERT", {}, sqlite3.OperationalError("database or disk is full"))

    with monkeypatch.context() as patched:
        patched.setattr("service.store.admission._insert", full)
        answer = api.post("/v1/jobs", json={"steps": 2})
        assert answer.status_code == 503 and answer.headers["Retry-After"] and "full" in answer.json()["detail"]
    assert store_of(api).jobs.list(JobQuery()).data == []
