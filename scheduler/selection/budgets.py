"""Budgets: the selection worth most within fractions of all-FULL's compute and bytes.

Each worker gets its share of the compute, so that all finish together. With FULL heads held still, the linear program
of `bound` says how often each unit runs; these means are drawn as whole counts, then the FULL heads are a small
knapsack: menus of (worker, block) with one option for each number of FULL heads, what backward participation sends as
the bytes of an option. What was drawn is measured by the exact judges, and the program is asked again for fewer bytes
where it was too much. Without held heads there is one knapsack for each table, over all its micro-batches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from scheduler.cost import Costs
from scheduler.domain import BoolArray, FloatArray, Placement, Scores
from scheduler.errors import InfeasibleError
from scheduler.selection.bound import MeansProgram
from scheduler.selection.drafts import Drafts
from scheduler.selection.meter import Meter
from scheduler.selection.shares import flop_shares
from scheduler.selection.strategies import Strategy, reported, strategy_of
from scheduler.selection.tables import Tables
from scheduler.selection.words import (
    Selection,
    SelectionRequest,
    groups_of,
    heads_of,
    worth_fraction,
)

LEAST_TRAINED = 1 / 6  # of the runs, where compute is too short to run everything


def select_budgets(
    request: SelectionRequest, placement: Placement, costs: Costs, scores: Scores, full_LH: BoolArray | None = None
) -> Selection:
    """The selection worth most whose mean step keeps within `compute` and `max_bytes`.

    Raises InfeasibleError (budgets_infeasible) with the nearest budgets that can be met.
    """
    began = time.perf_counter()
    meter, strategy = Meter(placement, costs, request.embed_grad), strategy_of(request)
    found = _best(request, strategy, meter, scores, full_LH)
    if found is None:
        raise _refusal(request, strategy, meter, scores)
    cycle, note = found
    worth = worth_fraction(cycle, scores)
    bound = _bound(request, strategy, meter, scores)
    return reported(request, strategy, cycle, worth, bound, began, note)


def likely_mix(request: SelectionRequest, costs: Costs) -> tuple[int, float]:
    """(FULL heads, share of the micro-batches that a head runs) as a compute budget will have it, bytes aside."""
    shape, step = costs.shape, costs.step
    forward = sum(shape.head_forward_flops(h, step.micro_batch_size) for h in range(shape.num_heads))
    back = costs.backward_weight
    heads_flops, trunk = (1 + back) * forward * shape.num_blocks, shape.trunk_flops(step.micro_batch_size)
    spent = ((request.compute or 1.0) * (heads_flops + trunk) - trunk) / heads_flops
    run_share = min(1.0, max(0.0, (1 + back) * spent / (1 + back * LEAST_TRAINED)))
    trained = ((1 + back) * spent / run_share - 1) / back if run_share > 0 else 0.0
    return int(max(0.0, min(1.0, trained)) * shape.num_blocks * shape.num_heads + 1e-9), run_share


def _best(
    request: SelectionRequest, strategy: Strategy, meter: Meter, scores: Scores, full_LH: BoolArray | None = None
) -> tuple[tuple[np.ndarray, ...], str] | None:
    budget = meter.head_flops(request.compute or 1.0)
    if budget <= 0:
        return None
    caps_W = caps_of(strategy, meter, budget)
    if request.hold == "training":
        return Drafts(request, strategy, meter, scores, caps_W, full_LH).best()
    return Tables(request, strategy, meter, scores, caps_W).best()


def caps_of(strategy: Strategy, meter: Meter, budget: float) -> FloatArray:
    """[W] FLOPs of heads per step that each worker may spend; they sum to the budget."""
    if strategy.timed:
        return flop_shares(meter.placement, meter.costs, budget, meter.forward_LH.astype(np.float64))
    owned_W = meter.placement.heads_owned
    result: FloatArray = budget * owned_W / owned_W.sum()
    return result


def _bound(request: SelectionRequest, strategy: Strategy, meter: Meter, scores: Scores) -> float:
    """The linear program's worth; workers may exceed their shares by one head, since heads are whole."""
    budget = meter.head_flops(request.compute or 1.0)
    one_head = (1.0 + meter.backward_weight) * meter.num_micro_batches * float(meter.forward_LH.max())
    units = groups_of(meter.placement) if request.coherent and request.hold == "training" else heads_of(meter.placement)
    seen = scores
    if scores.backward_TLHM is not None and request.hold == "none":
        # The mean over micro-batches bounds no choice among them; the largest worth does.
        seen = Scores(scores.backward_TLHM.max(axis=(0, 3)), scores.forward_LH)
    program = MeansProgram(meter, seen, units, budget, caps_of(strategy, meter, budget) + one_head)
    means = program.solve(request.max_bytes * meter.all_full_bytes)
    return min(1.0, means.worth) if means is not None else 1.0


def _refusal(request: SelectionRequest, strategy: Strategy, meter: Meter, scores: Scores) -> InfeasibleError:
    """Says whether compute or bytes is too tight, and the nearest that can be met."""

    def able(compute: float, max_bytes: float) -> bool:
        return _best(replace(request, compute=compute, max_bytes=max_bytes), strategy, meter, scores) is not None

    compute = request.compute or 1.0
    if not able(compute, 1.0):
        least = _least(lambda percent: able(percent / 100, 1.0), compute)
        return InfeasibleError(
            f"No {request.strategy} selection (hold {request.hold}) runs on {compute:.2f} of the compute: the least "
            f"where every micro-batch trains a head on this placement is {least:.2f}.",
            code="budgets_infeasible",
            param="method.budgets",
            remedy=f"Set compute to {least:.2f} or more.",
        )
    least = _least(lambda percent: able(compute, percent / 100), request.max_bytes)
    return InfeasibleError(
        f"No {request.strategy} selection (hold {request.hold}) sends only {request.max_bytes:.2f} of the bytes: the "
        f"least bytes fraction found at compute {compute:.2f} on this placement is {least:.2f}.",
        code="budgets_infeasible",
        param="method.budgets",
        remedy=f"Set bytes to {least:.2f} or more, lower compute, or choose another placement.",
    )


def _least(able: Callable[[int], bool], refused: float) -> float:
    """The least percent that is able, as a fraction, by halving; 1 where only all is."""
    low, high = math.floor(refused * 100 + 1e-9), 100
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if able(middle) else (middle, high)
    return high / 100
