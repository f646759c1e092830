"""Dry runs and devices: the plan that a job would get, and what has been measured."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator

from service.schemas.base import Wire
from workers.contract import DIGITS_MODEL, JobSpec, ModelArg
from workers.method import Frozen, Method
from workers.precision import Precision

MAX_DEVICES = 64


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
    precision: Precision = Field(default_factory=Precision)
    micro_batches: int = 5
    micro_batch_size: int = 16
    placement: Literal["auto", "unmixed", "split", "whole"] = "auto"
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
    what it has and what binds it, `heads` per [block][head] owner, ops, worth, time_us and reason.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    object: Literal["plan_preview"] = "plan_preview"
    model: str
    plan: dict[str, Any]
    devices: list[dict[str, Any]] = Field(default_factory=list)
    heads: list[list[dict[str, Any]]] = Field(default_factory=list)
    rounding_loss: float | None = None
    gantt: dict[str, Any] | None = None
    seconds: float | None = None
    warnings: list[str] = Field(default_factory=list)


class Device(Wire):
    """One device as jobs measured it; `rates` per second, `links` by the other device's id.

    `history` are points of its training rate, [when measured, FLOPs per second], oldest first, at least a minute apart.
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
    history: list[tuple[float, int]] = Field(default_factory=list)
    stale: bool = False
    used_by: list[str] = Field(default_factory=list)


class DeviceList(Wire):
    """The devices that the scheduler knows; `note` says why there are none."""

    object: Literal["list"] = "list"
    data: list[Device]
    note: str | None = None
