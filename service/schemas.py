"""What crosses the wire, as the server sends it and the client reads it.

The body of `POST /v1/jobs` is `workers.contract.JobSpec`. Readers pass over fields they do not know, and take `status`
as text: a newer server may know more states.
"""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field


class Wire(BaseModel):
    """Base of the answers."""

    model_config = ConfigDict(extra="ignore", frozen=True)


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


class Job(Wire):
    """One job as the API shows it; times are Unix seconds."""

    id: str
    object: Literal["job"] = "job"
    name: str | None = None
    status: str
    status_reason: str | None = None
    attempt: int = 0
    model: str
    dataset: str
    method: dict[str, Any] = Field(default_factory=dict)
    seed: int = 0
    metadata: dict[str, str] = Field(default_factory=dict)
    spec: dict[str, Any] = Field(default_factory=dict)
    progress: Progress = Progress()
    metrics: dict[str, Any] = Field(default_factory=dict)
    usage: Usage = Usage()
    estimate: dict[str, Any] | None = None
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


Item = TypeVar("Item")


class Page(Wire, Generic[Item]):
    """A page of a list; ask for the next with `after` = last_id."""

    object: Literal["list"] = "list"
    data: list[Item]
    has_more: bool = False
    first_id: str | None = None
    last_id: str | None = None


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


class LedgerView(Wire):
    """The ledger of a job: predicted beside measured."""

    object: Literal["ledger"] = "ledger"
    job_id: str
    ledger: dict[str, Any]


class Health(Wire):
    """Whether a part answers."""

    status: Literal["ok", "degraded"]
    checks: dict[str, str] = Field(default_factory=dict)


class FieldProblem(Wire):
    """One wrong field: a JSON pointer into the body, and what is wrong."""

    pointer: str
    message: str


class Problem(Wire):
    """An error, after RFC 9457."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    instance: str | None = None
    code: str
    param: str | None = None
    errors: list[FieldProblem] = Field(default_factory=list)
    request_id: str | None = None
