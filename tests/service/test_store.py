"""The contract of the store: nothing lost, nothing twice, no write by one who has lost the job."""

from __future__ import annotations

import dataclasses
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sqlalchemy import create_engine

from service.errors import ConflictError, InvalidRequestError, Issue, LostAttemptError, NotFoundError
from service.lifecycle import HOLDING, JobState, may_move
from service.schemas import RunPlace, UserBody
from service.store import Attempt, JobQuery, Store
from service.store.access import FIRST_USER
from service.tables import Base
from workers.contract import JobSpec


@pytest.fixture(params=["sqlite", "postgres"])
def store_url(request: pytest.FixtureRequest, store_url: str) -> str:
    """The same tests on both."""
    return str(request.getfixturevalue("database")) if request.param == "postgres" else store_url


def line(seq: int, type: str, message: str = "", **data: object) -> dict[str, object]:
    return {"seq": seq, "at": 1.0, "type": type, "level": "info", "message": message, "data": data}


def test_the_migrations_make_the_tables_that_the_code_maps(store: Store, store_url: str) -> None:
    engine = create_engine(store_url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    engine.dispose()


def test_a_store_opens_again_with_what_it_held(store: Store, store_url: str, spec: JobSpec) -> None:
    job, _ = store.jobs.create(spec, owner=FIRST_USER)
    again = Store(store_url)
    assert again.jobs.get(job.id) == job
    again.close()


def test_a_new_job_is_queued_and_its_history_says_so(store: Store, spec: JobSpec) -> None:
    job, fresh = store.jobs.create(spec, owner=FIRST_USER)
    assert fresh and job.status == "queued" and job.id.startswith("ftjob_")
    history = store.records.events(job.id).data
    assert [event.seq for event in history] == [1, 2]
    assert history[-1].data == {"from": "validating", "to": "queued"}


def test_one_key_makes_one_job(store: Store, spec: JobSpec) -> None:
    first, _ = store.jobs.create(spec, owner=FIRST_USER, idempotency_key="a")
    second, fresh = store.jobs.create(spec, owner=FIRST_USER, idempotency_key="a")
    assert second.id == first.id and not fresh
    assert second == first, "the first answer again, word for word"
    someone = store.access.make_user(UserBody(name="someone")).id
    other, fresh = store.jobs.create(spec, owner=someone, idempotency_key="a")
    assert fresh and other.id != first.id


def test_a_replay_is_the_first_answer_whatever_became_of_the_job(store: Store, spec: JobSpec) -> None:
    first, _ = store.jobs.create(spec, owner=FIRST_USER, idempotency_key="a")
    store.actions.cancel(first.id)
    assert store.jobs.create(spec, owner=FIRST_USER, idempotency_key="a") == (first, False)
    assert store.jobs.replay(spec, owner=FIRST_USER, idempotency_key="a") == first


def test_a_key_may_be_used_anew_after_a_day(store: Store, spec: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = store.jobs.create(spec, owner=FIRST_USER, idempotency_key="a")
    monkeypatch.setattr("service.store.admission.IDEMPOTENCY_S", 0.0)
    assert store.jobs.replay(spec, owner=FIRST_USER, idempotency_key="a") is None
    second, fresh = store.jobs.create(spec, owner=FIRST_USER, idempotency_key="a")
    assert fresh and second.id != first.id


def test_one_key_with_another_body_is_refused(store: Store, spec: JobSpec) -> None:
    store.jobs.create(spec, owner=FIRST_USER, idempotency_key="a")
    with pytest.raises(InvalidRequestError, match="another body"):
        store.jobs.create(spec.model_copy(update={"seed": 1}), owner=FIRST_USER, idempotency_key="a")


def test_one_key_from_many_threads_makes_one_job(store: Store, spec: JobSpec) -> None:
    made: list[str] = []

    def create() -> None:
        made.append(store.jobs.create(spec, owner=FIRST_USER, idempotency_key="same")[0].id)

    threads = [threading.Thread(target=create) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 12 and len(set(made)) == 1


def test_pages_cover_all_jobs_once_while_more_arrive(store: Store, spec: JobSpec) -> None:
    ids = [store.jobs.create(spec, owner=FIRST_USER)[0].id for _ in range(7)]
    seen: list[str] = []
    query = JobQuery(limit=3)
    while True:
        page = store.jobs.list(query)
        seen += [job.id for job in page.data]
        store.jobs.create(spec, owner=FIRST_USER)
        if not page.has_more:
            break
        query = dataclasses.replace(query, after=page.last_id)
    assert seen == ids[::-1]
    assert [job.id for job in store.jobs.list(JobQuery(order="asc", limit=2)).data] == ids[:2]
    assert store.jobs.list(JobQuery(status=("running",))).data == []


def test_a_cursor_of_no_job_is_not_found(store: Store) -> None:
    with pytest.raises(NotFoundError):
        store.jobs.list(JobQuery(after="ftjob_none"))


def test_the_oldest_job_is_claimed_and_no_more_than_there_is_room_for(store: Store, spec: JobSpec) -> None:
    first = store.jobs.create(spec, owner=FIRST_USER)[0]
    second = store.jobs.create(spec, owner=FIRST_USER)[0]
    attempt = store.queue.claim(max_running=1)
    assert attempt and attempt.job_id == first.id and attempt.submission_id == f"job-{first.id}-a1"
    assert store.queue.claim(max_running=1) is None and not store.queue.may_claim(1)
    store.attempts.finish(
        attempt, JobState.FAILED, error={"code": "x", "fault": "system", "message": "m", "param": None}
    )
    assert store.queue.claim(max_running=1) is None  # its devices may still be held
    store.attempts.settle(attempt)
    again = store.queue.claim(max_running=1)
    assert again and again.job_id == second.id


def test_events_are_taken_over_once_however_often_they_are_read(store: Store, spec: JobSpec) -> None:
    job = store.jobs.create(spec, owner=FIRST_USER)[0]
    attempt = store.queue.claim(1)
    assert attempt
    lines = [line(1, "phase", name="running"), line(2, "metrics", step=1, total_steps=4, step_seconds=0.5)]
    store.attempts.absorb(attempt, lines, 100)
    store.attempts.absorb(attempt, [*lines, line(3, "metrics", step=2, total_steps=4, compute_fraction=0.5)], 150)
    found = store.jobs.get(job.id)
    assert found.status == "running" and found.progress.step == 2 and found.progress.fraction == 0.5
    assert found.progress.eta_seconds == 1.0
    assert found.usage.compute_fraction == 0.5 and found.usage.device_seconds == 1.0
    assert [event.type for event in store.records.events(job.id, after=3).data] == ["job.status", "metrics", "metrics"]
    assert store.records.metrics(job.id, max_points=10).total == 2
    assert store.attempts.open()[0].events_offset == 150


def test_an_outcome_ends_the_job_and_its_attempt(store: Store, spec: JobSpec) -> None:
    job = store.jobs.create(spec, owner=FIRST_USER)[0]
    attempt = store.queue.claim(1)
    assert attempt
    error = {"code": "nan_loss", "fault": "user", "message": "the loss is NaN", "param": None}
    store.attempts.absorb(attempt, [line(1, "outcome", status="failed", error=error), line(2, "metrics", step=9)], 9)
    found = store.jobs.get(job.id)
    assert found.status == "failed" and found.error and found.error.code == "nan_loss"
    assert store.records.events(job.id).data[-1].data["to"] == "failed"  # nothing after the end
    with pytest.raises(LostAttemptError):
        store.attempts.absorb(attempt, [line(3, "metrics", step=3)], 20)


def test_a_writer_with_another_token_stands_down(store: Store, spec: JobSpec) -> None:
    store.jobs.create(spec, owner=FIRST_USER)
    attempt = store.queue.claim(1)
    assert attempt
    stale = dataclasses.replace(attempt, token="of another time")
    for write in (
        lambda: store.attempts.absorb(stale, [line(1, "phase", name="running")], 1),
        lambda: store.attempts.mark_submitted(stale),
        lambda: store.attempts.finish(stale, JobState.SUCCEEDED),
    ):
        with pytest.raises(LostAttemptError):
            write()
    assert store.jobs.get(attempt.job_id).status == "planning"


def test_of_timelines_the_newest_is_kept_and_the_history_says_which_steps(store: Store, spec: JobSpec) -> None:
    job = store.jobs.create(spec, owner=FIRST_USER)[0]
    attempt = store.queue.claim(1)
    assert attempt
    rows = [[0, 40, "fwd", 0, "attn", 0], [40, 60, "update", -1, "", -1]]
    chart = {"fields": ["begin_us", "…"], "step_us": 60, "workers": [rows, []]}
    first, second = ({**chart, "step": step, "window": window} for step, window in ((3, 1), (53, 2)))
    spoilt = [{**chart, "step": 60}, {**second, "workers": [[[0, 1, "x" * 99, 0, "", 0]]]}, {"step": "x"}]
    with pytest.raises(NotFoundError, match="no plan yet"):
        store.records.timeline(job.id)
    lines = [line(1, "plan.created", version=1, gantt=chart), line(2, "timeline", **first)]
    store.attempts.absorb(attempt, lines, 20)
    assert store.records.timeline(job.id) == (chart, first)
    lines = [line(n, "timeline", **data) for n, data in enumerate([second, *spoilt], 3)]
    store.attempts.absorb(attempt, [*lines, line(9, "plan.changed", version=2, gantt=None)], 90)
    assert store.records.timeline(job.id) == (None, second)
    seen = [event.data for event in store.records.events(job.id).data if event.type == "timeline"]
    assert seen[:2] == [{"step": 3, "window": 1, "step_us": 60}, {"step": 53, "window": 2, "step_us": 60}]
    assert len(seen) == 5 and all(set(data) == {"step", "window", "step_us"} for data in seen)


def test_a_changed_plan_says_what_changed_and_a_window_how_good_its_forecast_was(store: Store, spec: JobSpec) -> None:
    job = store.jobs.create(spec, owner=FIRST_USER)[0]
    attempt = store.queue.claim(1)
    assert attempt
    change = {"migrated": True, "moved_heads": 4, "reason": "slower", "before": {"step_us": 9}, "after": {"step_us": 7}}
    plan = {"version": 2, "window": 3, "cycle": ["big"], "forecast": {"step_us": 7}, "devices": [{"name": "gpu-0"}]}
    window = {"window": 2, "steps": 100, "step_seconds_median": 0.5, "forecast_seconds": 0.4, "error": 0.25}
    lines = [line(1, "window", **window), line(2, "plan.changed", **plan, change=change)]
    assert store.jobs.plans_in_use() == {}
    store.attempts.absorb(attempt, lines, 50)
    seen = {event.type: event.data for event in store.records.events(job.id).data}
    assert seen["window"] == window
    assert seen["plan.changed"]["change"] == change and "cycle" not in seen["plan.changed"]
    assert store.records.plan(job.id)["cycle"] == ["big"] and list(store.jobs.plans_in_use()) == [job.id]
    store.attempts.finish(attempt, JobState.SUCCEEDED)
    assert store.jobs.plans_in_use() == {}


def test_documents_and_artifacts_are_kept_apart_from_history(store: Store, spec: JobSpec) -> None:
    job = store.jobs.create(spec, owner=FIRST_USER)[0]
    with pytest.raises(NotFoundError, match="no plan yet"):
        store.records.plan(job.id)
    attempt = store.queue.claim(1)
    assert attempt
    plan = {"version": 3, "window": 1, "cycle": ["big"], "forecast": {"step_us": 2_000_000}, "compute_fraction": 0.6}
    store.attempts.absorb(
        attempt,
        [
            line(1, "plan.created", **plan),
            line(2, "ledger", rows=[]),
            line(3, "artifact.ready", name="a/b.bin", path="/x", bytes=5, sha256="00"),
        ],
        1,
    )
    assert store.records.plan(job.id) == plan and store.records.ledger(job.id) == {"rows": []}
    assert [artifact.name for artifact in store.records.artifacts(job.id)] == ["a/b.bin"]
    event = next(event for event in store.records.events(job.id).data if event.type == "plan.created")
    assert "cycle" not in event.data and event.data["step_seconds"] == 2.0


@pytest.mark.parametrize("total", [1, 7, 20, 21, 45])
def test_metrics_are_thinned_and_the_newest_is_kept(store: Store, spec: JobSpec, total: int) -> None:
    job = store.jobs.create(spec, owner=FIRST_USER)[0]
    attempt = store.queue.claim(1)
    assert attempt
    store.attempts.absorb(attempt, [line(i, "metrics", step=i) for i in range(1, total + 1)], 1)
    page = store.records.metrics(job.id, max_points=20)
    steps = [row["step"] for row in page.data]
    assert page.total == total and len(steps) <= 20 and steps[-1] == total and steps == sorted(steps)


def test_cancel_is_at_once_while_waiting_and_harmless_twice(store: Store, spec: JobSpec) -> None:
    waiting = store.jobs.create(spec, owner=FIRST_USER)[0]
    assert store.actions.cancel(waiting.id).status == "cancelled"
    assert store.actions.cancel(waiting.id).status == "cancelled"
    running = store.jobs.create(spec, owner=FIRST_USER)[0]
    attempt = store.queue.claim(1)
    assert attempt
    assert store.actions.cancel(running.id).status == "cancelling"
    assert store.actions.cancel(running.id).status == "cancelling"
    store.attempts.finish(attempt, JobState.CANCELLED)
    done = store.jobs.create(spec, owner=FIRST_USER)[0]
    store.attempts.settle(attempt)
    attempt = store.queue.claim(1)
    assert attempt
    store.attempts.finish(attempt, JobState.SUCCEEDED)
    with pytest.raises(ConflictError):
        store.actions.cancel(done.id)


def test_a_failure_of_a_run_that_is_being_cancelled_is_the_cancel(store: Store, spec: JobSpec) -> None:
    job = store.jobs.create(spec, owner=FIRST_USER)[0]
    attempt = store.queue.claim(1)
    assert attempt
    store.actions.cancel(job.id)
    store.attempts.absorb(attempt, [line(1, "outcome", status="failed", error={"code": "stopped"})], 1)
    assert store.jobs.get(job.id).status == "cancelling"


def test_keys_are_known_by_their_hash_alone(store: Store, home: Path) -> None:
    store.access.ensure("d2ft_secret", "first")
    store.access.ensure("d2ft_secret", "first")
    assert store.access.caller("d2ft_secret") and store.access.caller("d2ft_other") is None
    held = b"".join(path.read_bytes() for path in home.glob("d2ft.db*"))
    assert b"d2ft_secret" not in held


def test_commits_ring_for_the_jobs_they_touched(store: Store, spec: JobSpec) -> None:
    rung: list[str] = []
    store.on_change(rung.append)
    job = store.jobs.create(spec, owner=FIRST_USER)[0]
    store.jobs.get(job.id)
    assert rung == [job.id]


def test_every_error_pickles() -> None:
    for error in (InvalidRequestError([Issue("a", "b", "c")]), NotFoundError("x", code="y"), LostAttemptError("z")):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error) and again.to_dict() == error.to_dict()


class StoreMachine(RuleBasedStateMachine):
    """One job under any order of what the supervisor, its driver and the user do."""

    def __init__(self) -> None:
        super().__init__()
        self.store = Store("sqlite://")
        self.job_id = self.store.jobs.create(JobSpec(steps=3), owner=FIRST_USER)[0].id
        self.seq = 0
        self.ended: str | None = None

    @property
    def attempt(self):  # type: ignore[no-untyped-def]
        return next(iter(self.store.attempts.open()), None)

    @rule()
    def claim(self) -> None:
        self.store.queue.claim(1)

    @precondition(lambda self: self.attempt is not None)
    @rule(name=st.sampled_from(["planning", "starting", "running", "finalizing", "recovering"]), replay=st.booleans())
    def phase(self, name: str, replay: bool) -> None:
        self.seq += 0 if replay and self.seq else 1
        self._write([line(self.seq, "phase", name=name)])

    @precondition(lambda self: self.attempt is not None)
    @rule(status=st.sampled_from(["succeeded", "failed"]))
    def outcome(self, status: str) -> None:
        self.seq += 1
        self._write([line(self.seq, "outcome", status=status)])

    @rule()
    def cancel(self) -> None:
        try:
            self.store.actions.cancel(self.job_id)
        except ConflictError:
            assert self.store.jobs.get(self.job_id).status in ("succeeded", "failed")

    @rule(action=st.sampled_from(["pause", "resume", "retry"]))
    def ask(self, action: str) -> None:
        before = self.store.jobs.get(self.job_id).status
        try:
            after = getattr(self.store.actions, action)(self.job_id).status
        except ConflictError:
            assert self.store.jobs.get(self.job_id).status == before
            return
        assert before not in ("succeeded", "cancelling"), "what is over, or nearly, is left alone"
        if action == "retry":
            assert before in ("failed", "cancelled") and after == "queued"
            self.ended = None

    @precondition(lambda self: self.attempt is not None)
    @rule()
    def the_run_pauses(self) -> None:
        self.seq += 1
        self._write([line(self.seq, "checkpoint.saved", name=f"step-{self.seq}", path="/x", step=self.seq)])
        self.seq += 1
        self._write([line(self.seq, "outcome", status="paused")])

    @rule()
    def preempt(self) -> None:
        self.store.queue.preempt(1, 0.0)

    @precondition(lambda self: self.attempt is not None and self.attempt.state == "ended")
    @rule()
    def settle(self) -> None:
        self.store.attempts.settle(self.attempt)

    @invariant()
    def history_is_whole_and_legal(self) -> None:
        events = self.store.records.events(self.job_id).data
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        moves = [(event.data["from"], event.data["to"]) for event in events if event.type == "job.status"]
        state = "validating"
        for old, new in moves:
            retried = old in ("failed", "cancelled") and new == "queued"
            assert old == state and (may_move(JobState(old), JobState(new)) or retried)
            state = new
        job = self.store.jobs.get(self.job_id)
        assert job.status == state
        open_attempts = self.store.attempts.open()
        assert len(open_attempts) <= 1, "two attempts of one job"
        working = state in HOLDING
        assert working == any(attempt.state in ("created", "submitted") for attempt in open_attempts)
        assert self.ended in (None, state), "an end was left"
        self.ended = state if job.is_final else None

    def _write(self, lines: list[dict[str, object]]) -> None:
        try:
            self.store.attempts.absorb(self.attempt, lines, self.seq)
        except LostAttemptError:
            assert self.attempt.state == "ended"

    def teardown(self) -> None:
        self.store.close()


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = hypothesis_settings(max_examples=25, stateful_step_count=15, deadline=None)


def test_runs_outside_begin_once_and_end_in_silence(store: Store) -> None:
    """The same key at the same time on many threads is one run; of two that are silent one speaks in time."""

    def begin(key: str) -> Attempt:
        return store.outside.begin(JobSpec(), RunPlace(run_dir="/o"), owner=FIRST_USER, idempotency_key=key)[0]

    with ThreadPoolExecutor(4) as pool:
        begun = {attempt.job_id for attempt in pool.map(begin, ["same"] * 8)}
    assert len(begun) == 1
    first, second = begin("same"), begin("other")
    now = time.time()
    time.sleep(0.01)
    store.outside.hear(second)
    assert store.outside.end_silent(now) == [first.job_id] and store.outside.end_silent(now) == []
    assert store.attempts.by_token(first.token) is None and store.attempts.by_token(second.token)
    assert store.queue.claim(5) is None and store.attempts.open() == []
