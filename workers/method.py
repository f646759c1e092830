"""How the work of a job is chosen, and what of the model trains: the part of a spec that the planner is asked about.

Beside it the base of all types that enter from outside. No torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

# What a job that chooses heads says of them, where it does not say otherwise.
HEAD_WORDS = {"hold": "training", "grain": "coherent", "score": "fisher", "skip_fill": "zero"}


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


class Freeze(Frozen):
    """What does not train: the embedding, and with it `blocks`, the first so many of them, or `trunk`.

    The trunk is what the heads of a block share: norms, layer scales, output biases.
    """

    trunk: bool = False
    blocks: Annotated[int, Field(ge=0, le=1024)] = 0

    @model_validator(mode="after")
    def _something(self) -> Freeze:
        if not self.trunk and not self.blocks:
            raise ValueError("freeze holds nothing still; set blocks or trunk, or leave it away")
        return self


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
    what a skipped head adds. Words not given are those of `HEAD_WORDS`. With `lora` adapters are trained instead, with
    `freeze` less of the model, with `head_only` the classifier's last layer alone.
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
    freeze: Freeze | None = None
    head_only: bool = False

    @model_validator(mode="after")
    def _one_way_to_freeze(self) -> Method:
        if self.head_only and (self.lora is not None or self.freeze is not None):
            raise ValueError("with head_only nothing but the classifier trains; leave lora and freeze away")
        if self.lora is not None and self.freeze is not None and self.freeze.trunk:
            raise ValueError("with lora the trunk is frozen already; leave freeze.trunk away")
        if self.head_only and self.words["strategy"] not in ("hardest", "full"):
            raise ValueError("with head_only no head trains, so none can be chosen; leave strategy and its words away")
        return self

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
    def freezes_embedding(self) -> bool:
        return self.lora is not None or self.freeze is not None or self.head_only

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
