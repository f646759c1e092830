"""What a line of the run's own file (`workers.events`) does to its job: one short function per type."""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy.orm import Session

from service.lifecycle import PHASES, JobState, may_move
from service.store.journal import append, move
from service.store.views import fold_metrics
from service.tables import ArtifactRow, CheckpointRow, JobRow, MetricRow

RunEvent = dict[str, Any]  # one line, as workers.events describes it; `seq` is its place in the file


def absorb_event(session: Session, job: JobRow, event: RunEvent) -> None:
    """Take one line over: into the job, and into its history."""
    moved = _ABSORBERS.get(event["type"], _keep)(session, job, event)
    if not moved:
        _append(session, job, event, _shown(event))


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
    """The event's data for the history; of a plan its forecast and what changed, the op tables are at `/plan`."""
    data: dict[str, Any] = event.get("data") or {}
    if event["type"] not in ("plan.created", "plan.changed"):
        return data
    return {**_estimate(data), **({"change": data["change"]} if data.get("change") else {})}


def _keep(session: Session, job: JobRow, event: RunEvent) -> bool:
    return False


def _absorb_phase(session: Session, job: JobRow, event: RunEvent) -> bool:
    """Move the job to the phase its driver announces. True when the move's own event says it all."""
    name = (event.get("data") or {}).get("name")
    if name not in PHASES or not may_move(JobState(job.state), JobState(name)):
        return False
    move(session, job, JobState(name), message=event.get("message") or None, run_seq=event["seq"], at=event.get("at"))
    return True


def _absorb_metrics(session: Session, job: JobRow, event: RunEvent) -> bool:
    values = event.get("data") or {}
    if isinstance(values.get("step"), int):
        session.merge(MetricRow(job_id=job.id, step=values["step"], values=values))
        job.live = fold_metrics(job.live, values)
    return False


def _absorb_plan(session: Session, job: JobRow, event: RunEvent) -> bool:
    job.plan = event.get("data") or {}
    job.estimate = _estimate(job.plan)
    return False


def _absorb_ledger(session: Session, job: JobRow, event: RunEvent) -> bool:
    job.ledger = event.get("data") or {}
    return False


def _absorb_artifact(session: Session, job: JobRow, event: RunEvent) -> bool:
    data = event.get("data") or {}
    if isinstance(data.get("name"), str) and isinstance(data.get("path"), str):
        session.merge(
            ArtifactRow(
                job_id=job.id,
                name=data["name"][:255],
                path=data["path"],
                bytes=data.get("bytes"),
                sha256=data.get("sha256"),
                created_at=event.get("at") or time.time(),
            )
        )
    return False


def _absorb_checkpoint(session: Session, job: JobRow, event: RunEvent) -> bool:
    data = event.get("data") or {}
    if isinstance(data.get("name"), str) and isinstance(data.get("path"), str) and isinstance(data.get("step"), int):
        session.merge(
            CheckpointRow(
                job_id=job.id,
                name=data["name"][:80],
                attempt=job.attempt,
                step=data["step"],
                path=data["path"],
                bytes=data.get("bytes"),
                sha256=data.get("sha256"),
                created_at=event.get("at") or time.time(),
            )
        )
    return False


def _absorb_outcome(session: Session, job: JobRow, event: RunEvent) -> bool:
    """The run's last word. One that fails while it is being cancelled was cancelled: it failed of the stop."""
    data = event.get("data") or {}
    told: dict[str, Any] = {"message": event.get("message") or None, "run_seq": event["seq"], "at": event.get("at")}
    if data.get("status") == "succeeded":
        move(session, job, JobState.SUCCEEDED, **told)
        return True
    if data.get("status") == "paused" and job.state == JobState.PAUSING:
        move(session, job, JobState.PAUSED, **told)
        return True
    if job.state == JobState.CANCELLING or data.get("status") == "paused":
        return False
    error = {
        "code": "driver_failed",
        "fault": "system",
        "message": "the run failed",
        "param": None,
        **(data.get("error") or {}),
    }
    move(session, job, JobState.FAILED, error=error, run_seq=event["seq"], at=event.get("at"))
    return True


def _estimate(plan: dict[str, Any]) -> dict[str, Any]:
    forecast = plan.get("forecast") or {}
    return {
        "plan_version": plan.get("version"),
        "window": plan.get("window"),
        "compute_fraction": plan.get("compute_fraction"),
        "bytes_fraction": plan.get("bytes_fraction"),
        "step_seconds": forecast["step_us"] / 1e6 if "step_us" in forecast else None,
        "idle_share": forecast.get("idle_share"),
    }


_ABSORBERS = {
    "phase": _absorb_phase,
    "metrics": _absorb_metrics,
    "plan.created": _absorb_plan,
    "plan.changed": _absorb_plan,
    "ledger": _absorb_ledger,
    "artifact.ready": _absorb_artifact,
    "checkpoint.saved": _absorb_checkpoint,
    "outcome": _absorb_outcome,
}
