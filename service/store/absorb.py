"""What a line of the run's own file (`workers.events`) does to its job: one short function per type.

A run is not trusted to say only what makes sense: a line whose data is not what its type asks for is kept as history
and moves nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sqlalchemy import delete
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from service.lifecycle import PHASES, SWEEP, JobState, may_move
from service.store.journal import append, move
from service.store.losses import go_on_elsewhere, lose
from service.store.views import fold_metrics
from service.tables import ArtifactRow, CheckpointRow, JobRow, MetricRow
from workers.sweeps.outcome import figures_of

RunEvent = dict[str, Any]  # one line, as workers.events describes it; `seq` is its place in the file
Step = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
Bytes = Annotated[int, Field(ge=0, lt=2**62, strict=True)]
Sha256 = Annotated[str, Field(pattern=r"^([0-9a-fA-F]{2})*$", max_length=64)]
ShortText = Annotated[str, Field(max_length=20)]
Said = TypeVar("Said", bound="_Data")
_Absorber = Callable[[Session, JobRow, RunEvent], bool]  # True where a move's own event says all that the line does
_INSERTS: dict[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}


class _Data(BaseModel):
    model_config = ConfigDict(extra="ignore")


class _Metrics(_Data):
    step: Step


class _Artifact(_Data):
    name: Annotated[str, Field(min_length=1, max_length=255)]
    path: Annotated[str, Field(min_length=1, max_length=4096)]
    bytes: Bytes | None = None
    sha256: Sha256 | None = None


class _Checkpoint(_Artifact):
    name: Annotated[str, Field(min_length=1, max_length=80)]
    step: Step


class _Dropped(_Data):
    name: Annotated[str, Field(min_length=1, max_length=80)]


class _Error(_Data):
    code: Annotated[str, Field(max_length=80)] = "driver_failed"
    fault: Literal["user", "system", "capacity"] = "system"
    message: Annotated[str, Field(max_length=20_000)] = "the run failed"
    param: Annotated[str, Field(max_length=200)] | None = None


class _Outcome(_Data):
    status: Literal["succeeded", "failed", "paused", "cancelled"]
    error: _Error | None = None
    why: Annotated[str, Field(max_length=80)] | None = None


class _Evaluation(_Data):
    accuracy: Annotated[float, Field(ge=0, le=1)]


class _Timeline(_Data):
    """A chart as `scheduler.gantt` makes it."""

    step: Step
    window: Step
    step_us: Step
    fields: Annotated[list[str], Field(max_length=20)]
    workers: Annotated[list[list[tuple[Step, Step, ShortText, int, ShortText, int]]], Field(max_length=10_000)]


class _Recovering(_Data):
    reason: Annotated[str, Field(max_length=2000)] = "the driver brings its group up again"


def absorb_events(
    session: Session,
    job: JobRow,
    events: Iterable[RunEvent],
    is_over: Callable[[JobRow], bool],
    max_faults: int,
) -> None:
    """Take lines over, into the job and into its history, until the job is over."""
    absorbers: dict[str, _Absorber] = {**_ABSORBERS, "outcome": partial(_absorb_outcome, max_faults=max_faults)}
    steps: dict[int, dict[str, Any]] = {}
    for event in events:
        if is_over(job):
            break
        if event["type"] == "metrics":
            _absorb_metrics(job, event, steps)
        if not absorbers.get(event["type"], _keep)(session, job, event):
            _append(session, job, event, _shown(event))
    if steps:
        _write_steps(session, job.id, steps)


def _append(session: Session, job: JobRow, event: RunEvent, data: dict[str, Any]) -> None:
    append(
        session,
        job,
        event["type"],
        event.get("message", ""),
        level=event.get("level", "info"),
        data=data,
        run_seq=event["seq"],
        at=event.get("at"),
    )


def _shown(event: RunEvent) -> dict[str, Any]:
    """The event's data for the history: of a plan its forecast and what changed, of a timeline which step it is of.

    The rest is at `/plan` and `/timeline`.
    """
    data = _data(event)
    if event["type"] == "timeline":
        return {key: data.get(key) for key in ("step", "window", "step_us")}
    if event["type"] not in ("plan.created", "plan.changed"):
        return data
    return {**_estimate(data), **({"change": data["change"]} if data.get("change") else {})}


def _keep(session: Session, job: JobRow, event: RunEvent) -> bool:
    return False


def _absorb_phase(session: Session, job: JobRow, event: RunEvent) -> bool:
    """Move the job to the phase its driver announces. True when the move's own event says it all."""
    name = _data(event).get("name")
    if not isinstance(name, str) or name not in PHASES or not may_move(JobState(job.state), JobState(name)):
        return False
    if name == JobState.RECOVERING:  # its own line stays, too: it says why and how often
        move(session, job, JobState.RECOVERING, message=_why_recovering(event), at=event.get("at"))
        return False
    move(session, job, JobState(name), message=event.get("message") or None, run_seq=event["seq"], at=event.get("at"))
    return True


def _why_recovering(event: RunEvent) -> str:
    said = _read(_Recovering, event)
    return str(event.get("message") or (said.reason if said else "")) or _Recovering().reason


def _absorb_metrics(job: JobRow, event: RunEvent, steps: dict[int, dict[str, Any]]) -> None:
    said = _read(_Metrics, event)
    if said is not None:
        steps[said.step] = _data(event)
        job.live = fold_metrics(job.live, _data(event))


def _write_steps(session: Session, job_id: str, steps: Mapping[int, dict[str, Any]]) -> None:
    """All steps of a batch in one statement; one that was run before is replaced."""
    rows = [{"job_id": job_id, "step": step, "values": values} for step, values in steps.items()]
    statement = _INSERTS[session.get_bind().dialect.name](MetricRow)
    key = ["job_id", "step"]
    replacing = statement.on_conflict_do_update(index_elements=key, set_={"values": statement.excluded["values"]})
    session.execute(replacing, rows)


def _absorb_plan(session: Session, job: JobRow, event: RunEvent) -> bool:
    job.plan = _data(event)
    job.estimate = _estimate(job.plan)
    return False


def _absorb_timeline(session: Session, job: JobRow, event: RunEvent) -> bool:
    said = _read(_Timeline, event)
    if said is not None:
        job.timeline = said.model_dump(mode="json")
    return False


def _absorb_ledger(session: Session, job: JobRow, event: RunEvent) -> bool:
    job.ledger = _data(event)
    job.figures = figures_of(job.ledger)
    return False


def _absorb_evaluation(session: Session, job: JobRow, event: RunEvent) -> bool:
    said = _read(_Evaluation, event)
    if said is not None:
        job.live = {**(job.live or {}), "accuracy": said.accuracy}
    return False


def _absorb_result(session: Session, job: JobRow, event: RunEvent) -> bool:
    if job.kind == SWEEP:
        job.ledger = _data(event)
    return False


def _absorb_artifact(session: Session, job: JobRow, event: RunEvent) -> bool:
    said = _read(_Artifact, event)
    if said is not None:
        session.merge(ArtifactRow(job_id=job.id, created_at=event.get("at") or time.time(), **said.model_dump()))
    return False


def _absorb_checkpoint(session: Session, job: JobRow, event: RunEvent) -> bool:
    said = _read(_Checkpoint, event)
    if said is not None:
        about = {"job_id": job.id, "attempt": job.attempt, "created_at": event.get("at") or time.time()}
        session.merge(CheckpointRow(**about, **said.model_dump()))
    return False


def _absorb_dropped(session: Session, job: JobRow, event: RunEvent) -> bool:
    said = _read(_Dropped, event)
    if said is not None:
        session.execute(delete(CheckpointRow).where(CheckpointRow.job_id == job.id, CheckpointRow.name == said.name))
    return False


def _absorb_outcome(session: Session, job: JobRow, event: RunEvent, max_faults: int) -> bool:
    """The run's last word. One that fails while it is being stopped failed of the stop.

    One that was paused because its machine is switched off waits again, unless somebody wants it paused.
    """
    said = _read(_Outcome, event)
    told: dict[str, Any] = {"message": event.get("message") or None, "run_seq": event["seq"], "at": event.get("at")}
    if said is None:
        return False
    if job.outside:
        return _end_outside(session, job, said, told)
    if said.status == "succeeded" and may_move(JobState(job.state), JobState.SUCCEEDED):
        move(session, job, JobState.SUCCEEDED, **told)
        return True
    if said.status == "paused" and job.state == JobState.PAUSING:
        move(session, job, JobState.PAUSED, **told)
        return True
    if said.status == "paused" and said.why == "drain" and job.state in PHASES:
        append(session, job, "outcome", told["message"] or "", data=_data(event), run_seq=event["seq"], at=told["at"])
        go_on_elsewhere(session, job, "its machine is being switched off", "waits again, to go on where it was")
        return True
    stopped = job.state == JobState.CANCELLING or (job.state == JobState.PAUSING and job.want == "stop")
    if said.status != "failed" or stopped:
        return False
    error = (said.error or _Error()).model_dump()
    lose(session, job, error, max_faults, run_seq=event["seq"], at=event.get("at"))
    return True


def _end_outside(session: Session, job: JobRow, said: _Outcome, told: dict[str, Any]) -> bool:
    """The last word of a run outside decides: nobody here starts it again, whatever it was that ended it."""
    if said.status == "succeeded":
        move(session, job, JobState.SUCCEEDED, **told)
    elif said.status == "cancelled" or job.state == JobState.CANCELLING:
        _end_by_way_of(session, job, JobState.CANCELLING, JobState.CANCELLED, told)
    elif said.status == "paused" and job.state != JobState.FINALIZING:
        _end_by_way_of(session, job, JobState.PAUSING, JobState.PAUSED, told)
    else:
        error = said.error or _Error(code="run_ended", message=f"the run says that it is {said.status}")
        move(session, job, JobState.FAILED, error=error.model_dump(), run_seq=told["run_seq"], at=told["at"])
    return True


def _end_by_way_of(session: Session, job: JobRow, via: JobState, end: JobState, told: dict[str, Any]) -> None:
    if job.state != via:
        move(session, job, via, message="not asked for here", at=told["at"])
    move(session, job, end, **told)


def _estimate(plan: dict[str, Any]) -> dict[str, Any]:
    forecast = plan.get("forecast")
    forecast = forecast if isinstance(forecast, dict) else {}
    step_us = forecast.get("step_us")
    return {
        "plan_version": plan.get("version"),
        "window": plan.get("window"),
        "compute_fraction": plan.get("compute_fraction"),
        "bytes_fraction": plan.get("bytes_fraction"),
        "step_seconds": step_us / 1e6 if isinstance(step_us, int | float) else None,
        "idle_share": forecast.get("idle_share"),
    }


def _data(event: RunEvent) -> dict[str, Any]:
    return event.get("data") or {}


def _read(kind: type[Said], event: RunEvent) -> Said | None:
    """The event's data as its type has it, or None where it is something else."""
    try:
        return kind.model_validate(_data(event))
    except ValidationError:
        return None


_ABSORBERS: dict[str, _Absorber] = {
    "phase": _absorb_phase,
    "plan.created": _absorb_plan,
    "plan.changed": _absorb_plan,
    "timeline": _absorb_timeline,
    "ledger": _absorb_ledger,
    "evaluation": _absorb_evaluation,
    "sweep.result": _absorb_result,
    "artifact.ready": _absorb_artifact,
    "checkpoint.saved": _absorb_checkpoint,
    "checkpoint.dropped": _absorb_dropped,
}
