"""Choosing heads where the first blocks are frozen: the blocks above them as a model of their own.

A frozen head runs FORWARD in every micro-batch that some head above it runs for, so there is nothing to choose of it.
Budgets are fractions of the whole model's all-FULL. What the frozen blocks take is always taken, so the blocks above
must keep to 1 − (1 − budget)·W/U, with W the whole's all-FULL and U that of the blocks above alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from scheduler.cost import Costs
from scheduler.domain import BoolArray, Op, OpTable, Placement, Scores, StaticPart
from scheduler.errors import InfeasibleError
from scheduler.selection.meter import Meter
from scheduler.selection.words import Selection, SelectionRequest

Select = Callable[[SelectionRequest, Placement, Costs, Scores, BoolArray | None], Selection]

TRIES = 6  # the bytes that come up from the frozen blocks depend a little on what is chosen above
WORTHLESS = -10.0  # times the mean worth: no frozen head is FULL


def above(costs: Costs) -> Costs:
    """Of the blocks that train."""
    shape = costs.shape
    left = replace(shape, num_blocks=shape.num_blocks - shape.num_frozen, num_frozen=0)
    return Costs(left, costs.step, costs.profiles)


def scores_above(scores: Scores, num_frozen: int) -> Scores:
    """Worths of the heads that train."""
    singles = scores.backward_TLHM
    return Scores(
        scores.backward_LH[num_frozen:],
        scores.forward_LH[num_frozen:],
        None if singles is None else singles[:, num_frozen:],
    )


def static_above(part: StaticPart | None, costs: Costs) -> StaticPart:
    """What placement is told: the static part of the blocks above, all FULL if None, and no FULL head below them."""
    shape = costs.shape
    worth_LH = np.full((shape.num_blocks, shape.num_heads), WORTHLESS)
    if part is None:
        worth_LH[shape.num_frozen :] = 1.0
        return StaticPart(worth_LH, (shape.num_blocks - shape.num_frozen) * shape.num_heads)
    worth_LH[shape.num_frozen :] = part.worth_LH
    return replace(part, worth_LH=worth_LH)


def select_above(
    select: Select,
    request: SelectionRequest,
    placement: Placement,
    costs: Costs,
    scores: Scores,
    full_LH: BoolArray | None,
) -> Selection:
    """`select` on the blocks above, with the frozen blocks below.

    Raises InfeasibleError ("budgets_infeasible") where the frozen blocks alone take more than the budgets.
    """
    frozen, upper = costs.shape.num_frozen, above(costs)
    part = Placement(placement.owner_LH[frozen:], placement.num_workers, placement.classifier)
    seen, marks = scores_above(scores, frozen), None if full_LH is None else full_LH[frozen:]

    def chosen(asked: SelectionRequest) -> Selection:
        try:
            found = select(asked, part, upper, seen, marks)
        except InfeasibleError as error:
            if asked.ratios is None:
                error.message += f" These are fractions of what the blocks above the {frozen} frozen ones take."
            raise
        return Selection(tuple(_with_frozen(ops, frozen) for ops in found.cycle), found.report)

    if request.ratios is not None:
        return chosen(request)
    whole, own = Meter(placement, costs, request.embed_grad), Meter(part, upper, request.embed_grad)
    compute = _left(request.compute or 1.0, whole.all_full_flops, own.all_full_flops, "compute", frozen)
    sent = _left(request.max_bytes, whole.all_full_bytes, own.all_full_bytes, "bytes", frozen)
    for _ in range(TRIES):
        found = chosen(replace(request, compute=compute, max_bytes=sent))
        if whole.keeps(found.cycle, request.compute or 1.0, request.max_bytes):
            return found
        over = sum(map(whole.bytes, found.cycle)) / len(found.cycle) - request.max_bytes * whole.all_full_bytes
        sent -= max(0.01, 1.05 * over / max(1, own.all_full_bytes))
    raise InfeasibleError(
        f"No selection above the {frozen} frozen blocks was found that sends {request.max_bytes:.2f} of the bytes.",
        code="budgets_infeasible",
        param="method.budgets",
        remedy="Allow more bytes, or freeze fewer blocks.",
    )


def _left(budget: float, whole: int, own: int, name: str, frozen: int) -> float:
    """What a budget leaves for the blocks above, as a fraction of what these take all-FULL."""
    if budget >= 1 or not own:
        return budget
    left = 1 - (1 - budget) * whole / own
    if left > 0:
        return left
    least = 1 - own / whole
    raise InfeasibleError(
        f"The {frozen} frozen blocks alone take {least:.2f} of all-FULL's {name}, and the budget is {budget:.2f}.",
        code="budgets_infeasible",
        param="method.budgets",
        remedy=f"Set {name} well above {least:.2f}, or leave out whole micro-batches: strategy 'hardest'.",
    )


def _with_frozen(ops_LHM: OpTable, frozen: int) -> OpTable:
    runs_M = ops_LHM.any(axis=(0, 1)) * np.int8(Op.FORWARD)
    below = np.broadcast_to(runs_M, (frozen, *ops_LHM.shape[1:]))
    return np.concatenate([below, ops_LHM]).astype(np.int8)
