"""What must be true after any fault, read from what was promised, what the store has, what Ray started, and the disk.

    clients' notes ─┐
    the store      ─┼─► History ─► check ─► findings by rule ─► a table row
    a fake of Ray  ─┤
    checkpoints    ─┘

| rule | |
|---|---|
| lost | a submit that was answered is there, and has ended or waits to be run or resumed |
| doubled | it is there once; a submit without an answer is there once or not at all; nothing else is |
| run twice | a job succeeds once at most; of its attempts one runs at a time, each started once in a life of Ray |
| illegal | every history is numbered without a gap, its moves are the table's, and its end is the job's state |
| damaged | the newest checkpoint that a job lists is whole; of older ones, those that are still there |

`check` knows no store and no Ray: a history can be written down by hand.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import create_engine, select
from sqlalchemy.orm import Session

from service.lifecycle import RETRIED, JobState, may_move
from service.store.attempts import CREATED, SETTLED, SUBMITTED
from service.tables import AttemptRow, CheckpointRow, EventRow, JobRow
from tests.service.conftest import FakeRay
from workers.manifest import read_manifest, verify

RULES = ("lost", "doubled", "run twice", "illegal", "damaged")
AT_REST = frozenset({JobState.QUEUED, JobState.PAUSED})  # not over, and nothing of it runs
OPEN = (CREATED, SUBMITTED)
SHOWN = 5


Value = TypeVar("Value")


@dataclass(frozen=True)
class Line:
    """One line of a job's history."""

    seq: int
    type: str
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Attempt:
    """One attempt as the store has it."""

    n: int
    began: float
    ended: float | None
    state: str = SETTLED


@dataclass(frozen=True)
class Run:
    """One driver as Ray had it: from when until when (None: it still runs), in which life of the cluster."""

    job_id: str
    n: int
    began: float
    ended: float | None
    cluster: int = 0


@dataclass(frozen=True)
class Listed:
    """A checkpoint that a job lists; `sha256` is that of its manifest."""

    step: int
    path: str
    sha256: str | None


@dataclass(frozen=True)
class Job:
    """One job as the store has it. `key` is by what its submit is known to the client."""

    id: str
    key: str
    state: JobState
    lines: Sequence[Line] = ()
    attempts: Sequence[Attempt] = ()
    checkpoints: Sequence[Listed] = ()


@dataclass(frozen=True)
class History:
    """All that is known of one run of the service. `accepted`: the job that was promised for each key.

    `unknown` are keys that were sent and never answered.
    """

    jobs: Sequence[Job]
    accepted: Mapping[str, str]
    unknown: frozenset[str] = frozenset()
    runs: Sequence[Run] = ()


def check(history: History) -> dict[str, list[str]]:
    """What is wrong, by rule; empty lists where nothing is."""
    return {
        "lost": list(_lost(history)),
        "doubled": list(_doubled(history)),
        "run twice": [found for job in history.jobs for found in _run_twice(job)] + list(_overlaps(history)),
        "illegal": [f"{job.id}: {found}" for job in history.jobs for found in illegal(job)],
        "damaged": [found for job in history.jobs for found in _damaged(job)],
    }


def counts(findings: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """How often each rule is broken: columns of a table."""
    return {rule: len(findings[rule]) for rule in RULES}


def told(findings: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Lines that say what is wrong, a few of each rule."""
    for rule in RULES:
        found = findings[rule]
        yield from (f"{rule}: {each}" for each in found[:SHOWN])
        if len(found) > SHOWN:
            yield f"{rule}: … and {len(found) - SHOWN} more"


def _lost(history: History) -> Iterator[str]:
    jobs = {job.id: job for job in history.jobs}
    for key, job_id in history.accepted.items():
        job = jobs.get(job_id)
        if job is None:
            yield f"missing: {job_id}, promised for {key}"
        elif not job.state.is_final and job.state not in AT_REST:
            yield f"{job_id} is left {job.state}"


def _doubled(history: History) -> Iterator[str]:
    found = Counter(job.key for job in history.jobs)
    sent = {*history.accepted, *history.unknown}
    for key, count in found.items():
        if key not in sent:
            yield f"extra: {count} of {key}, which nobody sent"
        elif count > 1:
            yield f"doubled: {count} of {key}"


def _run_twice(job: Job) -> Iterator[str]:
    moves = [line.data for line in job.lines if line.type == "job.status"]
    successes = sum(data["to"] == JobState.SUCCEEDED != data["from"] for data in moves)
    if successes > 1:
        yield f"{job.id} succeeded {successes} times"
    attempts = sorted(job.attempts, key=lambda attempt: attempt.n)
    if [attempt.n for attempt in attempts] != list(range(1, len(attempts) + 1)):
        yield f"{job.id} has the attempts {[attempt.n for attempt in attempts]}"
    for first, second in itertools.pairwise(attempts):
        if first.ended is None or second.began < first.ended:
            yield f"{job.id}: attempt {second.n} was opened before {first.n} had ended"


def _overlaps(history: History) -> Iterator[str]:
    known = {(job.id, attempt.n) for job in history.jobs for attempt in job.attempts}
    by_job: dict[str, list[Run]] = {}
    for run in history.runs:
        by_job.setdefault(run.job_id, []).append(run)
        if (run.job_id, run.n) not in known:
            yield f"Ray ran {run.job_id} a{run.n}, which the store does not know"
    for job_id, runs in by_job.items():
        runs.sort(key=lambda run: run.began)
        starts = _repeated((run.n, run.cluster) for run in runs)
        yield from (f"{job_id} a{n} was started {count} times" for (n, _), count in starts)
        for first, second in itertools.pairwise(runs):
            if first.ended is None or second.began < first.ended:
                yield f"{job_id}: a{second.n} was started while a{first.n} ran"


def _repeated(values: Iterable[Value]) -> Iterator[tuple[Value, int]]:
    return ((value, count) for value, count in Counter(values).items() if count > 1)


def illegal(job: Job) -> Iterator[str]:
    """What is wrong with a job's history."""
    state: str = JobState.VALIDATING
    for place, line in enumerate(job.lines, 1):
        if line.seq != place:
            yield f"line {place} has the number {line.seq}"
            return
        if line.type != "job.status" or line.data["from"] == line.data["to"]:
            continue
        old, new = line.data["from"], line.data["to"]
        retried = old in RETRIED and new == JobState.QUEUED
        if old != state or not (may_move(JobState(old), JobState(new)) or retried):
            yield f"line {place} moves it from {old} to {new} when it was {state}"
        state = new
    if job.lines and state != job.state:
        yield f"its history ends {state}, and it is {job.state}"
    if job.state.is_final or job.state in AT_REST:
        yield from (f"it is {job.state} and attempt {a.n} goes on" for a in job.attempts if a.state in OPEN)


def _damaged(job: Job) -> Iterator[str]:
    for place, listed in enumerate(sorted(job.checkpoints, key=lambda listed: listed.step, reverse=True)):
        folder = Path(listed.path)
        if place > 0 and not folder.exists():
            continue  # only the newest few are kept
        try:
            if listed.sha256 not in (None, read_manifest(folder)[1]):
                raise ValueError("its manifest is another than was listed")
            verify(folder)
        except (OSError, ValueError) as error:
            yield f"{job.id} {folder.name}: {error}"


def read_jobs(url: str) -> list[Job]:
    """All jobs of a store, each known by its name as a key."""
    engine = create_engine(url)
    lines: dict[str, list[Line]] = {}
    attempts: dict[str, list[Attempt]] = {}
    listed: dict[str, list[Listed]] = {}
    with Session(engine) as session:
        for event in session.execute(
            select(EventRow.job_id, EventRow.seq, EventRow.type, EventRow.data).order_by(EventRow.job_id, EventRow.seq)
        ):
            lines.setdefault(event.job_id, []).append(Line(event.seq, event.type, event.data))
        for row in session.scalars(select(AttemptRow)):
            attempts.setdefault(row.job_id, []).append(Attempt(row.n, row.created_at, row.ended_at, row.state))
        for saved in session.scalars(select(CheckpointRow)):
            listed.setdefault(saved.job_id, []).append(Listed(saved.step, saved.path, saved.sha256))
        jobs = [
            Job(
                id=row.id,
                key=str(row.spec.get("name")),
                state=JobState(row.state),
                lines=lines.get(row.id, []),
                attempts=attempts.get(row.id, []),
                checkpoints=listed.get(row.id, []),
            )
            for row in session.execute(select(JobRow.id, JobRow.spec, JobRow.state))
        ]
    engine.dispose()
    return jobs


def runs_of(ray: FakeRay) -> list[Run]:
    """Every driver that the fake has started, those of clusters that are gone included."""
    runs = []
    for job in ray.started:
        job_id, _, n = job["submission_id"].removeprefix("job-").rpartition("-a")
        runs.append(Run(job_id, int(n), job["start_time"], job["end_time"], job["cluster"]))
    return runs
