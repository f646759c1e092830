"""The live stream of a page: a job's events by number, replayed after a break; words about changes; beats; room."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from service.client import Client
from service.home import read_secret
from service.settings import Settings
from service.web import live
from tests.service.conftest import FakeRay, free_port, server, serving

__all__ = ["server"]
Heard = tuple[str, int | None, Any]


@pytest.fixture
def key(server: str, home: Path) -> str:
    return read_secret(home / "key") or ""


@pytest.fixture
def client(server: str, key: str) -> Iterator[Client]:
    with Client(server, key) as client:
        yield client


@contextmanager
def listening(url: str, key: str, path: str, **headers: str) -> Iterator[Iterator[Heard]]:
    """(type, id, data) of what comes, as a browser would hear it."""
    with (
        httpx2.Client(timeout=10) as http,
        http.stream("GET", url + path, headers={"Authorization": f"Bearer {key}", **headers}) as answer,
    ):
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        yield _heard(answer.iter_lines())


def _heard(lines: Iterator[str]) -> Iterator[Heard]:
    said: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(":")
            said[name] = value.strip()
        elif "data" in said:
            number = int(said["id"]) if "id" in said else None
            yield said.get("event", "message"), number, json.loads(said["data"])
            said = {}


def until(heard: Iterator[Heard], what: str) -> list[Heard]:
    found = []
    for each in heard:
        found.append(each)
        if each[0] == what:
            return found
    raise AssertionError(f"no {what} came")


def test_a_jobs_events_come_by_number_and_again_from_where_a_page_was(server: str, key: str, client: Client) -> None:
    job = client.submit({"steps": 5})
    with listening(server, key, f"/ui/live?job={job.id}") as heard:
        found = until(heard, "ledger")
        assert _num_open(server, key) == 1
    numbers = [number for _, number, _ in found if number is not None]
    assert numbers == list(range(1, len(numbers) + 1))
    assert [data["seq"] for kind, number, data in found if number is not None] == numbers
    assert sum(kind == "metrics" for kind, _, _ in found) == 5
    job.wait(timeout_s=20)
    with listening(server, key, f"/ui/live?job={job.id}&after=2", **{"Last-Event-ID": str(numbers[-3])}) as heard:
        again = until(heard, "ledger")
    assert [number for _, number, _ in again if number is not None] == numbers[-2:]


def test_a_page_hears_a_beat_and_that_something_has_changed(
    server: str, key: str, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "BEAT_S", 0.05)
    with listening(server, key, "/ui/live") as heard:
        assert next(heard)[0] == "beat"
        client.submit({"steps": 1})
        found = until(heard, "jobs")
        assert found[-1] == ("jobs", None, {}), "whose job that was is nobody else's business"
        beats = [data for kind, _, data in [*found, *until(heard, "beat")] if kind == "beat"]
        assert beats == sorted(beats)


def test_a_streams_end_gives_its_room_back(settings: Settings, models: object) -> None:
    settings = settings.model_copy(update={"port": free_port(), "max_streams_each": 2})
    ray = FakeRay(drives=True)
    with serving(settings, ray) as url:
        key = read_secret(settings.home / "key") or ""
        for _ in range(3):
            with listening(url, key, "/ui/live") as one, listening(url, key, "/ui/live") as two:
                assert next(one)[0] == next(two)[0] == "beat"
                refused = httpx2.get(f"{url}/ui/live", headers={"Authorization": f"Bearer {key}"})
                assert refused.status_code == 429 and refused.json()["code"] == "too_many_streams"
            deadline = 40
            while _num_open(url, key) and deadline:
                deadline -= 1
            assert _num_open(url, key) == 0
    ray.join()


def _num_open(url: str, key: str) -> int:
    text = httpx2.get(f"{url}/metrics", headers={"Authorization": f"Bearer {key}"}).text
    (line,) = [line for line in text.splitlines() if line.startswith("d2ft_streams_open")]
    return int(float(line.split()[-1]))
