"""Jobs and what belongs to one: events, metrics, plan, ledger, artifacts, checkpoints."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from service.schemas.base import Wire
from workers.contract import JobSpec
from workers.method import Frozen

PlainText = Annotated[str, Field(max_length=4096)]


class JobError(Wire):
    """Why a job failed. `fault` says whose it is: user, system or capacity."""

    code: str
    fault: str
    message: str
    param: str | None = None


class Progress(Wire):
    """How far the steps are. `fraction` is step / total_steps."""

    step: int = 0
    total_steps: int | None = None
    fraction: float = 0.0
    eta_seconds: float | None = None


class Usage(Wire):
    """What ran so far as a fraction of all-FULL, the mean over steps, and the seconds that workers were held."""

    compute_fraction: float | None = None
    bytes_fraction: float | None = None
    device_seconds: float | None = None


class RunPlace(Frozen):
    """Where a run outside says it is, for people to find it: nothing here is opened or called."""

    submission_id: PlainText | None = None
    run_dir: PlainText | None = None
    ray_address: PlainText | None = None


class Job(Wire):
    """One job as the API shows it; times are Unix seconds.

    `metrics` are the newest step's, `best_loss` the lowest of all steps, `accuracy` the newest on test images.
    `queue_position` counts from 1 while it waits, as of the service's last look at the queue. A trial of a sweep has
    `sweep_id`, its `trial_key` and `setting` there, and where it is one of the two to compare with, `baseline`. A
    run that the service has not ordered is `outside`, and says `where`.
    """

    id: str
    object: Literal["job"] = "job"
    owner: str | None = None
    name: str | None = None
    status: str
    status_reason: str | None = None
    attempt: int = 0
    priority: int = 0
    queue_position: int | None = None
    estimated_start_at: int | None = None
    model: str
    dataset: str
    method: dict[str, Any] = Field(default_factory=dict)
    seed: int = 0
    metadata: dict[str, str] = Field(default_factory=dict)
    spec: dict[str, Any] = Field(default_factory=dict)
    progress: Progress = Progress()
    metrics: dict[str, Any] = Field(default_factory=dict)
    best_loss: float | None = None
    accuracy: float | None = None
    usage: Usage = Usage()
    estimate: dict[str, Any] | None = None
    sweep_id: str | None = None
    trial_key: str | None = None
    setting: dict[str, Any] | None = None
    baseline: str | None = None
    outside: bool = False
    where: dict[str, str] | None = None
    error: JobError | None = None
    created_at: int
    started_at: int | None = None
    finished_at: int | None = None

    @property
    def is_final(self) -> bool:
        return self.status in ("succeeded", "failed", "cancelled")


class Event(Wire):
    """One line of a job's history; `seq` counts from 1 within the job."""

    id: str
    object: Literal["job.event"] = "job.event"
    seq: int
    attempt: int = 0
    created_at: float
    level: str = "info"
    type: str
    message: str = ""
    data: dict[str, Any] = Field(default_factory=dict)


class Artifact(Wire):
    """One file that a job produced."""

    name: str
    object: Literal["job.artifact"] = "job.artifact"
    bytes: int | None = None
    sha256: str | None = None
    created_at: int


class MetricsPage(Wire):
    """The steps of a job, thinned evenly to at most `max_points`; `total` counts them all."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    total: int


class PlanView(Wire):
    """The newest plan of a job."""

    object: Literal["plan"] = "plan"
    job_id: str
    plan: dict[str, Any]


class TimelineView(Wire):
    """A step of a job: what every worker does when, as the newest plan forecasts it and as it was measured last.

    Both are charts: `fields`, `step_us`, and per worker rows in the order of the fields; measured with the `step` and
    its `window`. Null where none was made: of too many spans, or not yet.
    """

    object: Literal["timeline"] = "timeline"
    job_id: str
    forecast: dict[str, Any] | None = None
    measured: dict[str, Any] | None = None


class LedgerView(Wire):
    """The ledger of a job: predicted beside measured."""

    object: Literal["ledger"] = "ledger"
    job_id: str
    ledger: dict[str, Any]


class Checkpoint(Wire):
    """A state from which the job can go on; `sha256` is that of its manifest, which has one of each file."""

    name: str
    object: Literal["job.checkpoint"] = "job.checkpoint"
    attempt: int
    step: int
    bytes: int | None = None
    sha256: str | None = None
    created_at: int


class RunBody(Frozen):
    """A run that the service has not ordered, and that is to be listed."""

    spec: JobSpec
    where: RunPlace = RunPlace()


class RunBegun(Wire):
    """The job that stands for the run, and the token with which its events are posted to `url`, for this run alone."""

    object: Literal["run"] = "run"
    job_id: str
    attempt: int
    token: str
    url: str


class RunEvents(Frozen):
    """What a run posts: lines of its own event file as they stand there, `seq` the offset behind each."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    attempt: int
    events: Annotated[list[dict[str, Any]], Field(max_length=1000)] = Field(default_factory=list)


class RunAnswer(Wire):
    """How far the service has the run's file, and what it wants of the run: pause, cancel or nothing."""

    offset: int
    want: str | None = None
