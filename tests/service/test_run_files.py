"""What a run leaves: artifacts, checkpoints, and logs by bytes."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from service.lifecycle import JobState
from service.settings import Settings
from service.store import Attempt, Store
from tests.service.conftest import FakeRay
from tests.service.test_routes import problem
from tests.service.walk import store_of


@pytest.fixture
def attempt(api: TestClient, submit: Callable[..., str]) -> Attempt:
    """A job that runs."""
    submit()
    found = store_of(api).queue.claim(1)
    assert found
    return found


@pytest.fixture
def logs(settings: Settings, attempt: Attempt) -> Path:
    """Where its logs lie."""
    found = settings.attempt_dir(attempt.job_id, 1) / "logs"
    found.mkdir(parents=True)
    return found


def test_what_a_run_left_can_be_fetched(api: TestClient, submit: Callable[..., str], settings: Settings) -> None:
    job_id = submit()
    store: Store = api.app.state.world.store  # type: ignore[attr-defined]
    attempt = store.queue.claim(1)
    assert attempt
    result = settings.attempt_dir(job_id, 1) / "result"
    result.mkdir(parents=True)
    (result / "model.safetensors").write_bytes(b"weights")
    (settings.home / "stray").write_text("not ours to give")
    digest = hashlib.sha256(b"weights").hexdigest()

    def ready(seq: int, name: str, path: object) -> dict[str, object]:
        data = {"name": name, "path": str(path), "bytes": 7, "sha256": digest}
        return {"seq": seq, "at": 1.0, "type": "artifact.ready", "data": data}

    def checkpoint(seq: int, step: int) -> dict[str, object]:
        data = {"name": f"step-{step}", "step": step, "path": "p", "bytes": 1, "sha256": digest}
        return {"seq": seq, "at": 1.0, "type": "checkpoint.saved", "data": data}

    lines = [
        ready(1, "model.safetensors", result / "model.safetensors"),
        ready(2, "../../key", result / "model.safetensors"),
        ready(3, "escaped", settings.home / "key"),
        ready(4, "climbing", "../../stray"),
        ready(5, "gone", result / "gone"),
        {"seq": 6, "at": 1.0, "type": "metrics", "data": {"step": 1, "loss": 1.5}},
        {"seq": 7, "at": 1.0, "type": "plan.created", "data": {"version": 1}},
        {"seq": 8, "at": 1.0, "type": "ledger", "data": {"rows": []}},
        checkpoint(9, 10),
        checkpoint(10, 20),
        checkpoint(11, 30),
        {"seq": 12, "at": 1.0, "type": "checkpoint.dropped", "data": {"name": "step-30"}},
        {"seq": 13, "at": 1.0, "type": "checkpoint.dropped", "data": {"name": 7}},
    ]
    store.attempts.absorb(attempt, lines, 1)
    root = f"/v1/jobs/{job_id}"
    assert len(api.get(f"{root}/artifacts").json()["data"]) == 5
    newest = api.get(f"{root}/checkpoints").json()["data"]
    assert [(each["name"], each["step"]) for each in newest] == [("step-20", 20), ("step-10", 10)]
    answer = api.get(f"{root}/artifacts/model.safetensors")
    assert answer.content == b"weights" and answer.headers["repr-digest"].startswith("sha-256=:")
    assert answer.headers["content-type"] == "application/octet-stream"
    part = api.get(f"{root}/artifacts/model.safetensors", headers={"Range": "bytes=2-4"})
    assert (part.status_code, part.content, part.headers["content-range"]) == (206, b"igh", "bytes 2-4/7")
    for name in ("escaped", "climbing", "gone", "never", "..%2f..%2fkey2", "%2e%2e/a1/context.json", "/etc/passwd"):
        problem(api.get(f"{root}/artifacts/{name}"), 404)
    assert api.get(f"{root}/metrics").json() == {"object": "list", "data": [{"step": 1, "loss": 1.5}], "total": 1}
    assert api.get(f"{root}/plan").json()["plan"] == {"version": 1}
    assert api.get(f"{root}/ledger").json()["ledger"] == {"rows": []}


def test_logs_come_from_ray_until_they_are_kept(
    api: TestClient, attempt: Attempt, settings: Settings, ray: FakeRay
) -> None:
    url = f"/v1/jobs/{attempt.job_id}/logs"
    ray.jobs[attempt.submission_id] = {"submission_id": attempt.submission_id, "status": "RUNNING"}
    assert "last words" in api.get(url).text and api.get(url, params={"offset": -5}).text == "words"
    ray.down = True
    assert problem(api.get(url), 503)["code"] == "ray_unreachable"
    kept = settings.attempt_dir(attempt.job_id, 1) / "logs" / "driver.log"
    kept.parent.mkdir(parents=True)
    kept.write_text("kept log")
    assert api.get(url, params={"offset": 5}).text == "log"
    problem(api.get(url, params={"attempt": 2}), 404)


def test_logs_are_read_by_bytes_from_either_end(api: TestClient, attempt: Attempt, logs: Path) -> None:
    (logs / "driver.log").write_bytes(b"0123456789")
    (logs / "rank1.log").write_bytes(b"rank one")
    for params, text, offset in (
        ({}, "0123456789", 10),
        ({"offset": 4}, "456789", 10),
        ({"offset": 4, "limit": 3}, "456", 7),
        ({"offset": -3}, "789", 10),
        ({"offset": -3, "limit": 1}, "7", 8),
        ({"offset": -99}, "0123456789", 10),
        ({"offset": 10}, "", 10),
        ({"offset": 2**53}, "", 10),
    ):
        answer = api.get(f"/v1/jobs/{attempt.job_id}/logs", params=params)
        assert (answer.status_code, answer.text) == (200, text), params
        assert (answer.headers["x-log-offset"], answer.headers["x-log-size"]) == (str(offset), "10"), params
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert api.get(f"/v1/jobs/{attempt.job_id}/logs", params={"rank": 1, "attempt": 1}).text == "rank one"
    found = problem(api.get(f"/v1/jobs/{attempt.job_id}/logs", params={"rank": 2}), 404)
    assert (found["code"], found["param"]) == ("log_not_found", "rank")


def test_a_log_that_is_no_plain_file_is_none(api: TestClient, attempt: Attempt, logs: Path, settings: Settings) -> None:
    """A run writes there, and could have the service read what is not its own."""
    (logs / "rank0.log").symlink_to(settings.home / "key")
    problem(api.get(f"/v1/jobs/{attempt.job_id}/logs", params={"rank": 0}), 404)
    (logs / "rank1.log").mkdir()
    os.mkfifo(logs / "rank2.log")
    for rank in (1, 2):
        problem(api.get(f"/v1/jobs/{attempt.job_id}/logs", params={"rank": rank}), 404)


def test_a_log_is_followed_until_the_attempt_has_ended(
    api: TestClient, attempt: Attempt, logs: Path, settings: Settings
) -> None:
    path, store = logs / "driver.log", store_of(api)
    path.write_bytes("Größe\n".encode())

    def goes_on() -> None:
        with path.open("ab") as log:
            log.write(b"\xff second\n")
        store.attempts.finish(attempt, JobState.FAILED)

    timer = threading.Timer(0.8, goes_on)
    timer.start()
    answer = api.get(f"/v1/jobs/{attempt.job_id}/logs", params={"follow": True, "offset": 7})
    timer.join()
    assert answer.content == b"\n\xff second\n" and answer.headers["content-type"] == "text/plain; charset=utf-8"
