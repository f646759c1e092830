"""Sweeps in the store: made once, their trials made once, never in the way of their own trials; on both databases."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from service.errors import ConflictError, InvalidRequestError, LostAttemptError, NotFoundError, TooManyError
from service.lifecycle import JobState
from service.schemas import Sweep, Trial, UserBody, UserChange
from service.store import Attempt, JobQuery, Place, Store
from service.store.access import FIRST_USER
from tests.service.fake_driver import ledger
from workers.contract import JobSpec
from workers.sweeps.contract import SweepSpec

SYSTEM = {"code": "driver_died", "fault": "system", "message": "gone", "param": None}


@pytest.fixture(params=["sqlite", "postgres"])
def store_url(request: pytest.FixtureRequest, store_url: str) -> str:
    """The same tests on both."""
    return str(request.getfixturevalue("database")) if request.param == "postgres" else store_url


def sweep_spec(**given: Any) -> SweepSpec:
    return SweepSpec.model_validate({"job": {"steps": 4}, "space": {"seed": {"values": [1, 2]}}, **given})


def make(store: Store, owner: str = FIRST_USER, key: str | None = None, **given: Any) -> Sweep:
    return store.sweeps.create(sweep_spec(**given), owner=owner, idempotency_key=key)[0]


def drive(store: Store, slots: int = 4) -> Attempt:
    attempt = store.queue.claim_sweep(slots)
    assert attempt is not None and attempt.kind == "sweep"
    store.attempts.mark_submitted(attempt)
    return store.attempts.absorb(attempt, [line(1, "phase", name="running")], 1)


def add(store: Store, attempt: Attempt, key: str = "t-0", seed: int = 1, **given: Any) -> Trial:
    place = Place(attempt.job_id, key, {"seed": seed}, given.pop("baseline", None))
    return store.sweeps.add_trial(attempt, place, attempt.sweep_spec.trial({"seed": seed, **given}))


def line(seq: int, type: str, **data: Any) -> dict[str, Any]:
    return {"seq": seq, "type": type, "data": data}


def finish(store: Store, attempt: Attempt, **told: Any) -> None:
    lines = [line(100, "ledger", **ledger(4, "x")), line(101, "outcome", status="succeeded", **told)]
    attempt = store.attempts.absorb(attempt, lines, 101)
    store.attempts.settle(attempt)


def test_a_sweep_is_listed_among_sweeps_and_its_trials_among_jobs(store: Store) -> None:
    job = store.jobs.create(JobSpec(steps=4, name="plain"), owner=FIRST_USER)[0]
    sweep = make(store, name="lr", metadata={"team": "vision"})
    assert sweep.id.startswith("sweep_") and sweep.status == "queued" and sweep.progress.total == 4
    attempt = drive(store)
    trial = add(store, attempt)
    assert [each.id for each in store.jobs.list(JobQuery()).data] == [trial.job_id, job.id]
    (only,) = store.jobs.list(JobQuery(sweep=sweep.id)).data
    assert (only.id, only.sweep_id, only.trial_key, only.setting) == (trial.job_id, sweep.id, "t-0", {"seed": 1})
    assert store.jobs.get(job.id).sweep_id is None
    assert [each.id for each in store.sweeps.list(JobQuery(metadata={"team": "vision"})).data] == [sweep.id]
    assert [each.id for each in store.sweeps.list(JobQuery(search="LR")).data] == [sweep.id]
    assert store.sweeps.list(JobQuery(status=("queued",))).data == []
    for wrong in (job.id, "sweep_none"):
        with pytest.raises(NotFoundError):
            store.sweeps.get(wrong)
    for ask in (store.jobs.get, store.actions.cancel, store.actions.resume, store.actions.retry):
        with pytest.raises(NotFoundError):
            ask(sweep.id)


def test_a_key_makes_one_sweep_and_none_of_another_body(store: Store) -> None:
    first, again = make(store, key="k"), make(store, key="k")
    assert first.id == again.id and not store.sweeps.create(sweep_spec(), owner=FIRST_USER, idempotency_key="k")[1]
    for other in (
        lambda: make(store, key="k", name="n"),
        lambda: store.jobs.create(JobSpec(), owner=FIRST_USER, idempotency_key="k"),
    ):
        with pytest.raises(InvalidRequestError, match="another body"):
            other()
    found = store.sweeps.replay(sweep_spec(), owner=FIRST_USER, idempotency_key="k")
    assert found and found.id == first.id
    assert store.sweeps.replay(sweep_spec(), owner=FIRST_USER, idempotency_key="new") is None


def test_a_trial_is_made_once_whatever_becomes_of_it(store: Store) -> None:
    sweep, attempt = make(store), None
    attempt = drive(store)
    first = add(store, attempt)
    store.actions.cancel(first.job_id)
    again = add(store, attempt, seed=2)
    assert again.job_id == first.job_id and again.status == "cancelled" and again.setting == {"seed": 1}
    assert [trial.key for trial in store.sweeps.trials(sweep.id)] == ["t-0"]
    assert store.sweeps.get(sweep.id).progress.model_dump() == {"done": 1, "failed": 1, "total": 4}


def test_a_trial_has_the_files_and_the_place_of_its_sweep(store: Store) -> None:
    make(store, job={"steps": 4, "queue_timeout_s": 60})
    attempt = drive(store)
    for wrong in ({"dataset": "folder:///etc"}, {"weights": "/x.safetensors"}, {"priority": 5}, {"model": "vit_x"}):
        with pytest.raises(InvalidRequestError) as refused:
            store.sweeps.add_trial(
                attempt, Place(attempt.job_id, "k", {}), JobSpec.model_validate({"steps": 4, **wrong})
            )
        assert refused.value.code == "not_a_trial" and refused.value.param == f"spec.{next(iter(wrong))}"
    assert store.sweeps.trials(attempt.job_id) == []
    made = store.jobs.get(add(store, attempt).job_id)
    assert made.spec["queue_timeout_s"] is None, "trials wait for one another as long as it takes"


def test_figures_points_and_knee_come_of_the_trials(store: Store) -> None:
    sweep = make(store)
    driving = drive(store)
    add(store, driving, "full", baseline="full")
    add(store, driving, "t-0", 2)
    for _ in range(2):
        running = store.queue.claim(1)
        assert running
        store.attempts.absorb(running, [line(1, "phase", name="running"), line(2, "evaluation", accuracy=0.4)], 2)
        store.attempts.absorb(running, [line(3, "metrics", step=2, total_steps=4, loss=0.5)], 3)
        trial = next(each for each in store.sweeps.trials(sweep.id) if each.job_id == running.job_id)
        assert (trial.step, trial.total_steps, trial.loss, trial.accuracy, trial.figures) == (2, 4, 0.5, 0.4, None)
        finish(store, running)
    found = store.sweeps.get(sweep.id)
    assert [point.model_dump() for point in found.points] == [
        {"key": key, "accuracy": 0.87, "compute": 1.0, "bytes": 1.0, "seconds": 1.0} for key in ("full", "t-0")
    ]
    assert found.against == "full" and found.knee == "full" and set(found.fronts.bytes) == {"full", "t-0"}
    assert found.trials[0].baseline == "full" and found.trials[0].figures and found.trials[0].figures.gflop == 5.0
    store.attempts.absorb(driving, [line(9, "sweep.result", knee="full"), line(10, "outcome", status="succeeded")], 10)
    ended = store.sweeps.get(sweep.id)
    assert ended.status == "succeeded" and ended.result == {"knee": "full"}
    assert [event.type for event in store.records.events(sweep.id).data][-2:] == ["sweep.result", "job.status"]


@pytest.mark.parametrize("users", [1, 3])
def test_a_sweep_never_holds_the_place_that_its_trials_need(store: Store, users: int) -> None:
    names = [store.access.make_user(UserBody(name=f"u{n}", max_running=1)).id for n in range(users)]
    sweeps = [make(store, owner=name) for name in names]
    driving = [drive(store) for _ in sweeps]
    for attempt in driving:
        add(store, attempt, "a"), add(store, attempt, "b", 2)
    for _ in range(2 * users):
        running = store.queue.claim(1)
        assert running is not None and running.kind == "job", "one slot, and it is a trial's"
        assert store.queue.claim(1) is None and not store.queue.may_claim(1)
        finish(store, running)
    assert all(trial.status == "succeeded" for sweep in sweeps for trial in store.sweeps.trials(sweep.id))


def test_only_so_many_sweeps_have_a_driver_and_users_take_turns(store: Store) -> None:
    other = store.access.make_user(UserBody(name="other")).id
    mine = [make(store) for _ in range(3)]
    theirs = make(store, owner=other)
    first, second = store.queue.claim_sweep(2), store.queue.claim_sweep(2)
    assert first and second and {first.job_id, second.job_id} == {mine[0].id, theirs.id}
    assert store.queue.claim_sweep(2) is None and not store.queue.may_claim_sweep(2)
    assert not store.queue.may_claim(1) and store.queue.claim(1) is None, "a sweep is no job"
    store.attempts.finish(first, JobState.SUCCEEDED)
    store.attempts.settle(store.attempts.open()[0])
    assert store.queue.may_claim_sweep(2)


def test_users_share_the_cluster_by_trials_not_by_sweeps(store: Store) -> None:
    other = store.access.make_user(UserBody(name="other")).id
    make(store)
    attempt = drive(store)
    for number in range(4):
        add(store, attempt, f"t-{number}")
    for _ in range(4):
        store.jobs.create(JobSpec(steps=4), owner=other)
    running = [store.queue.claim(4) for _ in range(4)]
    owners = Counter(store.jobs.get(each.job_id).owner for each in running if each)
    assert owners == {"admin": 2, "other": 2}


def test_a_driver_whose_user_has_too_many_waiting_tries_again(store: Store) -> None:
    make(store)
    attempt = drive(store)
    store.access.change_user(FIRST_USER, UserChange(max_queued=1).model_dump(exclude_unset=True))
    add(store, attempt, "a")
    with pytest.raises(TooManyError):
        add(store, attempt, "b")
    assert add(store, attempt, "a").status == "queued", "what is there is told, however many wait"
    store.queue.claim(1)
    assert add(store, attempt, "b").status == "queued"


def test_cancelling_a_sweep_cancels_its_trials_and_gets_no_new_ones(store: Store) -> None:
    sweep = make(store)
    attempt = drive(store)
    add(store, attempt, "done")
    done = store.queue.claim(1)
    assert done
    finish(store, done)
    add(store, attempt, "runs")
    running = store.queue.claim(1)
    add(store, attempt, "waits")
    add(store, attempt, "ended")
    assert store.sweeps.cancel_trial(attempt, "ended").status == "cancelled"
    assert store.sweeps.cancel_trial(attempt, "done").status == "succeeded", "harmless"
    found = store.sweeps.cancel(sweep.id)
    states = {trial.key: trial.status for trial in found.trials}
    assert states == {"done": "succeeded", "runs": "cancelling", "waits": "cancelled", "ended": "cancelled"}
    assert found.status == "cancelling" and store.sweeps.cancel(sweep.id).status == "cancelling"
    with pytest.raises(ConflictError, match="no new trials"):
        add(store, attempt, "late")
    assert add(store, attempt, "waits").error == store.sweeps.get(sweep.id).trials[2].error
    with pytest.raises(NotFoundError):
        store.sweeps.cancel_trial(attempt, "late")
    store.attempts.finish(attempt, JobState.CANCELLED)
    assert running
    with pytest.raises(ConflictError, match="still being cancelled"):
        store.sweeps.retry(sweep.id)
    store.attempts.finish(running, JobState.CANCELLED)
    retried = store.sweeps.retry(sweep.id)
    states = {trial.key: trial.status for trial in retried.trials}
    assert states == {"done": "succeeded", "runs": "queued", "waits": "queued", "ended": "cancelled"}
    assert retried.status == "queued" and retried.trials[1].error is None


def test_one_trial_is_cancelled_alone(store: Store) -> None:
    sweep = make(store)
    attempt = drive(store)
    trial = add(store, attempt)
    store.actions.cancel(trial.job_id)
    assert store.sweeps.get(sweep.id).status == "running"
    assert store.sweeps.trials(sweep.id)[0].error is None


def test_a_sweep_is_not_paused_and_ends_but_once(store: Store) -> None:
    sweep = make(store)
    with pytest.raises(ConflictError) as refused:
        store.actions.pause(sweep.id)
    assert refused.value.code == "sweep_no_pause" and "retry" in str(refused.value.remedy)
    attempt = drive(store)
    with pytest.raises(ConflictError):
        store.sweeps.retry(sweep.id)
    store.attempts.finish(attempt, JobState.SUCCEEDED)
    for ask in (store.sweeps.cancel, store.sweeps.retry):
        with pytest.raises(ConflictError):
            ask(sweep.id)


def test_no_job_is_preempted_for_a_sweep_and_no_sweep_for_a_job(store: Store) -> None:
    store.access.change_user(FIRST_USER, {"max_priority": 10})
    make(store)
    attempt = drive(store)
    store.jobs.create(JobSpec(steps=4, priority=5), owner=FIRST_USER)
    assert store.queue.preempt(1, 0.0) is None, "there is room for it"
    running = store.queue.claim(1)
    assert running
    store.attempts.absorb(running, [line(1, "phase", name="running")], 1)
    make(store, job={"steps": 4, "priority": 9})
    assert store.queue.preempt(1, 0.0) is None
    assert store.sweeps.get(attempt.job_id).status == "running"


def test_a_sweep_that_waits_too_long_fails_and_says_so(store: Store) -> None:
    sweep = make(store, job={"steps": 4, "queue_timeout_s": 1e-6})
    assert store.queue.expire() == 1
    error = store.sweeps.get(sweep.id).error
    assert error and error.code == "queue_timeout" and error.message.startswith("The sweep had not started")


def test_a_driver_that_dies_is_followed_by_another_that_finds_the_trials(store: Store) -> None:
    sweep = make(store)
    first = drive(store)
    trial = add(store, first)
    store.attempts.lose(first, SYSTEM)
    assert store.sweeps.get(sweep.id).status == "queued" and store.jobs.get(trial.job_id).status == "queued"
    with pytest.raises(LostAttemptError):
        add(store, first, "t-1")
    store.attempts.settle(first)
    second = drive(store)
    assert second.n == 2 and add(store, second).job_id == trial.job_id


def test_a_driver_that_dies_and_gets_no_trial_further_is_poisoned(store: Store) -> None:
    sweep = make(store)
    for n in range(3):
        attempt = drive(store)
        if n == 0:
            store.actions.cancel(add(store, attempt).job_id)
        store.attempts.lose(attempt, SYSTEM)
        store.attempts.settle(attempt)
    error = store.sweeps.get(sweep.id).error
    assert error and error.code == "poisoned"


@hypothesis_settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.sampled_from(["add", "run", "end", "die", "cancel one"]), max_size=20))
def test_whatever_happens_every_trial_can_come_to_an_end(store: Store, steps: list[str]) -> None:
    store.attempts._max_faults = 1000
    sweep = make(store)
    driving: Attempt | None = None
    running: Attempt | None = None
    for number, step in enumerate([*steps, *["run", "end"] * (len(steps) + 1)]):
        driving = driving or drive(store)
        if step == "add":
            add(store, driving, f"t-{number}")
        elif step == "run" and running is None:
            running = store.queue.claim(1)
        elif step == "end" and running is not None:
            finish(store, running)
            running = None
        elif step == "die":
            store.attempts.lose(driving, {**SYSTEM, "code": "ray_restarted"})
            store.attempts.settle(driving)
            driving = None
        elif step == "cancel one":
            for trial in [each for each in store.sweeps.trials(sweep.id) if each.status == "queued"][-1:]:
                store.actions.cancel(trial.job_id)
    found = store.sweeps.get(sweep.id)
    assert len(found.trials) == steps.count("add") == found.progress.done
    assert all(trial.status in ("succeeded", "cancelled") for trial in found.trials)
    store.sweeps.cancel(sweep.id)
    for attempt in store.attempts.open():
        store.attempts.finish(attempt, JobState.CANCELLED)
        store.attempts.settle(attempt)
