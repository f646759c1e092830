"""What a job asks for, checked where it enters: the body of `POST /v1/jobs` and the file behind `--spec`.

No torch here: the API process reads and checks specs with this file alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema, field_validator, model_validator

from workers.method import Frozen, Method
from workers.precision import Precision

DIGITS_MODEL = "d2ft_digits"
# Learning rates: where only adapters or the classifier train, of the bundled model, and of anything else.
ADDED_RATE, DIGITS_RATE, RATE = 2e-3, 5e-4, 5e-5
# How the addresses of datasets begin; `workers.sources.address` looks at the rest.
DATASET = r"digits\Z|dataset:[A-Za-z0-9]|(folder|parquet|webdataset)(:///|\+(s3|gs)://[^/])|torchvision:\w|hf:."
HUB = "hf-hub:"
_HUB_WEIGHTS = re.compile(rf"{HUB}[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*@[0-9a-f]{{40}}", re.ASCII)
ModelArg = int | float | bool | str
Beta = Annotated[float, Field(ge=0, lt=1)]
MetadataKey = Annotated[str, Field(min_length=1, max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]


class Optimiser(Frozen):
    """AdamW with linear warm-up and cosine decay to zero; gradients clipped by global norm (0 switches it off).

    Without a learning rate it is the model's: see `JobSpec.filled_optimiser`.
    """

    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.05
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.999)
    warmup_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    clip_norm: Annotated[float, Field(ge=0)] = 1.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0


Share = Annotated[float, Field(gt=0, le=1)]
# What timm understands: magnitude, layers, probability, noise of the magnitude and its bound, …
RANDAUGMENT = r"rand(-(m\d{1,2}|n\d|p[01](\.\d+)?|mstd\d{1,3}(\.\d+)?|mmax\d{1,2}|inc[01]))*"


class Augment(Frozen):
    """How training images are changed at random; by default not at all. The draws follow from `seed` alone.

    `flip` mirrors half of them. `crop_scale` (smallest, largest) shows a part of that share of the image's area, from
    3:4 to 4:3, in place of the model's own framing. `randaugment` is timm's, in its words: "rand-m9-mstd0.5-inc1".
    `erasing` is the probability that a rectangle is blanked. `mixup` and `cutmix` are the alphas with which images, and
    their labels, are mixed in pairs; with both, one of them is drawn for each micro-batch.
    """

    flip: bool = False
    crop_scale: Annotated[tuple[Share, Share], Field(strict=False)] | None = None
    randaugment: Annotated[str, Field(pattern=f"^{RANDAUGMENT}$", max_length=100)] | None = None
    erasing: Annotated[float, Field(ge=0, le=1)] = 0.0
    mixup: Annotated[float, Field(ge=0, le=100)] = 0.0
    cutmix: Annotated[float, Field(ge=0, le=100)] = 0.0

    @field_validator("crop_scale")
    @classmethod
    def _smallest_first(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and value[0] > value[1]:
            raise ValueError(f"crop_scale is [smallest, largest], and {value[0]:g} is more than {value[1]:g}")
        return value

    @field_validator("mixup", "cutmix")
    @classmethod
    def _no_tiny_alpha(cls, value: float) -> float:
        if 0 < value < 0.01:
            raise ValueError("an alpha is 0, which means no mixing, or at least 0.01")
        return value

    @property
    def wanted(self) -> bool:
        return self != Augment()


_NUMBER = {"type": "integer", "minimum": 1, "maximum": 256}
_RANGE = {"type": "object", "properties": {"min": _NUMBER, "max": _NUMBER}, "required": ["min", "max"]}
_NUMBER_OR_RANGE = {"anyOf": [_NUMBER, {**_RANGE, "additionalProperties": False}]}


class Checkpoints(Frozen):
    """When a run keeps what it has learnt: `every_s` seconds, or `every_steps`; both None means only when it is paused.

    The newest `keep` stay. With `evaluate` the model is tried on the test images at each of them, and the best of them
    all stays, too.
    """

    every_s: Annotated[float, Field(ge=1, le=10**6)] | None = 300.0
    every_steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    keep: Annotated[int, Field(ge=1, le=1000)] = 2
    evaluate: bool = False


class Export(Frozen):
    """What other tools get of a run: `onnx` the model as `model.onnx` too, `tensorboard` event files of its steps."""

    onnx: bool = False
    tensorboard: bool = True


class JobSpec(Frozen):
    """One fine-tuning job.

    `model` is a timm name, or "d2ft_digits" for the small bundled one; `model_args` are passed to `timm.create_model`.
    `dataset` is "digits" or an address: "folder:///path" with `train/CLASS/*.jpg` and `test/` or `val/` beside it,
    "parquet:///path", "webdataset:///path" (workers/README.md has them all); the service knows "dataset:NAME", too.
    Length is `epochs`, or `steps` when that is given. When workers are lost, the job goes on with as few as
    `min_workers`, and takes more in when they come; `workers` may be {"min": 2, "max": 4}. A worker's process may take
    `worker_memory_bytes` in all, of a GPU's memory where it has one: the plan divides the model so, or is refused. Of
    the jobs that wait, one of higher `priority` goes first; one that has not started after `queue_timeout_s` fails.
    """

    name: Annotated[str, Field(max_length=200)] | None = None
    model: Annotated[str, Field(min_length=1, max_length=200)] = DIGITS_MODEL
    model_args: dict[str, ModelArg] = Field(default_factory=dict)
    weights: Annotated[str, Field(max_length=4096)] | None = None
    img_size: Annotated[int, Field(ge=4, le=2048)] | None = None
    dataset: Annotated[str, Field(min_length=1, max_length=4096)] = "digits"
    images_per_class: Annotated[int, Field(ge=1)] | None = None
    augment: Augment = Field(default_factory=Augment)
    method: Method = Field(default_factory=Method)
    optimiser: Optimiser = Field(default_factory=Optimiser)
    precision: Precision = Field(default_factory=Precision)
    workers: Annotated[int, Field(ge=1, le=256), WithJsonSchema(_NUMBER_OR_RANGE)] = 2
    min_workers: Annotated[int, Field(ge=1, le=256)] | None = None
    micro_batches: Annotated[int, Field(ge=1, le=256)] = 5
    micro_batch_size: Annotated[int, Field(ge=1, le=4096)] = 16
    epochs: Annotated[float, Field(gt=0, le=10_000)] = 3.0
    steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    window: Annotated[int, Field(ge=1, le=100_000)] = 100
    placement: Literal["auto", "unmixed", "split", "whole"] = "auto"
    worker_memory_bytes: Annotated[int, Field(ge=1 << 20, le=1 << 50)] | None = None
    train_embed: bool = True
    checkpoint: Checkpoints = Field(default_factory=Checkpoints)
    export: Export = Field(default_factory=Export)
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    queue_timeout_s: Annotated[float, Field(gt=0, le=10**8)] | None = None
    metadata: dict[MetadataKey, MetadataValue] = Field(default_factory=dict, max_length=16)

    @model_validator(mode="before")
    @classmethod
    def _worker_range(cls, given: Any) -> Any:
        """{"workers": {"min": 2, "max": 4}} is another way to write 4 workers and 2 min_workers."""
        if not isinstance(given, dict) or not isinstance(given.get("workers"), dict):
            return given
        bounds = given["workers"]
        if set(bounds) != {"min", "max"}:
            raise ValueError("workers is a number, or an object with min and max")
        if given.get("min_workers") not in (None, bounds["min"]):
            raise ValueError("give workers.min or min_workers, not both")
        return {**given, "workers": bounds["max"], "min_workers": bounds["min"]}

    @field_validator("model_args")
    @classmethod
    def _known_args(cls, value: dict[str, ModelArg]) -> dict[str, ModelArg]:
        for key in value:
            if key not in MODEL_ARGS:
                raise ValueError(f"'{key}' is not a model argument; known are {', '.join(MODEL_ARGS)}")
        return value

    @field_validator("weights")
    @classmethod
    def _pinned(cls, value: str | None) -> str | None:
        if value is not None and value.startswith(HUB) and not _HUB_WEIGHTS.fullmatch(value):
            raise ValueError(f"weights of the hub are '{HUB}ORG/NAME@REVISION', the 40 hex digits of a commit")
        return value

    @field_validator("dataset")
    @classmethod
    def _known_scheme(cls, value: str) -> str:
        if not re.match(DATASET, value):
            raise ValueError(
                "a dataset is 'digits', 'dataset:NAME' (a registered one), or an address such as "
                "'folder:///absolute/path', 'parquet:///absolute/path', 'webdataset+s3://bucket/prefix'"
            )
        return value

    @model_validator(mode="after")
    def _digits_as_they_are(self) -> JobSpec:
        if self.dataset == "digits" and self.augment.wanted:
            raise ValueError("augment does nothing to 'digits', where a mirrored 2 is no 2; leave it away")
        return self

    @model_validator(mode="after")
    def _ratios_sum(self) -> JobSpec:
        for ratios in self.method.all_ratios:
            if ratios.total != self.micro_batches:
                raise ValueError(
                    f"method.ratios sum to {ratios.total} but a step has {self.micro_batches} micro-batches; "
                    f"make full + forward + skip = micro_batches"
                )
        return self

    @model_validator(mode="after")
    def _fewest_workers(self) -> JobSpec:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers is {self.min_workers}, more than the {self.workers} workers; lower it")
        return self

    @property
    def trains_embedding(self) -> bool:
        return self.train_embed and not self.method.freezes_embedding

    @property
    def fewest_workers(self) -> int:
        """As few as the job goes on with."""
        return self.min_workers or self.workers

    @property
    def filled_optimiser(self) -> Optimiser:
        """The optimiser with a learning rate: the bundled model, adapters and classifiers bear more than the rest."""
        usual = DIGITS_RATE if self.model == DIGITS_MODEL else RATE
        if self.method.lora is not None or self.method.head_only:
            usual = ADDED_RATE
        rate = self.optimiser.learning_rate or usual
        return self.optimiser.model_copy(update={"learning_rate": rate})


MODEL_ARGS = (
    "img_size",
    "patch_size",
    "in_chans",
    "embed_dim",
    "depth",
    "num_heads",
    "mlp_ratio",
    "qkv_bias",
    "qk_norm",
    "init_values",
    "class_token",
    "reg_tokens",
    "global_pool",
)


class DriverContext(Frozen):
    """What every driver is told of the attempt that it makes, written by the supervisor.

    `run_dir` holds the attempt's event file; `use_gpu` None means: where the cluster has any.
    """

    attempt: int = 1
    run_dir: str
    storage_path: str
    resources_per_worker: dict[str, float] = Field(default_factory=lambda: {"CPU": 0.5})
    use_gpu: bool | None = None
    start_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    post_url: str | None = None
    post_token: str | None = Field(default=None, repr=False)


class RunContext(DriverContext):
    """Where one attempt of a job runs.

    `run_dir` holds its `events.jsonl` and, at the end, `result/`. `storage_path` is Ray Train's. `cores`
    pins the worker of each rank to a processor core; cores may be shared. With `resume_from`, a directory of
    checkpoints, the run goes on from the newest that is whole. Events are sent to `post_url` with `post_token`, too,
    where the service gives them. `group` counts the groups of workers that the attempt has had; `max_losses` of them
    may be lost by faults of the system. Of a run that is `outside`, which no service has ordered, the driver alone
    posts, so that no worker needs the token, and it prints what goes on.
    """

    job_id: str
    spec: JobSpec
    cores: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)] | None = None
    resume_from: str | None = None
    group: Annotated[int, Field(ge=0)] = 0
    max_losses: Annotated[int, Field(ge=0)] = 8
    outside: bool = False

    @property
    def worker_memory_bytes(self) -> int | None:
        """What a worker may take of the memory that its model is in: as the job says, or as Ray books, if that is less.

        Ray's `memory` is the machine's, and says nothing of a GPU's.
        """
        booked = None if self.use_gpu else self.resources_per_worker.get("memory")
        return min((int(each) for each in (self.spec.worker_memory_bytes, booked) if each), default=None)

    @property
    def vault_dir(self) -> str:
        """Where the job's checkpoints lie, next to what Ray Train keeps."""
        return str(Path(self.storage_path) / "checkpoints" / self.job_id)

    @property
    def scheduler_dir(self) -> str:
        """Where the scheduler actor keeps what outlives it."""
        return str(Path(self.storage_path) / "scheduler")

    @model_validator(mode="after")
    def _a_core_each(self) -> RunContext:
        if self.cores is not None and len(self.cores) != self.spec.workers:
            raise ValueError(f"{len(self.cores)} cores for {self.spec.workers} workers")
        return self


def put(body: dict[str, Any], place: Sequence[str], value: Any) -> dict[str, Any]:
    """Set a field of a spec's JSON by its path, making objects on the way; the object that has it."""
    for part in place[:-1]:
        if not isinstance(body.get(part), dict):
            body[part] = {}
        body = body[part]
    body[place[-1]] = value
    return body
