"""The queue: priorities, fair share, quotas, preemption, time to wait; the policy by itself and in the store."""

from __future__ import annotations

import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import ConflictError, InvalidRequestError, TooManyError
from service.lifecycle import JobState
from service.queueing import HALF_LIFE_S, Load, Running, Waiting, decayed, expected_waits, start_order, to_preempt
from service.schemas import Job, UserBody
from service.store import Attempt, Store
from service.store.access import FIRST_USER
from workers.contract import JobSpec


@pytest.fixture(params=["sqlite", "postgres"])
def store_url(request: pytest.FixtureRequest, store_url: str) -> str:
    """The same tests on both."""
    return str(request.getfixturevalue("database")) if request.param == "postgres" else store_url


owners = st.sampled_from(["ann", "bob", "cy"])
queues = st.lists(st.tuples(owners, st.integers(-1, 1), st.integers(0, 50)), max_size=40)
shares = st.dictionaries(owners, st.builds(Load, st.sampled_from([0.5, 1.0, 3.0]), st.integers(0, 3)))


def waiting(jobs: list[tuple[str, int, int]]) -> list[Waiting]:
    return [Waiting(f"j{i:03}", owner, priority, at) for i, (owner, priority, at) in enumerate(jobs)]


@given(jobs=queues, loads=shares)
def test_every_job_has_one_place_by_priority_and_then_age_within_its_owner(
    jobs: list[tuple[str, int, int]], loads: dict[str, Load]
) -> None:
    order = start_order(waiting(jobs), loads)
    assert sorted(job.job_id for job in order) == sorted(job.job_id for job in waiting(jobs))
    assert [job.priority for job in order] == sorted((job.priority for job in order), reverse=True)
    for owner in ("ann", "bob", "cy"):
        for priority in (-1, 0, 1):
            mine = [(job.queued_at, job.job_id) for job in order if (job.owner, job.priority) == (owner, priority)]
            assert mine == sorted(mine)


@given(
    counts=st.lists(st.integers(1, 30), min_size=2, max_size=3),
    weights=st.lists(st.sampled_from([1, 2, 4]), min_size=3),
)
def test_while_all_wait_each_gets_by_share(counts: list[int], weights: list[int]) -> None:
    names = ["ann", "bob", "cy"][: len(counts)]
    jobs = [(name, 0, i) for name, count in zip(names, counts, strict=True) for i in range(count)]
    loads = {name: Load(share=float(weight)) for name, weight in zip(names, weights, strict=False)}
    order = [job.owner for job in start_order(waiting(jobs), loads)]
    left = Counter(order)
    seen: Counter[str] = Counter()
    for owner in order:
        seen[owner] += 1
        left[owner] -= 1
        if not all(left[name] for name in names):
            break
        turns = [seen[name] / loads[name].share for name in names]
        assert max(turns) - min(turns) <= max(1 / loads[name].share for name in names) + 1e-9


def test_whoever_used_less_lately_goes_first_and_use_is_forgotten() -> None:
    jobs = [Waiting("a", "ann", 0, 1.0), Waiting("b", "bob", 0, 2.0)]
    assert [job.job_id for job in start_order(jobs, {"ann": Load(usage_s=100), "bob": Load(usage_s=1)})] == ["b", "a"]
    assert decayed(100, HALF_LIFE_S) == 50 and decayed(100, -5) == 100


@given(
    priorities=st.lists(st.tuples(st.integers(-2, 2), st.floats(0, 100), st.booleans()), max_size=6),
    first=st.integers(-2, 2),
    slots=st.integers(1, 6),
)
def test_only_a_lower_one_that_had_its_time_makes_room(
    priorities: list[tuple[int, float, bool]], first: int, slots: int
) -> None:
    running = [Running(f"r{i}", p, since, pausable) for i, (p, since, pausable) in enumerate(priorities)]
    chosen = to_preempt(Waiting("w", "ann", first, 0.0), running, slots=slots, now=100.0, at_least_s=60.0)
    fit = [r for r in running if r.priority < first and r.pausable and r.since <= 40]
    if len(running) < slots or not fit:
        assert chosen is None
    else:
        found = next(r for r in fit if r.job_id == chosen)
        assert found.priority == min(r.priority for r in fit)
        assert found.since == max(r.since for r in fit if r.priority == found.priority)


def test_waits_follow_what_runs_and_how_long_jobs_take() -> None:
    running = [Running("a", 0, 0.0, True, eta_s=30.0), Running("b", 0, 0.0, True)]
    assert expected_waits(3, running, slots=2, typical_s=100.0) == [30.0, 100.0, 130.0]
    assert expected_waits(2, [], slots=1, typical_s=10.0) == [0.0, 10.0]


def submit(store: Store, owner: str = FIRST_USER, **spec: object) -> Job:
    return store.jobs.create(JobSpec.model_validate({"steps": 4, **spec}), owner=owner)[0]


def claim(store: Store, slots: int = 1) -> Attempt:
    attempt = store.queue.claim(slots)
    assert attempt is not None
    return attempt


def run(store: Store, attempt: Attempt) -> Attempt:
    store.attempts.mark_submitted(attempt)
    return store.attempts.absorb(attempt, [{"seq": 1, "type": "phase", "data": {"name": "running"}}], 1)


def end(store: Store, attempt: Attempt) -> None:
    store.attempts.finish(attempt, JobState.SUCCEEDED)
    store.attempts.settle(attempt)


def test_users_take_turns_and_priority_goes_before_all(store: Store) -> None:
    ann, bob = (store.access.make_user(UserBody(name=name, max_priority=5)).id for name in ("ann", "bob"))
    jobs = {submit(store, ann, name=f"a{i}").id: f"a{i}" for i in range(3)}
    jobs |= {submit(store, bob, name="b0").id: "b0", submit(store, bob, name="b1", priority=3).id: "b1"}
    assert [jobs[claim(store, 5).job_id] for _ in range(5)] == ["b1", "a0", "a1", "b0", "a2"]


def test_a_job_says_its_place_in_the_queue_and_when_it_may_start(store: Store) -> None:
    first, second = submit(store), submit(store)
    attempt = run(store, claim(store))
    third = submit(store, priority=1)
    standing = store.queue.standing(1)
    assert {job_id: place.position for job_id, place in standing.items()} == {third.id: 1, second.id: 2}
    assert store.jobs.get(second.id, standings=lambda: standing).queue_position == 2
    assert store.jobs.get(first.id, standings=lambda: standing).queue_position is None
    starts = [standing[job.id].start_at for job in (third, second)]
    assert starts == sorted(starts) and starts[0] > time.time()
    assert attempt.job_id == first.id


def test_quotas_bound_what_one_user_has_waiting_and_running(store: Store) -> None:
    ann = store.access.make_user(UserBody(name="ann", max_queued=2, max_running=1)).id
    submit(store, ann)
    submit(store, ann)
    with pytest.raises(TooManyError, match="as many as you may"):
        submit(store, ann)
    with pytest.raises(InvalidRequestError, match="priority of at most 0"):
        submit(store, ann, priority=1)
    claim(store, 5)
    assert store.queue.claim(5) is None, "a second one of hers does not run beside the first"
    other = submit(store)
    assert claim(store, 5).job_id == other.id
    store.access.change_user(ann, {"max_running": 2})
    assert claim(store, 5).spec.steps == 4


def test_a_job_too_large_for_the_cluster_waits_with_its_reason_and_lets_others_go(store: Store) -> None:
    large, small = submit(store, workers=9), submit(store, workers=1)
    fits = lambda workers: f"{workers} workers are too many" if workers > 2 else None  # noqa: E731
    attempt = store.queue.claim(1, fits)
    assert attempt and attempt.job_id == small.id
    end(store, attempt)
    assert store.queue.claim(1, fits) is None
    assert store.jobs.get(large.id).status_reason == "9 workers are too many"
    reasons = [event for event in store.records.events(large.id).data if event.level == "warning"]
    assert len(reasons) == 1, "said once, not at every look"


def test_a_job_that_waited_too_long_fails_and_says_for_what(store: Store) -> None:
    late, patient = submit(store, queue_timeout_s=0.01, workers=9), submit(store, workers=9)
    store.queue.claim(1, lambda workers: "the cluster has 2 CPU")
    time.sleep(0.02)
    assert store.queue.expire() == 1 and store.queue.expire() == 0
    error = store.jobs.get(late.id).error
    assert error and (error.code, error.fault, error.param) == ("queue_timeout", "capacity", "queue_timeout_s")
    assert "the cluster has 2 CPU" in error.message
    assert store.jobs.get(patient.id).status == "queued"


def test_a_higher_job_has_a_lower_one_paused_and_that_waits_again(store: Store) -> None:
    low = submit(store, priority=-1)
    attempt = run(store, claim(store))
    high = submit(store)
    assert store.queue.preempt(1, at_least_s=60.0) is None, "it has not had its time"
    assert store.queue.preempt(1, at_least_s=0.0) == low.id
    assert store.queue.preempt(1, at_least_s=0.0) is None, "once"
    assert store.jobs.get(low.id).status == "pausing"
    saved = {"name": "step-3", "path": "/c/step-3", "step": 3}
    attempt = store.attempts.absorb(
        attempt,
        [
            {"seq": 2, "type": "checkpoint.saved", "data": saved},
            {"seq": 3, "type": "outcome", "data": {"status": "paused"}},
        ],
        3,
    )
    assert store.jobs.get(low.id).status == "queued" and attempt.state == "ended"
    assert [c.name for c in store.records.checkpoints(low.id)] == ["step-3"]
    store.attempts.settle(attempt)
    second = claim(store)
    assert second.job_id == high.id
    end(store, second)
    again = claim(store)
    assert (again.job_id, again.n, bool(store.records.checkpoints(again.job_id))) == (low.id, 2, True)


def test_equal_priority_preempts_nobody(store: Store) -> None:
    submit(store)
    run(store, claim(store))
    submit(store)
    assert store.queue.preempt(1, at_least_s=0.0) is None


def test_pause_and_resume_keep_the_job_and_are_harmless_twice(store: Store) -> None:
    job = submit(store)
    assert store.actions.pause(job.id).status == "paused"
    assert store.actions.pause(job.id).status == "paused"
    assert store.queue.claim(1) is None
    assert store.actions.resume(job.id).status == "queued"
    assert store.actions.resume(job.id).status == "queued"
    attempt = claim(store)
    assert store.actions.pause(job.id).status == "pausing"
    assert store.attempts.open()[0].want == "stop", "nothing was done yet"
    store.attempts.finish(attempt, JobState.PAUSED)
    store.attempts.settle(attempt)
    store.actions.resume(job.id)
    attempt = run(store, claim(store))
    store.actions.pause(job.id)
    assert store.attempts.open()[0].want == "pause"
    assert store.actions.resume(job.id).status == "pausing", "it waits again as soon as it is paused"
    store.attempts.absorb(attempt, [{"seq": 9, "type": "outcome", "data": {"status": "paused"}}], 9)
    assert store.jobs.get(job.id).status == "queued"
    store.actions.cancel(job.id)
    for action in (store.actions.pause, store.actions.resume):
        with pytest.raises(ConflictError):
            action(job.id)


def test_a_retry_is_a_new_attempt_of_the_same_job(store: Store) -> None:
    job = submit(store)
    attempt = claim(store)
    with pytest.raises(ConflictError, match="only what failed or was cancelled"):
        store.actions.retry(job.id)
    error = {"code": "driver_died", "fault": "system", "message": "gone", "param": None}
    store.attempts.finish(attempt, JobState.FAILED, error=error)
    again = store.actions.retry(job.id)
    assert (again.status, again.error, again.finished_at, again.attempt) == ("queued", None, None, 1)
    store.attempts.settle(attempt)
    attempt = claim(store)
    assert (attempt.job_id, attempt.n, attempt.submission_id) == (job.id, 2, f"job-{job.id}-a2")
    end(store, attempt)
    with pytest.raises(ConflictError):
        store.actions.retry(job.id)


def test_a_retried_job_does_not_start_before_its_last_attempt_has_let_go(store: Store) -> None:
    job = submit(store)
    attempt = claim(store, 4)
    store.attempts.finish(attempt, JobState.FAILED)
    store.actions.retry(job.id)
    assert store.queue.claim(4) is None
    store.attempts.settle(attempt)
    assert claim(store, 4).n == 2


def test_what_an_attempt_used_is_charged_to_its_user(store: Store) -> None:
    ann = store.access.make_user(UserBody(name="ann")).id
    submit(store, ann, workers=3)
    attempt = claim(store)
    time.sleep(0.05)
    end(store, attempt)
    submit(store, ann, name="hers")
    mine = submit(store, name="mine")
    assert claim(store).job_id == mine.id, "whoever used nothing lately goes first"


def test_only_one_holds_a_lease_until_it_runs_out_or_is_given_back(store: Store) -> None:
    assert store.leases.hold("x", "a", 60) and store.leases.hold("x", "a", 0.2)
    assert not store.leases.hold("x", "b", 60)
    time.sleep(0.25)
    assert store.leases.hold("x", "b", 60) and not store.leases.hold("x", "a", 60)
    store.leases.release("x", "a")
    assert not store.leases.hold("x", "a", 60)
    store.leases.release("x", "b")
    assert store.leases.hold("x", "a", 60)
