"""What crosses the wire, as the server sends it and the client reads it.

The body of `POST /v1/jobs` is `workers.contract.JobSpec`, that of `POST /v1/plans` is `PreviewBody`. Readers pass over
fields they do not know, and take `status` as text: a newer server may know more states.
"""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from workers.contract import DIGITS_MODEL, Frozen, JobSpec, Method, ModelArg

MAX_DEVICES = 64


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


class DeviceBody(Frozen):
    """Invented devices: `count` of a `kind` ("a100", "fast"), or of a sustained rate in `tflops`.

    Devices of one `node` share a fast link; without a node each stands in a machine of its own.
    """

    kind: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    tflops: Annotated[float, Field(gt=0, le=1e5)] | None = None
    count: Annotated[int, Field(ge=1, le=MAX_DEVICES)] = 1
    memory_bytes: Annotated[int, Field(ge=1)] | None = None
    node: Annotated[str, Field(max_length=64)] | None = None

    @model_validator(mode="after")
    def _one_of(self) -> DeviceBody:
        if (self.kind is None) == (self.tflops is None):
            raise ValueError("give kind or tflops, and not both")
        return self


class LinkBody(Frozen):
    """A link: a message of n bytes takes latency_us + n / bytes_per_s."""

    latency_us: Annotated[int, Field(ge=0, le=10**9)] = 100
    bytes_per_s: Annotated[int, Field(ge=1)]


class PairBody(LinkBody):
    """The link between devices `a` and `b`, numbers in the fleet's order from 0."""

    a: Annotated[int, Field(ge=0, lt=MAX_DEVICES)]
    b: Annotated[int, Field(ge=0, lt=MAX_DEVICES)]


class PreviewBody(Frozen):
    """What `POST /v1/plans` asks: the plan that a job would get, on invented devices or on those measured ("live").

    The first fields are a job's. A device may also be written "2x fast:24GB@node1", a link "1Gbps/50us"; `link` joins
    different nodes, `links` single pairs. `gantt` adds what every worker does when in the first step.
    """

    model: Annotated[str, Field(min_length=1, max_length=200)] = DIGITS_MODEL
    model_args: dict[str, ModelArg] = Field(default_factory=dict)
    img_size: int | None = None
    num_classes: Annotated[int, Field(ge=1, le=1_000_000)] = 10
    method: Method = Field(default_factory=Method)
    micro_batches: int = 5
    micro_batch_size: int = 16
    placement: Literal["auto", "split", "whole"] = "auto"
    train_embed: bool = True
    seed: int = 0
    devices: Literal["live"] | Annotated[list[str | DeviceBody], Field(min_length=1, max_length=MAX_DEVICES)]
    link: str | LinkBody | None = None
    links: Annotated[list[PairBody], Field(max_length=MAX_DEVICES**2)] = Field(default_factory=list)
    gantt: bool = False

    @model_validator(mode="after")
    def _a_job_could_ask_this(self) -> PreviewBody:
        own = {"num_classes", "devices", "link", "links", "gantt"}
        try:
            JobSpec.model_validate(self.model_dump(exclude=own))
        except ValidationError as error:
            first = error.errors()[0]
            text = first["msg"].removeprefix("Value error, ")
            field = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"{field}: {text}" if field else text) from None
        return self


class Preview(Wire):
    """A plan that nobody runs, with its reasons; beside the fields here whatever the planner says of it.

    `plan` is as a job's: placement, op tables, forecast, solver reports with bound and gap. `devices` says per worker
    what it has and what binds it, `heads` per [block][head] owner, ops, worth and reason.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    object: Literal["plan_preview"] = "plan_preview"
    model: str
    plan: dict[str, Any]
    devices: list[dict[str, Any]] = []
    heads: list[list[dict[str, Any]]] = []
    rounding_loss: float | None = None
    gantt: dict[str, Any] | None = None
    seconds: float | None = None
    warnings: list[str] = []


class Device(Wire):
    """One device as jobs measured it; `rates` per second, `links` by the other device's id.

    `stale` says that it was measured so long ago that it may be another by now; `used_by` names running jobs.
    """

    id: str
    object: Literal["device"] = "device"
    node: str
    device: str
    rates: dict[str, float] = Field(default_factory=dict)
    call_us: int = 0
    memory_bytes: int
    links: dict[str, dict[str, int]] = Field(default_factory=dict)
    facts: dict[str, Any] = Field(default_factory=dict)
    measured_at: float = 0.0
    age_s: float | None = None
    samples: int = 0
    stale: bool = False
    used_by: list[str] = []


class DeviceList(Wire):
    """The devices that the scheduler knows; `note` says why there are none."""

    object: Literal["list"] = "list"
    data: list[Device]
    note: str | None = None


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
