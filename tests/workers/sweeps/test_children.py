"""Children of both kinds: the same key is the same child, through outages and lost drivers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scheduler.errors import SystemFault, UserError
from tests.waiting import until
from tests.workers.sweeps.fake_service import TOKEN, FakeService, served
from workers.contract import JobSpec, RunContext
from workers.events import EventLog
from workers.sweeps import direct, hosted
from workers.sweeps.children import Child, follow
from workers.sweeps.contract import SweepContext, SweepSpec
from workers.sweeps.direct import Direct
from workers.sweeps.hosted import Hosted
from workers.sweeps.outcome import figures_of

SPACE = {"seed": {"values": [1, 2]}}
LEDGER = {
    "rows": [{"name": "compute per step", "measured": 2.0}, {"name": "traffic per step", "measured": 0.5}],
    "accuracy": {"before": 0.1, "after": 0.8}, "phases": {"train": 9.0}, "steps": 10,
}  # fmt: skip


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeService]:
    monkeypatch.setattr(hosted, "FIRST_WAIT_S", 0.01)
    with served(FakeService(steps=3)) as service:
        yield service


def test_a_ledger_becomes_figures_of_the_whole_run() -> None:
    assert figures_of(LEDGER) == {"accuracy": 0.8, "gflop": 20.0, "mb": 5.0, "seconds": 9.0, "steps": 10}


def test_a_hosted_child_is_started_once_and_followed_to_its_end(service: FakeService) -> None:
    children, seen = Hosted(service.url, TOKEN), []
    first = children.start("t-000", {"seed": 1}, JobSpec(seed=1))
    assert children.start("t-000", {"seed": 1}, JobSpec(seed=1)) == first and len(service.jobs) == 1
    ended = follow(children, first, 0.001, seen.append)
    assert ended.status == "succeeded" and ended.figures and [child.step for child in seen] == [0, 1, 2, 3]
    assert service.jobs["t-000"]["spec"] == {"seed": 1}
    children.cancel("t-000")
    children.cancel("never-begun")
    assert service.jobs["t-000"]["status"] == "succeeded"
    children.cancel(children.start("t-001", {}, JobSpec(), baseline="full").key)
    assert [child.status for child in children.all()] == ["succeeded", "cancelled"]


def test_a_service_that_is_away_is_asked_again(service: FakeService) -> None:
    service.answers = [500, 503, 429, 408]
    assert Hosted(service.url, TOKEN).start("a", {}, JobSpec()).key == "a"


@pytest.mark.parametrize("status", [400, 413, 422])
def test_what_is_refused_is_the_users_error_with_the_services_words(service: FakeService, status: int) -> None:
    service.answers = [status]
    with pytest.raises(UserError, match="not now") as refused:
        Hosted(service.url, TOKEN).start("a", {}, JobSpec())
    assert refused.value.code == "told_so"


def test_an_attempt_that_owns_its_sweep_no_more_asks_no_longer(service: FakeService) -> None:
    with pytest.raises(SystemFault, match="whose token") as refused:
        Hosted(service.url, "another").start("a", {}, JobSpec())
    assert refused.value.code == "superseded" and len(service.log) == 1


def context_of(tmp_path: Path) -> SweepContext:
    spec = SweepSpec.model_validate({"space": SPACE})
    return SweepContext(
        sweep_id="s", spec=spec, run_dir=str(tmp_path / "run"), storage_path=str(tmp_path), use_gpu=False
    )


class Attempts:
    """In place of `attempt`: writes what a run would, and ends when it is let go."""

    def __init__(self) -> None:
        self.contexts: list[RunContext] = []
        self.open = True
        self.error: UserError | None = None

    def __call__(self, context: RunContext) -> UserError | None:
        goes_on = self.open
        self.contexts.append(context)
        with EventLog(context.run_dir) as log:
            log.emit("metrics", step=1, total_steps=2, loss=0.5)
            log.emit("evaluation", when="before", accuracy=0.1)
            log.emit("evaluation", when="at step 1", accuracy=0.6)
            if goes_on and not self.error:
                log.emit("ledger", **LEDGER)
        if not goes_on:
            threading.Event().wait()  # as in a process that is killed: it never tells an outcome
        return self.error


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> Attempts:
    attempts = Attempts()
    monkeypatch.setattr(direct, "attempt", attempts)
    return attempts


def test_a_direct_child_is_a_run_of_its_own_and_known_from_its_events(tmp_path: Path, attempts: Attempts) -> None:
    children = Direct(context_of(tmp_path))
    ended = follow(children, children.start("full", {}, JobSpec(seed=4), baseline="full"), 0.01)
    assert (ended.status, ended.accuracy, ended.loss, ended.step) == ("succeeded", 0.6, 0.5, 1)
    assert ended.figures == figures_of(LEDGER) and ended.baseline == "full" and ended.job_id == "s-full"
    (context,) = attempts.contexts
    assert context.spec.seed == 4 and context.run_dir == str(tmp_path / "run" / "trials" / "full")
    assert Direct(context_of(tmp_path)).start("full", {}, JobSpec()) == ended and len(attempts.contexts) == 1
    attempts.error = UserError("bad weights", code="weights_mismatch")
    failed = follow(children, children.start("t-000", {"seed": 1}, JobSpec()), 0.01)
    assert failed.status == "failed" and failed.error and failed.error["code"] == "weights_mismatch"
    assert [child.key for child in Direct(context_of(tmp_path)).all()] == ["full", "t-000"]


def test_a_direct_child_that_was_cut_off_goes_on_from_its_checkpoint_as_another_attempt(
    tmp_path: Path, attempts: Attempts
) -> None:
    attempts.open = False
    assert Direct(context_of(tmp_path)).start("t-000", {"seed": 1}, JobSpec()).status == "running"
    until(lambda: attempts.contexts)
    (Path(attempts.contexts[0].vault_dir) / "step-00000001").mkdir(parents=True)
    attempts.open = True
    later = Direct(context_of(tmp_path))
    ended = follow(later, later.start("t-000", {"seed": 1}, JobSpec()), 0.01)
    assert ended.status == "succeeded" and [context.attempt for context in attempts.contexts] == [1, 2]
    assert attempts.contexts[1].resume_from == attempts.contexts[1].vault_dir and not attempts.contexts[0].resume_from


def test_a_direct_child_that_is_stopped_leaves_nothing_half_made(tmp_path: Path, attempts: Attempts) -> None:
    attempts.open = False
    there = Direct(context_of(tmp_path))
    there.start("t-000", {"seed": 1}, JobSpec())
    until(lambda: attempts.contexts)
    vault = Path(attempts.contexts[0].vault_dir) / "step-00000001"
    vault.mkdir(parents=True)
    driver = Direct(context_of(tmp_path))
    driver.cancel("t-000")
    assert driver.look("t-000").status == "stopped" and not vault.exists()
    driver.cancel("t-000")
    driver.cancel("never-begun")
    assert Direct(context_of(tmp_path)).start("t-000", {}, JobSpec()).status == "stopped"


def test_a_child_is_read_from_an_answer_that_says_more() -> None:
    told: dict[str, Any] = {"key": "a", "status": "running", "step": 1, "since": "yesterday"}
    assert Child.from_dict(told) == Child("a", status="running", step=1)
