"""What a sweep asks for: the body of `POST /v1/sweeps` and the file behind `python -m workers.sweep --spec`.

No torch and no Ray: the API process reads and checks sweeps with this file alone.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, JsonValue, Tag, ValidationError, field_validator, model_validator

from workers.contract import DriverContext, JobSpec, put
from workers.method import Frozen

Metric = Literal["accuracy", "loss", "compute", "bytes", "seconds"]
Goal = Literal["max", "min"]
MOST_TRIALS = 512
DRAWS_EACH = 20  # of a small space the same setting may be drawn again and again
TRIED = 64  # drawn settings of an endless space that are tried out when it enters
# What may be searched: fields of a job that change how it trains, by their path.
SEARCHED = (
    "method.ratios", "method.budgets", "method.budgets.compute", "method.budgets.bytes", "method.strategy",
    "method.hold", "method.grain", "method.score", "method.skip_fill", "method.lora", "method.lora.rank",
    "method.lora.alpha", "method.freeze", "method.freeze.blocks", "method.head_only", "optimiser.learning_rate",
    "optimiser.weight_decay", "optimiser.warmup_fraction", "optimiser.label_smoothing", "augment.mixup",
    "augment.cutmix", "precision.compute", "precision.wire", "precision.recompute", "micro_batches",
    "micro_batch_size", "steps", "epochs", "placement", "workers", "seed",
)  # fmt: skip


class Choice(Frozen):
    """One of `values`; a grid takes all of them."""

    values: Annotated[tuple[JsonValue, ...], Field(min_length=1, max_length=MOST_TRIALS, strict=False)]

    @field_validator("values")
    @classmethod
    def _once_each(cls, values: tuple[JsonValue, ...]) -> tuple[JsonValue, ...]:
        seen = [json.dumps(value, sort_keys=True) for value in values]
        if twice := [text for text in seen if seen.count(text) > 1]:
            raise ValueError(f"{twice[0]} is given twice; a setting is tried once")
        return values


class Span(Frozen):
    """A number from `low` to `high`; with `log` evenly in its logarithm, with `whole` a whole one."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    @model_validator(mode="after")
    def _rising(self) -> Span:
        if self.low >= self.high:
            raise ValueError(f"low is {self.low:g} and high {self.high:g}; low comes first")
        if self.log and self.low <= 0:
            raise ValueError("with log, low is more than 0")
        return self

    def draw(self, rng: random.Random) -> float | int:
        """A number of the span."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        drawn = rng.uniform(low, high)
        drawn = math.exp(drawn) if self.log else drawn
        return round(drawn) if self.whole else drawn


def _kind(entry: Any) -> str | None:
    """Which of the two an entry of a space is; None of neither."""
    if isinstance(entry, Choice) or (isinstance(entry, dict) and "values" in entry):
        return "values"
    return "span" if isinstance(entry, Span) or (isinstance(entry, dict) and {"low", "high"} & set(entry)) else None


Dimension = Annotated[
    Annotated[Choice, Tag("values")] | Annotated[Span, Tag("span")],
    Discriminator(
        _kind,
        custom_error_type="neither_values_nor_span",
        custom_error_message='give {"values": […]} or {"low": …, "high": …}, with "log" or "whole" where you like',
    ),
]


class Search(Frozen):
    """How settings are found: all of a `grid`, `samples` of them at `random`, or as `optuna` proposes from what it saw.

    With several objectives optuna looks for their front. Everything drawn follows from `seed`.
    """

    type: Literal["grid", "random", "optuna"] = "grid"
    samples: Annotated[int, Field(ge=1, le=MOST_TRIALS)] = 8
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


class Asha(Frozen):
    """Poor trials end early (ASHA, arXiv 1810.05934): after `grace_steps`, and at each `reduction` times as many steps
    but the best 1 / `reduction` of those that came so far."""

    grace_steps: Annotated[int, Field(ge=1, le=10_000_000)]
    reduction: Annotated[int, Field(ge=2, le=16)] = 3


def _accuracy() -> dict[Metric, Goal]:
    return {"accuracy": "max"}


class SweepSpec(Frozen):
    """A sweep: `job` is what all trials have in common, `space` says by a field's path what is tried of it.

    `objectives` are what is looked for, the first of them by ASHA. With `baselines` two points are always beside the
    trials: plain full fine-tuning, and full fine-tuning stopped at the compute of the knee.
    """

    name: Annotated[str, Field(max_length=200)] | None = None
    job: JobSpec = Field(default_factory=JobSpec)
    space: Annotated[dict[str, Dimension], Field(min_length=1, max_length=16)]
    search: Search = Field(default_factory=Search)
    objectives: Annotated[dict[Metric, Goal], Field(min_length=1, max_length=3)] = Field(default_factory=_accuracy)
    asha: Asha | None = None
    baselines: bool = True
    at_once: Annotated[int, Field(ge=1, le=64)] = 1
    metadata: dict[Annotated[str, Field(min_length=1, max_length=64)], Annotated[str, Field(max_length=512)]] = Field(
        default_factory=dict, max_length=16
    )

    @field_validator("space")
    @classmethod
    def _known_paths(cls, value: dict[str, Choice | Span]) -> dict[str, Choice | Span]:
        for path in value:
            if path not in SEARCHED:
                raise ValueError(f"'{path}' cannot be searched; {', '.join(SEARCHED)} can")
        for one, other in itertools.permutations(value, 2):
            if other.startswith(f"{one}."):
                raise ValueError(f"'{one}' and '{other}' speak of the same field; leave one of them away")
        return value

    @model_validator(mode="after")
    def _a_grid_is_finite(self) -> SweepSpec:
        if self.search.type == "grid":
            if endless := [path for path, of in self.space.items() if isinstance(of, Span)]:
                raise ValueError(
                    f"a grid needs values, and {', '.join(endless)} is a span; give values, "
                    "or search by random or optuna"
                )
            if self.num_trials > MOST_TRIALS:
                raise ValueError(f"the grid has {self.num_trials} settings, more than {MOST_TRIALS}; search by random")
        first = next(iter(self.objectives))
        if self.asha is not None and first not in ("accuracy", "loss"):
            raise ValueError(f"asha looks at accuracy or loss while trials train, and {first} is the first objective")
        if self.asha is not None and first == "accuracy" and not self.job.checkpoint.evaluate:
            raise ValueError(
                "asha needs accuracies while trials train; set job.checkpoint to evaluate, every so many steps"
            )
        return self

    @model_validator(mode="after")
    def _jobs_that_can_be(self) -> SweepSpec:
        for setting in self._settings_tried():
            try:
                self.trial(setting)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(str(part) for part in first["loc"])
                said = first["msg"].removeprefix("Value error, ")
                raise ValueError(f"space: with {words(setting)}: {where + ': ' if where else ''}{said}") from None
        return self

    @property
    def num_trials(self) -> int:
        """How many settings there will be at most, baselines apart."""
        if self.search.type != "grid":
            return self.search.samples
        return math.prod(len(of.values) for of in self.space.values() if isinstance(of, Choice))

    def settings(self) -> list[dict[str, Any]]:
        """All settings of a grid, or the drawn ones, each once; a small space may hold fewer than `samples`.

        Of optuna's search there is no list, since each follows from what those before it have shown.
        """
        if self.search.type == "grid":
            return list(self.grid())
        found: dict[str, dict[str, Any]] = {}
        for setting in itertools.islice(self._drawn(), DRAWS_EACH * self.search.samples):
            found.setdefault(json.dumps(setting, sort_keys=True), setting)
            if len(found) == self.search.samples:
                break
        return list(found.values())

    def grid(self) -> Iterator[dict[str, Any]]:
        """All settings of a space of values, the last field's first."""
        values = [of.values for of in self.space.values() if isinstance(of, Choice)]
        return (dict(zip(self.space, setting, strict=True)) for setting in itertools.product(*values))

    def trial(self, setting: Mapping[str, Any]) -> JobSpec:
        """The job of a setting, {path: value}. Raises ValidationError where it can be none."""
        body = self.job.model_dump(mode="json", exclude_defaults=True)
        for path, value in setting.items():
            place = path.split(".")
            holder = put(body, place, _as_counts(value) if path == "method.ratios" else value)
            if value is None:  # the field as it is by default
                del holder[place[-1]]
        return JobSpec.model_validate(body)

    def full(self, share: float = 1.0, steps: float | None = None) -> JobSpec:
        """Plain full fine-tuning, or that for a `share` of the length: of `steps`, those that it took, if known."""
        body = self.job.model_dump(mode="json", exclude_defaults=True) | {"method": {}}
        if share < 1 and steps is not None:
            body["steps"] = max(1, round(steps * share))
        elif share < 1:
            length = "epochs" if self.job.steps is None else "steps"
            of = getattr(self.job, length) * share
            body[length] = of if length == "epochs" else max(1, round(of))
        return JobSpec.model_validate(body)

    def tried(self) -> Iterator[JobSpec]:
        """The jobs of the space: all of a grid, of an endless space some as it is drawn from."""
        return (self.trial(setting) for setting in self._settings_tried())

    def _settings_tried(self) -> Iterator[dict[str, Any]]:
        if all(isinstance(of, Choice) for of in self.space.values()):
            yield from itertools.islice(self.grid(), MOST_TRIALS)
            return
        yield from itertools.islice(self._drawn(), TRIED)

    def _drawn(self) -> Iterator[dict[str, Any]]:
        """Settings without end, as `seed` has them."""
        rng = random.Random(self.search.seed)
        while True:
            yield {
                path: of.draw(rng) if isinstance(of, Span) else rng.choice(of.values) for path, of in self.space.items()
            }


class SweepContext(DriverContext):
    """Where one attempt of a sweep runs.

    With `post_url`, the service's `…/v1/runs`, its trials are jobs of the service, which it speaks to with
    `post_token`; without, it runs them itself, each under `run_dir/trials/KEY`. A new attempt of the same sweep has the
    same `storage_path`, and goes on where the one before it was.
    """

    sweep_id: str
    spec: SweepSpec


def _as_counts(value: Any) -> Any:
    """[3, 0, 2] is short for {"full": 3, "forward": 0, "skip": 2}."""
    if isinstance(value, list | tuple) and len(value) == 3:
        return dict(zip(("full", "forward", "skip"), value, strict=True))
    return value


def words(setting: Mapping[str, Any]) -> str:
    """A setting for people."""
    return ", ".join(f"{path} = {value}" for path, value in setting.items())
