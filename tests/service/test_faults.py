"""What is lost to faults of the system: the policy by itself, and jobs that go on, drain, fail or are poisoned."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.faults import DIED, FINAL_CODES, POISONED_AFTER, Losses, may_go_on, verdict, with_one_more
from service.settings import Settings
from service.store import Store
from tests.service.bench import Bench, sid
from tests.service.conftest import FakeRay


@pytest.fixture(params=["sqlite", "postgres"])
def store_url(request: pytest.FixtureRequest, store_url: str) -> str:
    """The same tests on both."""
    return str(request.getfixturevalue("database")) if request.param == "postgres" else store_url


@pytest.fixture
def bench(settings: Settings, store: Store, ray: FakeRay) -> Bench:
    return Bench(settings, store, ray)


def error(code: str = DIED, fault: str = "system") -> dict[str, Any]:
    return {"code": code, "fault": fault, "message": f"of {code}", "param": None}


codes = st.sampled_from([DIED, "ray_restarted", "group_lost"])


@given(lost=st.lists(st.tuples(codes, st.integers(0, 4)), max_size=12), most=st.integers(0, 4))
def test_every_loss_counts_and_a_job_ends_by_the_budget_or_by_standing_still(
    lost: list[tuple[str, int]], most: int
) -> None:
    losses, reached, deaths = Losses(), 0, []
    for code, step in lost:
        reached = max(reached, step)
        losses = with_one_more(losses, error(code), reached)
        deaths += [reached] if code == DIED else []
        ending = verdict(losses, error(code), most)
        last = deaths[-POISONED_AFTER:]
        stands = len(last) == POISONED_AFTER and len(set(last)) == 1
        assert (ending is not None) == (stands or losses.faults > most)
        assert ending is None or (ending["code"] == "poisoned") == stands
    assert losses.faults == len(lost)


def test_what_would_go_the_same_way_again_is_no_loss() -> None:
    assert may_go_on(error()) and may_go_on(error("group_lost"))
    assert not any(may_go_on(error(code)) for code in FINAL_CODES)
    assert not may_go_on(error("bad_image", "user")) and not may_go_on(error("start_timeout", "capacity"))


def start(bench: Bench, n: int = 1, job_id: str = "", steps: int = 0) -> str:
    """A job whose n-th attempt runs and has taken so many steps."""
    job_id = job_id or bench.submit(steps=50)
    bench.looks(2)
    told = [("metrics", {"step": step, "total_steps": 50}) for step in range(1, steps + 1)]
    bench.lines(job_id, n, ("phase", {"name": "running"}), *told)
    bench.looks()
    assert bench.job(job_id).attempt == n and bench.job(job_id).status == "running"
    return job_id


def die(bench: Bench, job_id: str, n: int = 1) -> None:
    bench.ray.set_status(sid(job_id, n), "FAILED", "exit code 9")
    bench.looks()


def moves(bench: Bench, job_id: str) -> list[str]:
    return [event.data["to"] for event in bench.history(job_id, "job.status")]


def test_a_driver_that_dies_costs_an_attempt_and_the_next_goes_on_from_the_checkpoint(bench: Bench) -> None:
    job_id = start(bench, steps=3)
    waiting = bench.submit()
    saved = {"name": "step-00000003", "path": "/c/3", "step": 3, "bytes": 9, "sha256": "00"}
    bench.lines(job_id, 1, ("checkpoint.saved", saved))
    die(bench, job_id)
    assert bench.job(job_id).status == "queued" and bench.job(job_id).error is None
    assert moves(bench, job_id)[-3:] == ["running", "recovering", "queued"]
    (lost,) = bench.history(job_id, "attempt.lost")
    told = {name: lost.data[name] for name in ("attempt", "code", "faults", "max_faults", "next")}
    assert told == {"attempt": 1, "code": "driver_died", "faults": 1, "max_faults": 3, "next": "queued"}
    assert "exit code 9" in lost.data["message"] and lost.level == "warning"
    bench.looks(2)
    assert bench.job(waiting).status == "queued", "its age puts the lost one first"
    context = json.loads((bench.settings.attempt_dir(job_id, 2) / "context.json").read_text())
    assert context["resume_from"] == str(bench.settings.checkpoints_dir(job_id))
    bench.lines(job_id, 2, ("outcome", {"status": "succeeded", "error": None}))
    bench.looks()
    assert bench.job(job_id).status == "succeeded"


def test_a_cluster_that_forgot_the_run_gets_it_as_a_new_attempt(bench: Bench) -> None:
    job_id = start(bench)
    bench.ray.jobs.clear()
    bench.looks(3)
    assert bench.ray.submits == [sid(job_id), sid(job_id, 2)] and bench.job(job_id).status == "starting"
    assert bench.history(job_id, "attempt.lost")[0].data["code"] == "ray_restarted"


def test_the_budget_is_borne_and_then_the_job_fails_and_says_how_much_was_lost(
    bench: Bench, settings: Settings
) -> None:
    job_id = bench.submit(steps=50)
    for n in range(1, 5):
        start(bench, n, job_id)
        bench.lines(job_id, n, ("outcome", {"status": "failed", "error": error("group_lost")}))
        bench.ray.set_status(sid(job_id, n), "FAILED")
        bench.looks()
    job = bench.job(job_id)
    assert job.status == "failed" and job.error and job.error.code == "group_lost"
    assert "4 attempts were lost" in job.error.message
    assert [event.data["next"] for event in bench.history(job_id, "attempt.lost")] == ["queued"] * 3 + ["failed"]
    bench.store.actions.retry(job_id)
    start(bench, 5, job_id)
    die(bench, job_id, 5)
    assert bench.job(job_id).status == "queued", "a retry begins to count anew"
    assert bench.history(job_id, "attempt.lost")[-1].data["faults"] == 1


def test_where_nothing_may_be_lost_the_first_fault_ends_the_job(bench: Bench) -> None:
    bench.store.attempts._max_faults = 0
    job_id = start(bench)
    die(bench, job_id)
    job = bench.job(job_id)
    assert job.status == "failed" and job.error and "1 attempt was lost" in job.error.message


def test_a_job_that_kills_its_driver_at_the_same_step_is_poisoned(bench: Bench) -> None:
    bench.store.attempts._max_faults = 9
    job_id = bench.submit(steps=50)
    for n, steps in enumerate((2, 5, 5, 4), 1):
        start(bench, n, job_id, steps)
        die(bench, job_id, n)
    job = bench.job(job_id)
    assert job.status == "failed" and job.error and (job.error.code, job.error.fault) == ("poisoned", "system")
    assert "3 times running, never further than step 5" in job.error.message and "d2ft logs" in job.error.message


@pytest.mark.parametrize("code", sorted(FINAL_CODES))
def test_what_is_final_is_not_tried_again(bench: Bench, code: str) -> None:
    job_id = start(bench)
    bench.lines(job_id, 1, ("outcome", {"status": "failed", "error": error(code)}))
    bench.looks()
    job = bench.job(job_id)
    assert job.status == "failed" and job.error and job.error.code == code
    assert bench.history(job_id, "attempt.lost") == []


def test_a_driver_brings_its_group_up_again_itself_and_says_so(bench: Bench) -> None:
    job_id = start(bench, steps=2)
    bench.lines(job_id, 1, ("phase", {"name": "recovering", "reason": "worker 1 is gone", "failures": 1}))
    bench.looks()
    assert bench.job(job_id).status == "recovering"
    assert bench.history(job_id)[-1].data["failures"] == 1 and bench.history(job_id)[-2].message == "worker 1 is gone"
    bench.lines(job_id, 1, *(("phase", {"name": name}) for name in ("starting", "planning", "running")))
    bench.looks()
    assert moves(bench, job_id)[-4:] == ["recovering", "starting", "planning", "running"]
    bench.lines(job_id, 1, ("phase", {"name": "recovering"}))
    bench.looks()
    bench.store.actions.pause(job_id)
    bench.looks(2)
    assert bench.job(job_id).status == "paused"


def test_a_run_whose_machine_is_switched_off_waits_again_and_nothing_is_counted(bench: Bench) -> None:
    job_id = start(bench, steps=2)
    bench.lines(job_id, 1, ("outcome", {"status": "paused", "error": None, "why": "drain"}))
    bench.ray.set_status(sid(job_id), "STOPPED")
    bench.looks()
    assert moves(bench, job_id)[-4:] == ["recovering", "queued", "planning", "starting"]
    assert bench.history(job_id, "attempt.lost") == [] and bench.job(job_id).attempt == 2


def test_a_drain_of_a_run_that_is_to_be_paused_pauses_it(bench: Bench) -> None:
    job_id = start(bench)
    bench.store.actions.pause(job_id)
    bench.lines(job_id, 1, ("outcome", {"status": "paused", "error": None, "why": "drain"}))
    bench.looks()
    assert bench.job(job_id).status == "paused"


def test_a_run_that_fails_while_it_pauses_is_paused_and_says_why(bench: Bench) -> None:
    job_id = start(bench)
    bench.store.actions.pause(job_id)
    bench.lines(job_id, 1, ("outcome", {"status": "failed", "error": error("group_lost")}))
    bench.looks()
    assert bench.job(job_id).status == "paused"
    (lost,) = bench.history(job_id, "attempt.lost")
    assert (lost.data["next"], lost.data["faults"]) == ("paused", 0)


def test_a_cancelled_driver_is_told_to_end_at_once_before_it_is_stopped(bench: Bench) -> None:
    job_id = start(bench)
    bench.store.actions.cancel(job_id)
    control = bench.settings.attempt_dir(job_id, 1) / "control.json"
    answer, told = bench.ray.answer, []

    def watched(request: Any) -> Any:
        if request.url.path.endswith("/stop"):
            told.append(json.loads(control.read_text()))
        return answer(request)

    bench.ray.answer = watched  # type: ignore[method-assign]
    bench.looks(2)
    assert told == [{"want": "cancel"}] and bench.job(job_id).status == "cancelled"


def test_a_run_that_is_paused_before_it_trains_is_not_told_that_its_job_is_cancelled(bench: Bench) -> None:
    job_id = bench.submit(steps=4)
    bench.looks()
    bench.store.actions.pause(job_id)
    control = bench.settings.attempt_dir(job_id, 1) / "control.json"
    bench.looks(2)
    assert json.loads(control.read_text()) == {"want": "end"} and bench.job(job_id).status == "paused"


def test_a_driver_is_stopped_though_nothing_can_be_left_for_it(bench: Bench) -> None:
    orphan = {"home": str(bench.settings.home), "job_id": "gone", "attempt": "1"}
    bench.ray.jobs = {"job-gone-a1": {"submission_id": "job-gone-a1", "status": "RUNNING", "metadata": orphan}}
    bench.looks()
    assert bench.ray.stops == ["job-gone-a1"]
