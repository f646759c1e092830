"""The words of a selection as values: what is asked, what is answered, and what an answer is worth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scheduler.domain import ModelShape, Op, OpTable, Placement, Scores, SolverReport, uniform_ops
from scheduler.errors import InfeasibleError, UserError

STRATEGIES = ("hardest", "hull", "cpsat", "two_stage", "random", "uniform", "full")
HOLDS = ("training", "all", "none")
GRAINS = ("coherent", "scattered")
FORWARD_WEIGHT = (
    2.0  # FORWARD over SKIP against FULL over FORWARD: heads left out cost more accuracy than heads not trained
)
PERIOD = 8  # tables of a cycle, where anything is redrawn


def check_words(strategy: str, hold: str, grain: str) -> None:
    """Raises UserError for a word that is not known."""
    for name, word, known in (("strategy", strategy, STRATEGIES), ("hold", hold, HOLDS), ("grain", grain, GRAINS)):
        if word not in known:
            raise UserError(
                f"'{word}' is not a {name}.",
                code=f"unknown_{name}",
                param=f"method.{name}",
                remedy=f"Use one of {', '.join(known)}.",
            )


@dataclass(frozen=True)
class SelectionRequest:
    """What to select: `ratios` (full, forward, skip), or `compute` and `max_bytes` as fractions of all-FULL."""

    ratios: tuple[int, int, int] | None = None
    compute: float | None = None
    max_bytes: float = 1.0
    strategy: str = "hull"
    hold: str = "training"
    grain: str = "coherent"
    embed_grad: bool = True
    seed: int = 0
    window: int = 0

    @property
    def key(self) -> tuple[int, int]:
        """Everything drawn follows from this."""
        return (self.seed, self.window)

    @property
    def is_all_full(self) -> bool:
        if self.ratios is not None:
            return self.ratios[1] == self.ratios[2] == 0
        return self.compute is None or (self.compute >= 1 and self.max_bytes >= 1)

    def units(self, placement: Placement) -> list[Unit]:
        """What chooses as one: a worker's heads of a block, or each head alone."""
        return groups_of(placement) if self.coherent else heads_of(placement)

    @property
    def coherent(self) -> bool:
        return self.grain == "coherent"

    def check(self) -> None:
        """Raises UserError for words that are not known, and for amounts that the strategy "full" cannot keep."""
        check_words(self.strategy, self.hold, self.grain)
        if self.strategy == "full" and not self.is_all_full:
            raise UserError(
                "Strategy 'full' leaves nothing out, so it cannot keep ratios or budgets.",
                code="strategy_full",
                param="method.strategy",
                remedy="Leave ratios and budgets away, or choose another strategy.",
            )

    def checked_ratios(self, num_micro_batches: int) -> tuple[int, int, int]:
        """The ratios, if they can be; raises UserError or InfeasibleError (a kind of UserError)."""
        full, forward, skip = self.ratios or (0, 0, 0)
        if full + forward + skip != num_micro_batches or min(full, forward, skip) < 0:
            raise UserError(
                f"ratios {full}:{forward}:{skip} do not sum to the step's {num_micro_batches} micro-batches.",
                code="ratios_sum",
                param="method.ratios",
                remedy="Make full + forward + skip equal micro_batches.",
            )
        return full, forward, skip


def starving(ratios: tuple[int, int, int]) -> InfeasibleError:
    """The error for ratios that leave something without a FULL head."""
    asked = ":".join(map(str, ratios))
    message = f"ratios {asked} leave some micro-batches without a FULL head on this placement."
    if ratios[0] == 0:
        message = "ratios with full = 0 train no head."
    return InfeasibleError(
        message, code="ratios_infeasible", param="method.ratios", remedy="Ask for more FULL or fewer SKIP."
    )


@dataclass(frozen=True, eq=False)
class Selection:
    """Step s of the window runs cycle[s % len(cycle)]."""

    cycle: tuple[OpTable, ...]
    report: SolverReport


@dataclass(frozen=True)
class Unit:
    """Heads of one block, all of one worker, that do one thing together."""

    block: int
    worker: int
    heads: tuple[int, ...]


def groups_of(placement: Placement) -> list[Unit]:
    """One unit per (block, worker)."""
    blocks = range(len(placement.owner_LH))
    return [Unit(b, w, placement.heads_of(w, b)) for b in blocks for w in placement.holders(b)]


def heads_of(placement: Placement) -> list[Unit]:
    """One unit per head."""
    owners = enumerate(placement.owner_LH.tolist())
    return [Unit(block, worker, (head,)) for block, row in owners for head, worker in enumerate(row)]


def all_full(shape: ModelShape, num_micro_batches: int) -> Selection:
    """Every head FULL for every micro-batch."""
    ops_LHM = uniform_ops(shape, num_micro_batches, Op.FULL)
    return Selection((ops_LHM,), SolverReport("all-FULL", "EXACT", 1.0, 1.0, 0.0, 0.0))


def worth_fraction(cycle: tuple[OpTable, ...], scores: Scores) -> float:
    """Worth of a mean step, where all-FULL is 1: forward worth of what runs, and backward worth of what trains.

    Where every step's micro-batches have their own worth, and the cycle as many tables as these steps, by that.
    """
    ops = np.stack(cycle)
    forward_LH = FORWARD_WEIGHT * scores.forward_LH
    runs_LH = (ops >= int(Op.FORWARD)).mean(axis=(0, 3))
    trains = ops == int(Op.FULL)
    backward_TLHM = scores.backward_TLHM
    if backward_TLHM is None or len(backward_TLHM) != len(cycle):
        trained, total = (scores.backward_LH * trains.mean(axis=(0, 3))).sum(), scores.backward_LH.sum()
    else:
        count = ops.shape[0] * ops.shape[3]
        trained, total = (backward_TLHM * trains).sum() / count, backward_TLHM.sum() / count
    return float(((forward_LH * runs_LH).sum() + trained) / (forward_LH.sum() + total))
