"""Runs post their events with the token of their attempt: each line once, whoever brings it, and nothing else opens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from service.lifecycle import JobState
from service.schemas import UserBody
from service.store import Attempt, Store

URL = "/v1/runs/events"
NO_KEY = {"Authorization": ""}


@pytest.fixture
def world(api: TestClient) -> Store:
    return api.app.state.world.store  # type: ignore[attr-defined, no-any-return]


@pytest.fixture
def attempt(world: Store, submit: Callable[..., str]) -> Attempt:
    submit(steps=5)
    found = world.queue.claim(1)
    assert found
    return found


def event(seq: int, type: str = "metrics", **data: Any) -> dict[str, Any]:
    return {"seq": seq, "at": 1.0, "type": type, "level": "info", "message": "", "data": data}


def post(api: TestClient, attempt: Attempt, *events: dict[str, Any], n: int = 1) -> Any:
    headers = {"Authorization": f"Bearer {attempt.token}"}
    return api.post(URL, json={"attempt": n, "events": list(events)}, headers=headers)


def test_a_run_asks_how_far_the_store_is_and_sends_the_rest(api: TestClient, attempt: Attempt, world: Store) -> None:
    assert post(api, attempt).json() == {"offset": 0, "want": None}
    lines = [event(10, "phase", name="running"), event(30, step=1, loss=0.5)]
    assert post(api, attempt, *lines).json() == {"offset": 30, "want": None}
    assert post(api, attempt, *lines, event(55, step=2, loss=0.4)).json()["offset"] == 55
    job = world.jobs.get(attempt.job_id)
    assert job.status == "running" and job.progress.step == 2
    types = [each.type for each in world.records.events(attempt.job_id).data]
    assert types.count("metrics") == 2


def test_what_the_supervisor_has_read_already_is_not_taken_twice(
    api: TestClient, attempt: Attempt, world: Store
) -> None:
    world.attempts.absorb(attempt, [event(10, step=1)], 10)
    assert post(api, attempt, event(10, step=1), event(20, step=2)).json()["offset"] == 20
    world.attempts.absorb(attempt, [event(10, step=1), event(20, step=2), event(30, step=3)], 30)
    assert world.records.metrics(attempt.job_id, max_points=10).total == 3
    types = [each.type for each in world.records.events(attempt.job_id).data]
    assert types.count("metrics") == 3


def test_the_answer_says_what_is_wanted_of_the_run(api: TestClient, attempt: Attempt, world: Store) -> None:
    post(api, attempt, event(10, "phase", name="running"))
    api.post(f"/v1/jobs/{attempt.job_id}/pause")
    assert post(api, attempt).json()["want"] == "pause"
    api.post(f"/v1/jobs/{attempt.job_id}/cancel")
    assert post(api, attempt).json()["want"] == "cancel"
    world.attempts.finish(attempt, JobState.CANCELLED)
    answer = post(api, attempt, event(20, step=1))
    assert answer.status_code == 401 and answer.json()["code"] == "run_unknown"


def test_a_runs_token_opens_nothing_else_and_no_key_opens_this(api: TestClient, attempt: Attempt, world: Store) -> None:
    headers = {"Authorization": f"Bearer {attempt.token}"}
    for path in ("/v1/jobs", f"/v1/jobs/{attempt.job_id}", "/v1/me", "/v1/keys", "/metrics", "/openapi.json"):
        assert api.get(path, headers=headers).status_code == 401, path
    assert api.post(f"/v1/jobs/{attempt.job_id}/cancel", headers=headers).status_code == 401
    assert api.post(URL, json={"attempt": 1, "events": []}).status_code == 401, "an administrator's key"
    assert api.post(URL, json={"attempt": 1, "events": []}, headers=NO_KEY).status_code == 401
    world.access.make_user(UserBody(name="ann"))
    assert post(api, attempt, n=2).status_code == 409


@pytest.mark.parametrize(
    "bad",
    [
        {"seq": 0, "type": "metrics"},
        {"seq": -5, "type": "metrics"},
        {"seq": True, "type": "metrics"},
        {"seq": 2**70, "type": "metrics"},
        {"seq": "1", "type": "metrics"},
        {"seq": 1},
        {"seq": 1, "type": "x" * 41},
        {"seq": 1, "type": "metrics", "data": []},
        {"seq": 1, "type": "metrics", "message": 7},
        {"seq": 1, "type": "metrics", "level": "loud"},
        {"seq": 1, "type": "metrics", "at": "noon"},
    ],
)
def test_what_is_no_event_is_refused_whole(
    api: TestClient, attempt: Attempt, world: Store, bad: dict[str, Any]
) -> None:
    answer = post(api, attempt, event(1, "phase", name="running"), bad)
    assert answer.status_code == 422 and answer.json()["param"] == "events"
    assert world.jobs.get(attempt.job_id).status == "planning"


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
kinds = st.sampled_from(
    [
        "phase",
        "metrics",
        "plan.created",
        "plan.changed",
        "ledger",
        "artifact.ready",
        "checkpoint.saved",
        "outcome",
        "odd",
    ]
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=kinds,
    data=st.dictionaries(
        st.sampled_from(["name", "path", "step", "status", "error", "bytes", "sha256", "total_steps", "forecast", "x"]),
        values,
        max_size=5,
    ),
)
def test_no_data_of_a_run_brings_the_service_down(
    api: TestClient, world: Store, submit: Callable[..., str], kind: str, data: dict[str, Any]
) -> None:
    job_id = submit()
    attempt = world.queue.claim(10_000)
    assert attempt and attempt.job_id == job_id
    answer = post(api, attempt, event(1, kind, **data))
    assert answer.status_code in (200, 422), answer.text
    for what in ("", "/events", "/metrics", "/checkpoints", "/artifacts"):
        assert api.get(f"/v1/jobs/{job_id}{what}").status_code == 200
    if answer.status_code == 200 and world.jobs.get(job_id).status != "failed":
        assert api.post(f"/v1/jobs/{job_id}/cancel").status_code in (200, 409)
