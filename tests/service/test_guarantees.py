"""Jobs and sweeps under any order of what users ask, drivers do and machines suffer: what must be true always is.

A real SQLite store, a fake Ray, and a supervisor that is a new one at every look, as after a restart. At the end all
drivers do well, and every job must come to an end.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from scheduler import failpoints
from service.errors import ConflictError, LostAttemptError, NotFoundError
from service.lifecycle import SWEEP, SWEEP_PREFIX, JobState
from service.settings import Settings
from service.store import Attempt, Place, Store
from service.store.access import FIRST_USER
from tests.chaos.checker import History, check, read_jobs, runs_of, told
from tests.service.bench import Bench
from tests.service.conftest import FakeRay
from workers.contract import JobSpec
from workers.sweeps.contract import SweepSpec

MAX_FAULTS = 2
PLACES = sorted(name for name in failpoints.NAMES if name.startswith(("store.", "supervisor.")))
SYSTEM = {"code": "group_lost", "fault": "system", "message": "a worker is gone", "param": None}
ENDS: dict[str, dict[str, Any]] = {
    "succeeded": {"status": "succeeded", "error": None},
    "user fault": {"status": "failed", "error": {**SYSTEM, "code": "bad_image", "fault": "user"}},
    "system fault": {"status": "failed", "error": SYSTEM},
    "final code": {"status": "failed", "error": {**SYSTEM, "code": "not_finite"}},
    "paused": {"status": "paused", "error": None, "why": "pause"},
    "drained": {"status": "paused", "error": None, "why": "drain"},
}
picks = st.integers(0, 10**6)


class Guarantees(RuleBasedStateMachine):
    """Every rule is one thing that happens; which job or driver it happens to is picked by a number."""

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(prefix="d2ft-guarantees-"))
        self.url = f"sqlite:///{self.home / 'd2ft.db'}"
        self.ray = FakeRay()
        settings = Settings(home=self.home, use_gpu=False, max_running=2, preempt_after_s=0.0)
        self.bench = Bench(settings, Store(self.url, max_faults=MAX_FAULTS), self.ray)
        self.accepted: dict[str, str] = {}
        self.step = 0

    @property
    def running(self) -> list[str]:
        return [key for key, job in self.ray.jobs.items() if job["status"] == "RUNNING"]

    @property
    def driven(self) -> list[Attempt]:
        return [attempt for attempt in self.bench.store.attempts.open() if attempt.kind == SWEEP]

    @rule(priority=st.integers(-1, 0))
    def submit(self, priority: int) -> None:
        key = f"k{len(self.accepted)}"
        self.accepted[key] = self.bench.submit(steps=9, name=key, priority=priority)

    @rule()
    def submit_sweep(self) -> None:
        key = f"k{len(self.accepted)}"
        spec = SweepSpec.model_validate({"name": key, "job": {"steps": 9}, "space": {"seed": {"values": [1, 2]}}})
        self.accepted[key] = self.bench.store.sweeps.create(spec, owner=FIRST_USER)[0].id

    @precondition(lambda self: self.driven)
    @rule(pick=picks)
    def add_trial(self, pick: int) -> None:
        """What a driver asks that may have been lost, cancelled or told to end since."""
        attempt, key = self.driven[pick % len(self.driven)], f"k{len(self.accepted)}"
        with suppress(ConflictError, LostAttemptError):
            place, spec = Place(attempt.job_id, key, {}), JobSpec(steps=9, name=key)
            self.accepted[key] = self.bench.store.sweeps.add_trial(attempt, place, spec).job_id

    @rule(count=st.integers(1, 2))
    def look(self, count: int) -> None:
        self.bench.looks(count)

    @rule(name=st.sampled_from(PLACES), action=st.sampled_from(["error", "error_after_ok", "enospc"]))
    def look_that_fails(self, name: str, action: str) -> None:
        with failing(f"{name}:{action}"):
            self.bench.looks()

    @rule()
    def restart_api(self) -> None:
        self.bench.store.close()
        self.bench.store = Store(self.url, max_faults=MAX_FAULTS)

    @rule()
    def restart_ray(self) -> None:
        self.ray.restart()

    @rule()
    def ray_is_down_for_a_look(self) -> None:
        self.ray.down = True
        self.bench.looks()
        self.ray.down = False

    @rule()
    def reply_is_lost(self) -> None:
        self.ray.lose_reply = True

    @precondition(lambda self: self.running)
    @rule(pick=picks, name=st.sampled_from(["planning", "starting", "running", "finalizing", "recovering"]))
    def phase(self, pick: int, name: str) -> None:
        self._say(pick, "phase", name=name)

    @precondition(lambda self: self.running)
    @rule(pick=picks)
    def train(self, pick: int) -> None:
        self.step += 1
        self._say(pick, "metrics", step=self.step, total_steps=10**6)

    @precondition(lambda self: self.running)
    @rule(pick=picks, end=st.sampled_from(sorted(ENDS)), goes=st.booleans())
    def last_word(self, pick: int, end: str, goes: bool) -> None:
        key = self._say(pick, "outcome", **ENDS[end])
        if goes:
            self.ray.set_status(key, "SUCCEEDED" if end != "user fault" else "FAILED")

    @precondition(lambda self: self.running)
    @rule(pick=picks)
    def die(self, pick: int) -> None:
        self.ray.set_status(self._picked(pick), "FAILED", "exit code 9")

    @precondition(lambda self: self.accepted)
    @rule(pick=picks, action=st.sampled_from(["cancel", "pause", "resume", "retry"]))
    def ask(self, pick: int, action: str) -> None:
        job_id = list(self.accepted.values())[pick % len(self.accepted)]
        before = self._state(job_id)
        of_sweeps = job_id.startswith(SWEEP_PREFIX) and action in ("cancel", "retry")
        try:
            getattr(self.bench.store.sweeps if of_sweeps else self.bench.store.actions, action)(job_id)
        except (ConflictError, NotFoundError):
            assert self._state(job_id) == before

    @invariant()
    def what_must_be_true_is(self) -> None:
        jobs = read_jobs(self.url)
        findings = check(History(jobs, self.accepted, runs=runs_of(self.ray)))
        findings["lost"] = [found for found in findings["lost"] if "is left" not in found]  # they go on
        assert not any(findings.values()), list(told(findings))
        holders = Counter(key.rpartition("-a")[0] for key in self.running)
        assert all(count == 1 for count in holders.values()), "two drivers of one job"

    @invariant()
    def losses_stay_within_what_is_borne(self) -> None:
        for job_id in self.accepted.values():
            borne = 0
            for event in self.bench.history(job_id):
                if event.type == "attempt.lost":
                    borne = event.data["faults"]
                    spent = event.data["next"] == "failed"
                    assert (borne <= MAX_FAULTS + 1 and spent == (borne > MAX_FAULTS)) or event.data["next"] == "paused"

    def teardown(self) -> None:
        self._all_do_well()
        self.what_must_be_true_is()
        states = {self._state(job_id) for job_id in self.accepted.values()}
        assert all(state.is_final for state in states), f"something is left {states}"
        assert self.bench.store.attempts.open() == []
        self.bench.store.close()
        shutil.rmtree(self.home)

    def _all_do_well(self) -> None:
        for _ in range(4 * len(self.accepted) + 8):
            for job_id in self.accepted.values():
                if self._state(job_id) is JobState.PAUSED:
                    self.bench.store.actions.resume(job_id)
            self.bench.looks(2)
            for key in self.running:
                self._say_as(key, "outcome", **ENDS["succeeded"])
                self.ray.set_status(key, "SUCCEEDED")

    def _state(self, job_id: str) -> JobState:
        return self.bench.store.records.stand(job_id)[0]

    def _picked(self, pick: int) -> str:
        return self.running[pick % len(self.running)]

    def _say(self, pick: int, type: str, **data: Any) -> str:
        key = self._picked(pick)
        self._say_as(key, type, **data)
        return key

    def _say_as(self, key: str, type: str, **data: Any) -> None:
        job_id, _, n = key.removeprefix("job-").rpartition("-a")
        self.bench.lines(job_id, int(n), (type, data))


@contextmanager
def failing(told: str) -> Iterator[None]:
    """A failpoint that strikes once within the block."""
    failpoints._seen.clear()
    os.environ[failpoints.VARIABLE] = told
    try:
        yield
    finally:
        del os.environ[failpoints.VARIABLE]


TestGuarantees = Guarantees.TestCase
TestGuarantees.settings = hypothesis_settings(max_examples=10, stateful_step_count=20, deadline=None)
