"""Rows as the wire shows them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from service.lifecycle import FINAL, JobState
from service.schemas import (
    Artifact,
    Checkpoint,
    Event,
    Figures,
    Fronts,
    Job,
    JobError,
    Point,
    Progress,
    Sweep,
    SweepProgress,
    Trial,
    Usage,
)
from service.tables import ArtifactRow, CheckpointRow, EventRow, JobRow
from workers.sweeps.outcome import front_of


class Standing(NamedTuple):
    """Where a job stands in the queue: its place from 1 on, and when it may be expected to start."""

    position: int
    start_at: float


def job_view(row: JobRow, owner: str | None, standing: Standing | None) -> Job:
    spec = row.spec
    live = row.live or {}
    return Job(
        **_of_the_row(row, owner),
        priority=row.priority,
        queue_position=standing.position if standing else None,
        estimated_start_at=int(standing.start_at) if standing else None,
        model=spec["model"],
        dataset=spec["dataset"],
        method=spec["method"],
        seed=spec["seed"],
        progress=_progress(row, live),
        metrics=live.get("metrics", {}),
        best_loss=live.get("best_loss"),
        accuracy=live.get("accuracy"),
        usage=_usage(live, spec),
        estimate=row.estimate,
        sweep_id=row.parent_id,
        trial_key=row.trial_key,
        setting=row.setting,
        baseline=row.baseline,
        outside=bool(row.outside),
        where=row.whereabouts,
    )


def trial_view(row: JobRow) -> Trial:
    live = row.live or {}
    progress = _progress(row, live)
    return Trial(
        key=row.trial_key or "",
        job_id=row.id,
        setting=row.setting or {},
        baseline=row.baseline,
        status=row.state,
        step=progress.step,
        total_steps=progress.total_steps,
        accuracy=_number(live.get("accuracy")),
        loss=_number(live.get("metrics", {}).get("loss")),
        figures=Figures(**row.figures) if row.figures else None,
        error=_error(row),
    )


def sweep_view(
    row: JobRow,
    owner: str | None,
    counted: Mapping[str, int],
    trials: Sequence[Trial] = (),
    result: dict[str, Any] | None = None,
) -> Sweep:
    """`counted` are its trials by state; without `trials`, as it stands in lists."""
    spec, job = row.spec, row.spec["job"]
    over = {state: count for state, count in counted.items() if state in FINAL}
    ended = [trial for trial in trials if trial.status == JobState.SUCCEEDED]
    figures = {trial.key: trial.figures.model_dump() for trial in ended if trial.figures}
    front = front_of(figures, next((trial.key for trial in ended if trial.baseline == "full"), ""))
    return Sweep(
        **_of_the_row(row, owner),
        priority=row.priority or 0,
        model=job["model"],
        dataset=job["dataset"],
        objectives=spec["objectives"],
        progress=SweepProgress(
            done=sum(over.values()), failed=sum(over.values()) - over.get(JobState.SUCCEEDED, 0), total=num_trials(spec)
        ),
        trials=list(trials),
        points=[Point.model_validate({"key": key, **point}) for key, point in front.points.items()],
        fronts=Fronts(**front.fronts),
        knee=front.knee,
        against=front.against if front.points else None,
        result=result,
    )


def _of_the_row(row: JobRow, owner: str | None) -> dict[str, Any]:
    """What jobs and sweeps say alike."""
    return {
        "id": row.id,
        "owner": owner,
        "name": row.spec.get("name"),
        "status": row.state,
        "status_reason": row.status_reason,
        "attempt": row.attempt,
        "metadata": row.spec["metadata"],
        "spec": row.spec,
        "error": _error(row),
        "created_at": int(row.created_at),
        "started_at": seconds(row.started_at),
        "finished_at": seconds(row.finished_at),
    }


def num_trials(spec: Mapping[str, Any]) -> int:
    """How many trials a sweep will have, baselines included; by its spec as JSON, since to read that tries all."""
    search, space = spec["search"], spec["space"]
    grid = math.prod(len(of.get("values", ())) for of in space.values())
    return (grid if search["type"] == "grid" else int(search["samples"])) + 2 * bool(spec["baselines"])


def event_view(row: EventRow) -> Event:
    return Event(
        id=f"{row.job_id}-e{row.seq}",
        seq=row.seq,
        attempt=row.attempt,
        created_at=row.created_at,
        level=row.level,
        type=row.type,
        message=row.message,
        data=row.data,
    )


def artifact_view(row: ArtifactRow) -> Artifact:
    return Artifact(name=row.name, bytes=row.bytes, sha256=row.sha256, created_at=int(row.created_at))


def checkpoint_view(row: CheckpointRow) -> Checkpoint:
    return Checkpoint(
        name=row.name,
        attempt=row.attempt,
        step=row.step,
        bytes=row.bytes,
        sha256=row.sha256,
        created_at=int(row.created_at),
    )


def fold_metrics(live: dict[str, Any] | None, values: dict[str, Any]) -> dict[str, Any]:
    """`live` with one more step in it: its newest values, and running sums for the means.

    Step time is a moving average over about ten steps, so that the time left follows a device that slows down.
    """
    old = live or {}
    folded: dict[str, Any] = {"metrics": values, "steps_seen": old.get("steps_seen", 0) + 1}
    if "accuracy" in old:
        folded["accuracy"] = old["accuracy"]
    losses = [loss for loss in (old.get("best_loss"), _number(values.get("loss"))) if loss is not None]
    folded["best_loss"] = min(losses, default=None)
    for name in ("compute_fraction", "bytes_fraction", "step_seconds"):
        value = _number(values.get(name))
        total, count = old.get(f"{name}_sum", 0.0), old.get(f"{name}_count", 0)
        folded[f"{name}_sum"] = total if value is None else total + value
        folded[f"{name}_count"] = count if value is None else count + 1
    seconds, average = _number(values.get("step_seconds")), old.get("step_average")
    folded["step_average"] = average
    if seconds is not None:
        folded["step_average"] = seconds if average is None else 0.9 * average + 0.1 * seconds
    return folded


def eta_seconds(live: dict[str, Any]) -> float | None:
    """How long the steps that are left will take; None while that is not known."""
    metrics, average = live.get("metrics") or {}, live.get("step_average")
    step, total = int(_number(metrics.get("step")) or 0), _number(metrics.get("total_steps"))
    return average * max(0, total - step) if average is not None and total else None


def _progress(row: JobRow, live: dict[str, Any]) -> Progress:
    metrics = live.get("metrics", {})
    step, total = int(_number(metrics.get("step")) or 0), _number(metrics.get("total_steps"))
    if not total:
        return Progress(step=step)
    eta_s = None if JobState(row.state).is_final else eta_seconds(live)
    return Progress(
        step=step,
        total_steps=int(total),
        fraction=min(1.0, step / total),
        eta_seconds=None if eta_s is None else round(eta_s, 1),
    )


def _usage(live: dict[str, Any], spec: dict[str, Any]) -> Usage:
    seconds = live.get("step_seconds_sum")
    return Usage(
        compute_fraction=_mean(live, "compute_fraction"),
        bytes_fraction=_mean(live, "bytes_fraction"),
        device_seconds=None if seconds is None else round(seconds * spec["workers"], 3),
    )


def _error(row: JobRow) -> JobError | None:
    return JobError(**row.error) if row.error else None


def _mean(live: dict[str, Any], name: str) -> float | None:
    count = live.get(f"{name}_count", 0)
    return live[f"{name}_sum"] / count if count else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def seconds(value: float | None) -> int | None:
    """A time as answers have it: whole seconds."""
    return None if value is None else int(value)
