"""What a job asks for, checked where it enters: the body of `POST /v1/jobs` and the file behind `--spec`.

No torch here: the API process reads and checks specs with this file alone.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, field_validator, model_validator

DIGITS_MODEL = "d2ft_digits"
DIGITS_RATE, RATE = 5e-4, 5e-5  # learning rates of the bundled model, and of any other
# What a job that chooses heads says of them, where it does not say otherwise.
HEAD_WORDS = {"hold": "training", "grain": "coherent", "score": "fisher", "skip_fill": "zero"}
ModelArg = int | float | bool | str
Beta = Annotated[float, Field(ge=0, lt=1)]
MetadataKey = Annotated[str, Field(min_length=1, max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]


class Frozen(BaseModel):
    """Base of the border types: unknown fields are refused, values do not change."""

    # Strict: no word or truth value is taken for a number. Without a bound on strings, one that is not Unicode (a lone
    # surrogate) gets in and cannot be written out again.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, str_max_length=4096)

    @model_validator(mode="before")
    @classmethod
    def _whole_numbers(cls, given: Any) -> Any:
        """JSON has one kind of number: 5.0 is as good as 5."""
        if not isinstance(given, dict):
            return given
        return {name: int(value) if _is_whole(value) else value for name, value in given.items()}


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer() and abs(value) < 2**53


class Ratios(Frozen):
    """Exact counts: of a step's M micro-batches, how many a head runs FULL, FORWARD and SKIP."""

    full: Annotated[int, Field(ge=0)]
    forward: Annotated[int, Field(ge=0)] = 0
    skip: Annotated[int, Field(ge=0)] = 0

    @property
    def total(self) -> int:
        return self.full + self.forward + self.skip


class Budgets(Frozen):
    """Upper bounds as fractions of all-FULL on the same placement; the planner finds the mix."""

    compute: Annotated[float, Field(gt=0, le=1)]
    bytes: Annotated[float, Field(gt=0, le=1)] = 1.0


class Phase(Frozen):
    """A part of the training, `share` of its steps, with its own ratios or budgets; neither means all-FULL."""

    share: Annotated[float, Field(gt=0, le=1)]
    ratios: Ratios | None = None
    budgets: Budgets | None = None

    @model_validator(mode="after")
    def _one_of(self) -> Phase:
        if self.ratios is not None and self.budgets is not None:
            raise ValueError("give ratios or budgets, not both")
        return self


class Lora(Frozen):
    """Low-rank adapters instead of the blocks' own weights: of rank `rank`, scaled by `alpha` / `rank`.

    `targets` are the matrices that get one. The base is frozen, the classifier trains.
    """

    rank: Annotated[int, Field(ge=1, le=1024)] = 8
    alpha: Annotated[float, Field(gt=0, le=4096)] = 16.0
    targets: Annotated[tuple[Literal["qkv", "proj", "fc1", "fc2"], ...], Field(min_length=1, strict=False)] = (
        "qkv", "proj", "fc1", "fc2",
    )  # fmt: skip

    @field_validator("targets")
    @classmethod
    def _once_each(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("a target is given twice")
        return value

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class Method(Frozen):
    """How the work is chosen. Give one of `ratios`, `budgets` and `schedule`; none means all-FULL.

    `strategy` says who chooses: "hardest" whole micro-batches, every head alike, filled with the images that lost most
    when they were last seen (the default). The others choose heads: "hull" the most worthy within each worker's time,
    "cpsat" the same, proved; "two_stage" FULL by backward and then FORWARD by forward score, device by device (the
    paper's way); "random", "uniform" without looking at worth. "full" is all-FULL.

    The rest is about heads, and saying any of it means "hull" where no strategy is given. `hold` says what stays the
    same over a window: "training" which heads are FULL and which FORWARD, with SKIPs drawn for each step; "all" also
    which are SKIP; "none" nothing, every micro-batch is chosen for. `grain`: a worker's heads of a block sit out
    together ("coherent": that saves bytes), or each alone ("scattered"). `score` is what a head is worth; `skip_fill`
    what a skipped head adds. Words not given are those of `HEAD_WORDS`. With `lora` adapters are trained instead.
    """

    type: Literal["d2ft"] = "d2ft"
    ratios: Ratios | None = None
    budgets: Budgets | None = None
    schedule: Annotated[tuple[Phase, ...], Field(max_length=16, strict=False)] = ()
    strategy: Literal["hardest", "hull", "cpsat", "two_stage", "random", "uniform", "full"] | None = None
    hold: Literal["training", "all", "none"] | None = None
    grain: Literal["coherent", "scattered"] | None = None
    score: Literal["fisher", "gradient", "taylor", "weight", "activation", "random"] | None = None
    skip_fill: Literal["zero", "mean", "rescale"] | None = None
    lora: Lora | None = None

    @model_validator(mode="after")
    def _no_heads_of_the_hardest(self) -> Method:
        given = [name for name in HEAD_WORDS if getattr(self, name) is not None]
        if self.strategy == "hardest" and given:
            raise ValueError(
                f"strategy 'hardest' chooses whole micro-batches, and {', '.join(given)} speaks of heads; "
                f"leave it away, or set strategy to 'hull'"
            )
        return self

    @property
    def words(self) -> dict[str, str]:
        """`strategy` and all words about heads, as they hold where they are not given."""
        given = {name: getattr(self, name) for name in HEAD_WORDS}
        strategy = self.strategy or ("hull" if any(given.values()) else "hardest")
        return {"strategy": strategy, **{name: word or HEAD_WORDS[name] for name, word in given.items()}}

    @property
    def chooses_heads(self) -> bool:
        """Whether what a head is worth matters."""
        return self.words["strategy"] not in ("hardest", "full") and self.leaves_out

    @property
    def sorts_images(self) -> bool:
        """Whether the images of a step go into its micro-batches by what they lost last."""
        return self.words["strategy"] == "hardest" and self.leaves_out

    @property
    def leaves_out(self) -> bool:
        return bool(self.ratios or self.budgets or self.schedule)

    def to_plan(self) -> dict[str, Any]:
        """What the planner is asked."""
        return {**self.model_dump(include={"ratios", "budgets", "schedule"}), **self.words}

    @model_validator(mode="after")
    def _one_of(self) -> Method:
        if sum((self.ratios is not None, self.budgets is not None, bool(self.schedule))) > 1:
            raise ValueError("give one of ratios, budgets and schedule")
        total = sum(phase.share for phase in self.schedule)
        if self.schedule and abs(total - 1) > 1e-6:
            raise ValueError(f"the shares of the schedule's phases sum to {total:g}; make them sum to 1")
        return self

    @property
    def all_ratios(self) -> tuple[Ratios, ...]:
        """Every ratios that the job will use at some time."""
        given = (self.ratios, *(phase.ratios for phase in self.schedule))
        return tuple(ratios for ratios in given if ratios is not None)


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


class JobSpec(Frozen):
    """One fine-tuning job.

    `model` is a timm name, or "d2ft_digits" for the small bundled one; `model_args` are passed to `timm.create_model`.
    `dataset` is "digits" or "folder:///path" with `train/CLASS/*.jpg` and `test/` or `val/` beside it; the service
    knows "dataset:NAME", too. Length is `epochs`, or `steps` when that is given. When workers are lost, the job goes on
    with as few as `min_workers`, and takes more in when they come; `workers` may be {"min": 2, "max": 4}. Of the jobs
    that wait, one of higher `priority` goes first; one that has not started after `queue_timeout_s` fails.
    """

    name: Annotated[str, Field(max_length=200)] | None = None
    model: Annotated[str, Field(min_length=1, max_length=200)] = DIGITS_MODEL
    model_args: dict[str, ModelArg] = Field(default_factory=dict)
    weights: Annotated[str, Field(max_length=4096)] | None = None
    img_size: Annotated[int, Field(ge=4, le=2048)] | None = None
    dataset: Annotated[str, Field(min_length=1, max_length=4096)] = "digits"
    images_per_class: Annotated[int, Field(ge=1)] | None = None
    method: Method = Field(default_factory=Method)
    optimiser: Optimiser = Field(default_factory=Optimiser)
    workers: Annotated[int, Field(ge=1, le=256), WithJsonSchema(_NUMBER_OR_RANGE)] = 2
    min_workers: Annotated[int, Field(ge=1, le=256)] | None = None
    micro_batches: Annotated[int, Field(ge=1, le=256)] = 5
    micro_batch_size: Annotated[int, Field(ge=1, le=4096)] = 16
    epochs: Annotated[float, Field(gt=0, le=10_000)] = 3.0
    steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    window: Annotated[int, Field(ge=1, le=100_000)] = 100
    placement: Literal["auto", "split", "whole"] = "auto"
    train_embed: bool = True
    checkpoint: Checkpoints = Field(default_factory=Checkpoints)
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

    @field_validator("dataset")
    @classmethod
    def _known_scheme(cls, value: str) -> str:
        if value != "digits" and not re.match(r"folder:///|dataset:[A-Za-z0-9]", value):
            raise ValueError("a dataset is 'digits', 'folder:///absolute/path' or 'dataset:NAME', a registered one")
        return value

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
        return self.train_embed and self.method.lora is None

    @property
    def fewest_workers(self) -> int:
        """As few as the job goes on with."""
        return self.min_workers or self.workers

    @property
    def filled_optimiser(self) -> Optimiser:
        """The optimiser with a learning rate: the small bundled model bears more than one that was well pretrained."""
        rate = self.optimiser.learning_rate or (DIGITS_RATE if self.model == DIGITS_MODEL else RATE)
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


class RunContext(Frozen):
    """Where one attempt of a job runs: written by the supervisor beside the spec, read by the driver.

    `run_dir` holds this attempt's `events.jsonl` and, at the end, `result/`. `storage_path` is Ray Train's. `cores`
    pins the worker of each rank to a processor core; cores may be shared. With `resume_from`, a directory of
    checkpoints, the run goes on from the newest that is whole. Events are sent to `post_url` with `post_token`, too,
    where the service gives them. `use_gpu` None means: where the cluster has any. `group` counts the groups of workers
    that the attempt has had; `max_losses` of them may be lost by faults of the system.
    """

    job_id: str
    attempt: int = 1
    spec: JobSpec
    run_dir: str
    storage_path: str
    resources_per_worker: dict[str, float] = Field(default_factory=lambda: {"CPU": 0.5})
    use_gpu: bool | None = None
    start_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    cores: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)] | None = None
    resume_from: str | None = None
    group: Annotated[int, Field(ge=0)] = 0
    max_losses: Annotated[int, Field(ge=0)] = 8
    post_url: str | None = None
    post_token: str | None = Field(default=None, repr=False)

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
