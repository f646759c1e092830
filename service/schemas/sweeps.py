"""Sweeps, their trials, and what came of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from service.schemas.base import Wire
from service.schemas.jobs import JobError
from workers.contract import JobSpec
from workers.method import Frozen

TRIAL_KEY = r"^[\w.-]{1,80}$"


class Figures(Wire):
    """What a trial cost in all, and the accuracy of its model at the end; `placement` is how its blocks were placed."""

    accuracy: float
    gflop: float
    mb: float
    seconds: float
    steps: int
    placement: str | None = None


class Trial(Wire):
    """A job of a sweep: `setting` is what was tried, by fields' paths; `baseline` is "full" or "stopped", of those two.

    `accuracy` is the newest on test images, `loss` the newest in training; `figures` are there once it has a ledger.
    """

    key: str
    object: Literal["sweep.trial"] = "sweep.trial"
    job_id: str
    setting: dict[str, Any] = Field(default_factory=dict)
    baseline: str | None = None
    status: str
    step: int = 0
    total_steps: int | None = None
    accuracy: float | None = None
    loss: float | None = None
    figures: Figures | None = None
    error: JobError | None = None


class Point(Wire):
    """Where a trial lies: accuracy against shares of a cost."""

    key: str
    accuracy: float
    compute: float | None = None
    bytes: float | None = None
    seconds: float | None = None


class Fronts(Wire):
    """The keys of the points that no other beats, by the cost that accuracy is set against."""

    compute: list[str] = Field(default_factory=list)
    bytes: list[str] = Field(default_factory=list)
    seconds: list[str] = Field(default_factory=list)


class SweepProgress(Wire):
    """How many of the trials are over; `failed` of them failed or were cancelled. `total` counts baselines, too."""

    done: int = 0
    failed: int = 0
    total: int = 0


class Sweep(Wire):
    """A search over settings of a job; times are Unix seconds.

    `trials` are its jobs so far, `points` those of them that succeeded, each cost a share of what plain full
    fine-tuning took (`against` is "full") or else the dearest ("largest"); `knee` is the key of the point where the
    front over compute turns. `result` is what the sweep itself made of them in the end. In lists all this is left away.
    """

    id: str
    object: Literal["sweep"] = "sweep"
    owner: str | None = None
    name: str | None = None
    status: str
    status_reason: str | None = None
    attempt: int = 0
    priority: int = 0
    model: str
    dataset: str
    objectives: dict[str, str] = Field(default_factory=dict)
    metadata: dict[str, str] = Field(default_factory=dict)
    spec: dict[str, Any] = Field(default_factory=dict)
    progress: SweepProgress = SweepProgress()
    trials: list[Trial] = Field(default_factory=list)
    points: list[Point] = Field(default_factory=list)
    fronts: Fronts = Fronts()
    knee: str | None = None
    against: str | None = None
    result: dict[str, Any] | None = None
    error: JobError | None = None
    created_at: int
    started_at: int | None = None
    finished_at: int | None = None

    @property
    def is_final(self) -> bool:
        return self.status in ("succeeded", "failed", "cancelled")


class TrialBody(Frozen):
    """A job that a sweep's driver asks for: by the same `key` it is the same job."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    key: Annotated[str, Field(pattern=TRIAL_KEY)]
    setting: dict[str, Any] = Field(default_factory=dict, max_length=16)
    spec: JobSpec
    baseline: Literal["full", "stopped"] | None = None


class TrialList(Wire):
    """All trials of a sweep, oldest first."""

    object: Literal["list"] = "list"
    data: list[Trial]
