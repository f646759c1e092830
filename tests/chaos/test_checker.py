"""The checker finds what it is for: histories that are right, and one that breaks each rule."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from service.lifecycle import JobState
from tests.chaos.checker import RULES, Attempt, History, Job, Line, Listed, Run, check, counts, told
from tests.service import fake_driver
from workers.contract import JobSpec, RunContext
from workers.events import EventLog

WAY = ("validating", "queued", "planning", "starting", "running", "finalizing", "succeeded")
LOST = ("validating", "queued", "planning", "starting", "running", "recovering", *WAY[1:])


def lines(*states: str) -> list[Line]:
    moves = itertools.pairwise(states)
    return [Line(i, "job.status", {"from": old, "to": new}) for i, (old, new) in enumerate(moves, 1)]


def job(key: str, states: Sequence[str] = WAY, attempts: int = 1) -> Job:
    tries = [Attempt(n, began=10.0 * n, ended=10.0 * n + 5) for n in range(1, attempts + 1)]
    return Job(f"id-{key}", key, JobState(states[-1]), lines(*states), tries)


def runs(of: Job) -> list[Run]:
    return [Run(of.id, attempt.n, attempt.began + 1, attempt.ended) for attempt in of.attempts]


@pytest.fixture
def right() -> History:
    """A job that went through, one that lost an attempt, one that waits, and one of which its sender never heard."""
    jobs = [job("a"), job("b", LOST, attempts=2), job("c", WAY[:2], attempts=0), job("d")]
    accepted = {each.key: each.id for each in jobs[:3]}
    return History(jobs, accepted, frozenset({"d", "e"}), [run for each in jobs for run in runs(each)])


def test_nothing_is_found_where_nothing_is_wrong(right: History) -> None:
    assert counts(check(right)) == dict.fromkeys(RULES, 0) and list(told(check(right))) == []


def broken(right: History) -> dict[str, tuple[str, str, History]]:
    a, b, *others = right.jobs
    again = Line(len(a.lines) + 1, "job.status", {"from": "failed", "to": "succeeded"})
    put, skip = partial(with_job, right), ("validating", "queued", "running", "failed")
    open_one, gone = [Attempt(1, 10, None, "submitted")], [Listed(3, "/none/x", None)]
    early = replace(b, attempts=[b.attempts[0], replace(b.attempts[1], began=b.attempts[0].began)])
    return {
        "missing": ("lost", "missing: id-a", replace(right, jobs=[b, *others])),
        "left running": ("lost", "left running", replace(right, jobs=[job("a", WAY[:5]), b, *others])),
        "doubled": ("doubled", "doubled: 2 of a", replace(right, jobs=[*right.jobs, replace(a, id="id-x")])),
        "unknown doubled": ("doubled", "2 of d", replace(right, jobs=[*right.jobs, replace(job("d"), id="id-y")])),
        "extra": ("doubled", "extra: 1 of z", replace(right, jobs=[*right.jobs, job("z")])),
        "two successes": ("run twice", "succeeded 2 times", put(replace(a, lines=[*a.lines, again]))),
        "opened early": ("run twice", "opened before 1 had ended", put(early)),
        "an attempt missing": ("run twice", "has the attempts [2]", put(replace(b, attempts=b.attempts[1:]))),
        "ran at once": ("run twice", "while a1 ran", replace(right, runs=[Run(b.id, 1, 1, None), Run(b.id, 2, 2, 3)])),
        "started twice": ("run twice", "started 2 times", replace(right, runs=[*right.runs, Run(a.id, 1, 99, 100)])),
        "ran unknown": ("run twice", "does not know", replace(right, runs=[Run(a.id, 7, 1, 2)])),
        "gap": ("illegal", "has the number 3", put(replace(a, lines=[a.lines[0], *a.lines[2:]]))),
        "no such move": ("illegal", "from queued to running", put(job("a", skip))),
        "other end": ("illegal", "its history ends succeeded", put(replace(a, state=JobState.FAILED))),
        "goes on": ("illegal", "attempt 1 goes on", put(replace(a, attempts=open_one))),
        "checkpoint gone": ("damaged", "No such file", put(replace(a, checkpoints=gone))),
    }  # fmt: skip


def with_job(history: History, changed: Job) -> History:
    return replace(history, jobs=[changed if job.id == changed.id else job for job in history.jobs])


NAMES = sorted(broken(History([job("a"), job("b", LOST, 2), job("c", WAY[:2], 0), job("d")], {})))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_broken_is_found_and_said(right: History, name: str) -> None:
    rule, words, history = broken(right)[name]
    findings = check(history)
    assert findings[rule] and any(words in line for line in told(findings)), findings


def test_a_checkpoint_is_read_to_its_last_byte(right: History, tmp_path: Path) -> None:
    context = RunContext(
        job_id="id-a", attempt=1, spec=JobSpec(), run_dir=str(tmp_path), storage_path=str(tmp_path),
        resources_per_worker={}, use_gpu=False, start_timeout_s=1,
    )  # fmt: skip
    with EventLog(tmp_path) as events:
        fake_driver.save(context, events, 4)
    folder = tmp_path / "checkpoints" / "id-a" / "step-00000004"
    whole = replace(right.jobs[0], checkpoints=[Listed(4, str(folder), None), Listed(2, "/none/older", None)])
    assert check(with_job(right, whole))["damaged"] == []
    (folder / "group.safetensors").write_bytes(b"statestatestatestatf")
    (found,) = check(with_job(right, whole))["damaged"]
    assert "another SHA-256" in found
    listed = replace(right.jobs[0], checkpoints=[Listed(4, str(folder), "00")])
    assert "another than was listed" in check(with_job(right, listed))["damaged"][0]
