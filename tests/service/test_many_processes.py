"""Several API processes on one PostgreSQL: one queue, one supervisor, streams that see each other's writes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx2
import pytest

from service.app import create_app
from service.errors import UnavailableError
from service.home import read_secret
from service.settings import Settings
from tests.service.conftest import FakeRay, free_port, serving
from tests.waiting import until


@pytest.fixture
def shared(settings: Settings, models: object, database: str) -> Settings:
    """What all processes have in common."""
    return settings.model_copy(update={"database_url": database, "lease_s": 0.5, "poll_s": 0.05})


@pytest.fixture
def ray() -> Iterator[FakeRay]:
    ray = FakeRay(drives=True)
    yield ray
    ray.join()


class Doors:
    """API processes of one service, each by a client of its own."""

    def __init__(self, settings: Settings, ray: FakeRay) -> None:
        self._settings = settings
        self._ray = ray
        self._open: list[ExitStack] = []

    def open(self, key: str | None = None) -> httpx2.Client:
        """One process more."""
        stack = ExitStack()
        self._open.append(stack)
        url = stack.enter_context(serving(self._settings.model_copy(update={"port": free_port()}), self._ray))
        client = stack.enter_context(client_of(url, key or read_secret(self._settings.home / "key")))
        # Routes are built at the first request, under filters of warnings that two threads of one process would mix up.
        client.get("/v1/jobs")
        return client

    def close_first(self) -> None:
        self._open.pop(0).close()

    def close(self) -> None:
        while self._open:
            self.close_first()


def client_of(url: str, key: str | None) -> httpx2.Client:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx2.Client(base_url=url, headers=headers, trust_env=False, timeout=20)


@pytest.fixture
def doors(shared: Settings, ray: FakeRay) -> Iterator[Doors]:
    doors = Doors(shared, ray)
    yield doors
    doors.close()


def test_a_job_made_at_one_is_followed_at_the_other(doors: Doors, ray: FakeRay) -> None:
    one, two = doors.open(), doors.open()
    job_id = one.post("/v1/jobs", json={"steps": 5, "metadata": {"pause_s": "0.05"}}).json()["id"]
    with two.stream("GET", f"/v1/jobs/{job_id}/events", headers={"Accept": "text/event-stream"}) as answer:
        seqs = [int(line[4:]) for line in answer.iter_lines() if line.startswith("id: ")]
    assert seqs == list(range(1, len(seqs) + 1)) and len(seqs) > 10
    assert two.get(f"/v1/jobs/{job_id}").json()["status"] == "succeeded"
    assert len(ray.jobs) == 1


def test_one_key_at_two_doors_makes_one_job(doors: Doors) -> None:
    one, two = doors.open(), doors.open()
    answers: list[tuple[int, Any]] = []

    def post(door: httpx2.Client) -> None:
        answer = door.post("/v1/jobs", json={"steps": 3}, headers={"Idempotency-Key": "same"})
        answers.append((answer.status_code, json.dumps(answer.json(), sort_keys=True)))

    threads = [threading.Thread(target=post, args=(door,)) for door in (one, two) * 20]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 40 and len(set(answers)) == 1 and answers[0][0] == 201
    assert len(one.get("/v1/jobs").json()["data"]) == 1


def test_when_the_one_that_supervises_ends_the_other_takes_over(doors: Doors, ray: FakeRay) -> None:
    one = doors.open()
    running = one.post("/v1/jobs", json={"steps": 30, "metadata": {"pause_s": "0.05"}}).json()["id"]
    waiting = one.post("/v1/jobs", json={"steps": 3}).json()["id"]
    until(lambda: one.get(f"/v1/jobs/{running}").json()["status"] == "running")
    two = doors.open()
    doors.close_first()
    until(lambda: two.get(f"/v1/jobs/{waiting}").json()["status"] == "succeeded", 30)
    assert two.get(f"/v1/jobs/{running}").json()["status"] == "succeeded"
    assert sorted(ray.submits) == sorted(f"job-{job_id}-a1" for job_id in (running, waiting))


def test_a_revoked_key_is_shut_out_everywhere_within_a_moment(doors: Doors) -> None:
    one = doors.open()
    made = one.post("/v1/keys", json={"name": "short-lived"}).json()
    two, again = doors.open(made["key"]), client_of(str(one.base_url), made["key"])
    assert two.get("/v1/me").status_code == 200
    one.delete(f"/v1/keys/{made['id']}")
    until(lambda: two.get("/v1/me").status_code == 401, 1.5)
    assert again.get("/v1/me").status_code == 401
    again.close()


def test_without_its_database_the_service_does_not_start_and_says_why(shared: Settings, ray: FakeRay) -> None:
    # A port at which nobody listens stands for a database that is away.
    away = shared.model_copy(update={"database_url": "postgresql+psycopg://nobody@127.0.0.1:9/none"})
    with pytest.raises(UnavailableError, match="does not answer"):
        create_app(away, ray_transport=ray.transport())
