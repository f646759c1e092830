"""What a job asks of its plans: ratios, budgets or a schedule of them, and the words of selection and placement."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from scheduler.selection import SelectionRequest, check_words


@dataclass(frozen=True)
class Phase:
    """A part of the training, `share` of its steps, with its own ratios or budgets."""

    share: float
    ratios: tuple[int, int, int] | None = None
    compute: float | None = None
    max_bytes: float = 1.0


@dataclass(frozen=True)
class PlanRequest:
    """What a job asks of its plans.

    `ratios` (full, forward, skip), or `compute` with `max_bytes` as fractions of all-FULL; neither means all-FULL; or a
    `schedule` of phases, see `at`. `strategy`, `hold` and `grain` are words of `selection`. `placement` is a mode of
    `propose`. `embed_grad` says whether the embedding is trained.
    """

    ratios: tuple[int, int, int] | None = None
    compute: float | None = None
    max_bytes: float = 1.0
    schedule: tuple[Phase, ...] = ()
    strategy: str = "hull"
    hold: str = "training"
    grain: str = "coherent"
    score: str = "fisher"
    skip_fill: str = "zero"
    placement: str = "auto"
    embed_grad: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_words(self.strategy, self.hold, self.grain)

    def at(self, progress: float) -> PlanRequest:
        """The request that holds when `progress` (0 to 1) of the training is done: the schedule's phase, if any."""
        if not self.schedule:
            return self
        ends = np.cumsum([phase.share for phase in self.schedule])
        phase = self.schedule[min(int(np.searchsorted(ends, progress + 1e-9, side="right")), len(ends) - 1)]
        return replace(self, ratios=phase.ratios, compute=phase.compute, max_bytes=phase.max_bytes, schedule=())

    @property
    def chooses_heads(self) -> bool:
        """Whether what a head is worth matters."""
        return self.strategy not in ("hardest", "full") and (self.ratios is not None or self.compute is not None)

    def selection(self, window: int) -> SelectionRequest:
        """What selection is asked in a window; a schedule counts as it is at the start."""
        now = self.at(0.0)
        return SelectionRequest(
            ratios=now.ratios,
            compute=now.compute,
            max_bytes=now.max_bytes,
            strategy=self.strategy,
            hold=self.hold,
            grain=self.grain,
            embed_grad=self.embed_grad,
            seed=self.seed,
            window=window,
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PlanRequest:
        """From the job's words: `ratios`, `budgets` and `schedule` as in the job's method may be absent or None."""
        rest = {key: value for key, value in data.items() if key not in ("ratios", "budgets", "schedule")}
        schedule = tuple(Phase(share=phase["share"], **_amounts(phase)) for phase in data.get("schedule") or ())
        return cls(schedule=schedule, **_amounts(data), **rest)

    def to_dict(self) -> dict[str, Any]:
        """Inverse of `from_dict`."""
        keys = ("strategy", "hold", "grain", "score", "skip_fill", "placement", "embed_grad", "seed")
        schedule = [{"share": phase.share, **_spoken(phase)} for phase in self.schedule]
        return {**_spoken(self), "schedule": schedule, **{key: getattr(self, key) for key in keys}}


def _amounts(data: dict[str, Any]) -> dict[str, Any]:
    ratios, budgets = data.get("ratios"), data.get("budgets")
    return {
        "ratios": ratios and (ratios["full"], ratios.get("forward", 0), ratios.get("skip", 0)),
        "compute": budgets and budgets["compute"],
        "max_bytes": (budgets or {}).get("bytes", 1.0),
    }


def _spoken(asked: PlanRequest | Phase) -> dict[str, Any]:
    ratios = asked.ratios and dict(zip(("full", "forward", "skip"), asked.ratios, strict=True))
    budgets = asked.compute and {"compute": asked.compute, "bytes": asked.max_bytes}
    return {"ratios": ratios or None, "budgets": budgets or None}
