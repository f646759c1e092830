"""Selection: which op each head runs for each micro-batch, in two parts.

    static    per window: which heads are FULL, which FORWARD            (`knapsack`)
    dynamic   per step of a cycle: which micro-batches a worker's heads of a block sit out   (`draws`)

Asked as exact ratios F:O:S of a step's M micro-batches, or as budgets on compute and bytes (`budgets`).

| strategy | FULL / FORWARD | SKIP |
|---|---|---|
| held | still for the window, F/(F+O) of all heads | coherent, S of M, redrawn per step |
| coherent | redrawn per (worker, block) and step | coherent |
| scattered | redrawn per head and step | per head |
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scheduler.domain import Op, OpTable, Placement, Scores, SolverReport
from scheduler.draws import Draw, Swing, held_cycle, redrawn_cycle
from scheduler.errors import InfeasibleError, UserError
from scheduler.knapsack import BoolArray, hold

STRATEGIES = ("held", "coherent", "scattered")
FORWARD_WEIGHT = (
    2.0  # FORWARD over SKIP against FULL over FORWARD: heads left out cost more accuracy than heads not trained
)
TOGETHER = 0.5  # unless bytes are short, half of the blocks follow the one below


@dataclass(frozen=True)
class SelectionRequest:
    """What to select: `ratios` (full, forward, skip), or `compute` and `max_bytes` as fractions of all-FULL."""

    ratios: tuple[int, int, int] | None = None
    compute: float | None = None
    max_bytes: float = 1.0
    strategy: str = "held"
    embed_grad: bool = True
    seed: int = 0
    window: int = 0

    @property
    def key(self) -> tuple[int, int]:
        """Everything drawn follows from this."""
        return (self.seed, self.window)

    @property
    def is_all_full(self) -> bool:
        budget_free = self.compute is None or (self.compute >= 1 and self.max_bytes >= 1)
        return self.ratios is None and budget_free


@dataclass(frozen=True, eq=False)
class Selection:
    """Step s of the window runs cycle[s % len(cycle)]."""

    cycle: tuple[OpTable, ...]
    report: SolverReport


def select_ratios(request: SelectionRequest, placement: Placement, scores: Scores, num_micro_batches: int) -> Selection:
    """A selection whose counts over all (head, micro-batch) are exactly the ratios, in every table.

    Raises UserError when they do not sum to the step's micro-batches, InfeasibleError when a micro-batch would train
    nothing.
    """
    full, forward, skip = _checked(request, num_micro_batches)
    draw = Draw(num_micro_batches, request.key, TOGETHER)
    try:
        if request.strategy == "held":
            return _held(placement, scores, full, forward, skip, draw)
        cycle = redrawn_cycle(placement, request.strategy == "scattered", full * placement.owner_LH.size, skip, draw)
    except InfeasibleError as error:
        raise InfeasibleError(
            f"ratios {full}:{forward}:{skip} leave some micro-batches without a FULL head on this placement.",
            code="ratios_infeasible",
            param="method.ratios",
            remedy="Ask for more FULL or fewer SKIP.",
        ) from error
    worth = worth_fraction(cycle, scores)
    return Selection(
        cycle, SolverReport(f"drawn {request.strategy}", "EXACT", worth, worth, 0.0, 0.0, "counts are exact per unit")
    )


def all_full(placement: Placement, num_micro_batches: int) -> Selection:
    """Every head FULL for every micro-batch."""
    ops_LHM = np.full((*placement.owner_LH.shape, num_micro_batches), int(Op.FULL), dtype=np.int8)
    return Selection((ops_LHM,), SolverReport("all-FULL", "EXACT", 1.0, 1.0, 0.0, 0.0))


def worth_fraction(cycle: tuple[OpTable, ...], scores: Scores) -> float:
    """Worth of a mean step, where all-FULL is 1: forward worth of what runs, and backward worth of what trains."""
    ops = np.stack(cycle)
    runs_LH, trains_LH = ((ops >= int(op)).mean(axis=(0, 3)) for op in (Op.FORWARD, Op.FULL))
    worth = FORWARD_WEIGHT * scores.forward_LH * runs_LH + scores.backward_LH * trains_LH
    return float(worth.sum() / (FORWARD_WEIGHT * scores.forward_LH + scores.backward_LH).sum())


def pick_swing(worth_LH: np.ndarray, full_LH: BoolArray, placement: Placement, runs: int) -> Swing | None:
    """The head that makes up the rest of a total: the most worthy left, if possible where its worker trains anyway."""
    if runs <= 0 or full_LH.all():
        return None
    owner_LH = placement.owner_LH
    busy_LH = np.array([[full_LH[b][row == w].any() for w in row] for b, row in enumerate(owner_LH)])
    rank_LH = np.where(full_LH, -np.inf, worth_LH + busy_LH * (1.0 + worth_LH.max()))
    block, head = np.unravel_index(int(np.argmax(rank_LH)), rank_LH.shape)
    return Swing(int(block), int(head), runs)


def _held(placement: Placement, scores: Scores, full: int, forward: int, skip: int, draw: Draw) -> Selection:
    heads = placement.owner_LH.size
    total, rest = divmod(heads * full, full + forward)
    held = hold(scores.backward_LH, placement, total)
    swing = pick_swing(scores.backward_LH, held.full_LH, placement, rest)
    cycle = held_cycle(placement, held.full_LH, swing, skip, draw)
    note = f"{total} of {heads} heads FULL"
    if swing is not None:
        note += (
            f", and head {swing.head} of block {swing.block} for {rest} of {full + forward}, to make the total exact"
        )
    gap = (held.bound - held.objective) / max(held.bound, 1e-9)
    return Selection(
        cycle, SolverReport("CP-SAT held", held.status, held.objective, held.bound, gap, held.seconds, note)
    )


def _checked(request: SelectionRequest, num_micro_batches: int) -> tuple[int, int, int]:
    if request.ratios is None:
        raise ValueError("select_ratios needs ratios")
    full, forward, skip = request.ratios
    if full + forward + skip != num_micro_batches or min(request.ratios) < 0:
        raise UserError(
            f"ratios {full}:{forward}:{skip} do not sum to the step's {num_micro_batches} micro-batches.",
            code="ratios_sum",
            param="method.ratios",
            remedy="Make full + forward + skip equal micro_batches.",
        )
    if full == 0:
        raise InfeasibleError(
            "ratios with full = 0 train no head.",
            code="ratios_infeasible",
            param="method.ratios",
            remedy="Ask for at least 1 FULL.",
        )
    return full, forward, skip
