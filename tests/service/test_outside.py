"""Runs that were not ordered here: listed while they tell of themselves, decided by their own word or their silence."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update
from starlette.testclient import TestClient

from service import silence
from service.schemas import RunPlace, UserBody
from service.settings import Settings
from service.silence import Silence
from service.store import Attempt, Store
from service.store.access import FIRST_USER
from service.tables import AttemptRow
from tests.service.conftest import FakeRay
from workers.contract import JobSpec

WHERE = {"submission_id": "raysubmit_1", "run_dir": "/shared/run1", "ray_address": "http://head:8265"}
BODY = {"spec": {"steps": 5, "name": "far", "metadata": {"team": "vision"}}, "where": WHERE}


class Run:
    """A run as its driver speaks for it."""

    def __init__(self, api: TestClient, **begun: Any) -> None:
        self.api, self.id, self.token, self.url = api, begun["job_id"], begun["token"], begun["url"]
        self.seq = 0

    def post(self, *events: tuple[str, dict[str, Any]]) -> Any:
        told = []
        for type, data in events:
            self.seq += 10
            told.append({"seq": self.seq, "at": time.time(), "type": type, "message": "", "data": data})
        headers = {"Authorization": f"Bearer {self.token}"}
        return self.api.post("/v1/runs/events", json={"attempt": 1, "events": told}, headers=headers)

    def phase(self, name: str) -> Any:
        return self.post(("phase", {"name": name}))

    def outcome(self, status: str, **data: Any) -> Any:
        return self.post(("outcome", {"status": status, **data}))

    @property
    def job(self) -> dict[str, Any]:
        found: dict[str, Any] = self.api.get(f"/v1/jobs/{self.id}").json()
        return found


def begin(api: TestClient, **changes: Any) -> Run:
    answer = api.post("/v1/runs", json={**BODY, **changes})
    assert answer.status_code == 201, answer.text
    return Run(api, **answer.json())


@pytest.fixture
def run(api: TestClient) -> Run:
    return begin(api)


@pytest.fixture
def world(api: TestClient) -> Store:
    return api.app.state.world.store  # type: ignore[attr-defined, no-any-return]


def heard(store: Store, ago_s: float) -> None:
    """Have all runs have been heard of so long ago."""
    with store._database.write() as session:
        at = time.time() - ago_s
        session.execute(update(AttemptRow).values(heard_at=at, created_at=at))


def test_a_run_is_a_job_under_way_and_says_where(api: TestClient, run: Run, settings: Settings) -> None:
    assert run.url == f"{settings.url}/v1/runs/events"
    job = run.job
    assert (job["status"], job["attempt"], job["outside"], job["where"]) == ("starting", 1, True, WHERE)
    assert run.token not in str(job) and job["started_at"] and job["queue_position"] is None
    assert run.phase("running").json() == {"offset": 10, "want": None}
    assert run.post(("metrics", {"step": 3, "total_steps": 5, "loss": 0.5})).status_code == 200
    listed = api.get("/v1/jobs", params={"metadata[team]": "vision", "search": "far"}).json()["data"]
    assert [each["id"] for each in listed] == [run.id] and listed[0]["progress"]["step"] == 3
    assert run.outcome("succeeded").status_code == 200 and run.job["status"] == "succeeded"
    types = [event["type"] for event in api.get(f"/v1/jobs/{run.id}/events").json()["data"]]
    assert types == ["job.created", "job.status", "job.status", "metrics", "job.status"]
    assert run.phase("running").json()["code"] == "run_unknown", "its token opens nothing any more"


def test_an_ordinary_job_is_not_outside(api: TestClient) -> None:
    made = api.post("/v1/jobs", json={"steps": 2}).json()
    assert made["outside"] is False and made["where"] is None


def test_a_key_that_may_submit_is_needed_and_a_runs_token_lists_nothing(api: TestClient, run: Run) -> None:
    weak = api.post("/v1/keys", json={"name": "r", "scopes": ["read"]}).json()["key"]
    for key, status in ((weak, 403), (run.token, 401), ("", 401)):
        answer = api.post("/v1/runs", json=BODY, headers={"Authorization": f"Bearer {key}"})
        assert answer.status_code == status


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"spec": {"steps": 0}}, "spec.steps"),
        ({"spec": {"stepps": 1}}, "spec.stepps"),
        ({"where": WHERE}, "spec"),
        ({"spec": {}, "where": {"run_dir": "x" * 4097}}, "where.run_dir"),
        ({"spec": {}, "where": {"run_dir": 7}}, "where.run_dir"),
        ({"spec": {}, "where": {"host": "h"}}, "where.host"),
    ],
)
def test_what_is_no_job_is_refused_by_its_field(api: TestClient, body: dict[str, Any], param: str) -> None:
    answer = api.post("/v1/runs", json=body)
    assert answer.status_code == 422 and answer.json()["param"] == param


def test_files_and_models_are_not_looked_for_here(api: TestClient) -> None:
    spec = {"model": "nobody_knows_it", "dataset": "folder:///not/here", "weights": "/not/here.safetensors"}
    assert begin(api, spec=spec).job["dataset"] == "folder:///not/here"


def test_the_same_key_gives_the_same_run_and_another_body_is_refused(api: TestClient) -> None:
    key = {"Idempotency-Key": "once"}
    first, again = (api.post("/v1/runs", json=BODY, headers=key) for _ in range(2))
    assert first.json() == again.json() and again.headers["Idempotency-Replayed"] == "true"
    other = api.post("/v1/runs", json={**BODY, "where": {}}, headers=key)
    as_a_job = api.post("/v1/jobs", json=BODY["spec"], headers=key)
    assert other.json()["code"] == as_a_job.json()["code"] == "idempotency_key_reused"


def test_it_holds_nothing_of_the_cluster_and_waits_for_nothing(api: TestClient, run: Run, world: Store) -> None:
    run.phase("running")
    first = api.post("/v1/jobs", json={"steps": 2}).json()["id"]
    assert world.queue.may_claim(1)
    claimed = world.queue.claim(1)
    assert claimed and claimed.job_id == first
    assert [each.job_id for each in world.attempts.open()] == [first], "the supervisor does not follow it"
    assert world.census.take().attempts_open == 1 and world.census.take().jobs["running"] == 1
    assert world.jobs.plans_in_use() == {}


def test_a_user_has_only_so_many_under_way(api: TestClient, world: Store) -> None:
    ann = world.access.make_user(UserBody(name="ann", max_queued=1))
    attempt, _ = world.outside.begin(JobSpec(), RunPlace(), owner=ann.id)
    key = {"Authorization": f"Bearer {api.post('/v1/keys', json={'name': 'a', 'user': 'ann'}).json()['key']}"}
    refused = api.post("/v1/runs", json=BODY, headers=key)
    assert refused.status_code == 429 and refused.json()["code"] == "too_many_runs"
    assert api.post("/v1/jobs", json={}, headers=key).status_code == 201, "the queue is another matter"
    world.attempts.absorb(attempt, [{"seq": 1, "type": "outcome", "data": {"status": "succeeded"}}], 1)
    assert api.post("/v1/runs", json=BODY, headers=key).status_code == 201
    other = api.get(f"/v1/jobs/{attempt.job_id}", headers=key)
    assert other.status_code == 200


@pytest.mark.parametrize("code", ["driver_failed", "not_finite"])
def test_a_failure_is_final_whatever_its_fault(run: Run, code: str) -> None:
    run.phase("running")
    run.outcome("failed", error={"code": code, "fault": "system", "message": "it broke"})
    assert run.job["status"] == "failed" and run.job["error"]["code"] == code


@pytest.mark.parametrize("why", [None, "drain", "pause"])
def test_what_paused_itself_is_paused_and_only_its_own_machine_goes_on_with_it(
    api: TestClient, run: Run, why: str | None
) -> None:
    run.phase("running")
    run.outcome("paused", **({"why": why} if why else {}))
    assert run.job["status"] == "paused"
    answer = api.post(f"/v1/jobs/{run.id}/resume")
    assert answer.status_code == 409 and answer.json()["code"] == "runs_outside"
    assert "--out /shared/run1" in answer.json()["detail"]
    assert api.post(f"/v1/jobs/{run.id}/cancel").json()["status"] == "cancelled"
    assert api.post(f"/v1/jobs/{run.id}/retry").json()["code"] == "runs_outside"


@pytest.mark.parametrize("phase", ["starting", "running"])
def test_a_pause_is_asked_of_the_run(api: TestClient, run: Run, phase: str) -> None:
    run.phase(phase)
    assert api.post(f"/v1/jobs/{run.id}/pause").json()["status"] == "pausing"
    assert run.post().json()["want"] == "pause"
    assert api.post(f"/v1/jobs/{run.id}/resume").status_code == 409
    run.outcome("paused")
    assert run.job["status"] == "paused"


@pytest.mark.parametrize("said", ["cancelled", "failed", "paused"])
def test_a_cancel_is_asked_of_the_run_and_done_when_it_says_so(api: TestClient, run: Run, said: str) -> None:
    run.phase("running")
    assert api.post(f"/v1/jobs/{run.id}/cancel").json()["status"] == "cancelling"
    assert run.post().json()["want"] == "cancel"
    run.outcome(said)
    assert run.job["status"] == "cancelled"


def test_one_that_ended_before_it_heard_of_the_cancel_ended_so(api: TestClient, run: Run) -> None:
    api.post(f"/v1/jobs/{run.id}/cancel")
    run.outcome("succeeded")
    assert run.job["status"] == "succeeded"


def test_every_post_is_a_sign_of_life_and_silence_is_a_fault(run: Run, world: Store) -> None:
    run.phase("running")
    heard(world, 100)
    assert world.outside.end_silent(time.time() - 120) == []
    assert run.post().status_code == 200  # nothing to tell, but there
    assert world.outside.end_silent(time.time() - 60) == [] and run.job["status"] == "running"
    heard(world, 100)
    assert world.outside.end_silent(time.time() - 60) == [run.id] and world.outside.end_silent(time.time()) == []
    error = run.job["error"]
    assert (error["code"], error["fault"]) == ("run_silent", "system") and "for 100 s" in error["message"]
    assert run.post().status_code == 401, "and the run goes on alone"


def test_a_run_that_never_spoke_is_silent_too(run: Run, world: Store) -> None:
    heard(world, 100)
    assert world.outside.end_silent(time.time() - 60) == [run.id]


def test_a_cancelled_run_that_falls_silent_is_cancelled(api: TestClient, run: Run, world: Store) -> None:
    api.post(f"/v1/jobs/{run.id}/cancel")
    heard(world, 100)
    assert world.outside.end_silent(time.time() - 60) == [run.id] and run.job["status"] == "cancelled"


def test_nobody_is_silent_while_nobody_listens(run: Run, world: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(silence.time, "monotonic", lambda: now)
    looks = Silence(world, 50)
    heard(world, 1000)  # the service was away for so long
    for now in (*range(0, 50, 5), 100.0):  # noqa: B007 - read by the clock
        looks.look()
        assert run.job["status"] == "starting", "after a gap the time begins anew"
    for now in range(105, 155, 5):  # noqa: B007
        looks.look()
    assert run.job["status"] == "failed"


PATHS = ("/etc/passwd", "../../../secret", "result/model.safetensors", "link/key", "")


@pytest.mark.parametrize("path", PATHS)
def test_no_file_of_the_service_is_opened_for_a_run_outside(
    api: TestClient, run: Run, settings: Settings, tmp_path: Path, path: str
) -> None:
    """Not by an absolute path, nor a relative one, nor through a link, nor where an own job's files would lie."""
    own = settings.home / "jobs" / run.id / "a1"
    own.mkdir(parents=True)
    (tmp_path / "key").write_text("secret")
    (settings.home / "jobs" / run.id / "link").symlink_to(tmp_path)
    (own / "logs").mkdir()
    (own / "logs" / "driver.log").write_text("secret")
    given = path or str(settings.home / "key")
    run.phase("running")
    run.post(("artifact.ready", {"name": "model.safetensors", "path": given}))
    run.post(("checkpoint.saved", {"name": "step-00000001", "step": 1, "path": given}))
    run.outcome("succeeded")
    assert [each["name"] for each in api.get(f"/v1/jobs/{run.id}/artifacts").json()["data"]] == ["model.safetensors"]
    for what in ("artifacts/model.safetensors", "logs", "logs?follow=true", "logs?rank=0"):
        answer = api.get(f"/v1/jobs/{run.id}/{what}")
        assert answer.status_code == 404 and answer.json()["code"] == "lies_outside", what
        assert "/shared/run1" in answer.json()["detail"] and "secret" not in answer.text
    image = {"content": b"\xff\xd8", "headers": {"Content-Type": "image/jpeg"}}
    assert api.post(f"/v1/jobs/{run.id}/predict", **image).status_code == 404
    weights = api.post("/v1/jobs", json={"weights": f"job:{run.id}"})
    assert weights.status_code == 422 and "outside" in weights.json()["detail"]


def test_no_word_of_a_run_outside_reaches_ray(api: TestClient, run: Run, ray: FakeRay) -> None:
    """Not even where it names a submission of this cluster."""
    api.get(f"/v1/jobs/{run.id}/logs")
    api.post(f"/v1/jobs/{run.id}/cancel")
    assert not ray.submits and not ray.stops


def test_another_users_run_is_none_of_mine(api: TestClient, run: Run) -> None:
    api.post("/v1/users", json={"name": "bob"})
    key = api.post("/v1/keys", json={"name": "b", "user": "bob"}).json()["key"]
    for what in ("", "/logs", "/artifacts/x"):
        answer = api.get(f"/v1/jobs/{run.id}{what}", headers={"Authorization": f"Bearer {key}"})
        assert answer.json()["code"] == "job_not_found"


def test_an_outcome_that_was_not_asked_for_is_a_move_of_the_table(store: Store) -> None:
    def ended(status: str, *phases: str) -> str:
        attempt: Attempt
        attempt, fresh = store.outside.begin(JobSpec(), RunPlace(), owner=FIRST_USER)
        assert fresh
        lines = [{"seq": n, "type": "phase", "data": {"name": name}} for n, name in enumerate(phases, 1)]
        store.attempts.absorb(attempt, [*lines, {"seq": 99, "type": "outcome", "data": {"status": status}}], 99)
        return store.jobs.get(attempt.job_id).status

    for phases in ((), ("planning",), ("running",), ("running", "recovering")):
        assert ended("paused", *phases) == "paused" and ended("cancelled", *phases) == "cancelled"
    assert ended("cancelled", "running", "finalizing") == "cancelled"
    assert ended("paused", "running", "finalizing") == "failed"
