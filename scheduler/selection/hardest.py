"""Hardest: whole micro-batches are FULL, FORWARD or SKIP, every head doing the same.

The first micro-batches of a step are FULL, the next FORWARD, the last sit out; the workers fill them with the step's
images in order of their last known loss, those never seen first. No gradient goes around heads that were left out: what
trains, trains exactly as in full fine-tuning, on fewer images. Which heads are worth more does not matter here.

Under budgets as many micro-batches as they allow are FULL and the others sit out, over a cycle of steps.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from scheduler.cost import Costs
from scheduler.domain import ModelShape, Op, OpTable, Placement, SolverReport, held_frozen
from scheduler.errors import InfeasibleError
from scheduler.selection.draws import shortest
from scheduler.selection.meter import Meter
from scheduler.selection.words import PERIOD, Selection, SelectionRequest, starving


def select_hardest(request: SelectionRequest, placement: Placement, costs: Costs) -> Selection:
    """Exact ratios, or the most FULL micro-batches that a mean step's budgets allow.

    Raises UserError for ratios that do not sum to the step's micro-batches, InfeasibleError when nothing would train
    or the budgets do not pay for one FULL micro-batch in every step.
    """
    began = time.perf_counter()
    if request.ratios is not None:
        counts = [request.checked_ratios(costs.step.num_micro_batches)]
        if not counts[0][0]:
            raise starving(counts[0])
    else:
        counts = _within_budgets(request, Meter(placement, costs, request.embed_grad))
    cycle = shortest([_table(costs.shape, *count) for count in counts])
    share = sum(full for full, _, _ in counts) / len(counts) / costs.step.num_micro_batches
    seconds = time.perf_counter() - began
    report = SolverReport("hardest images first", "PROVED", share, share, 0.0, seconds, f"{share:.0%} of a step FULL")
    return Selection(cycle, report)


def _table(shape: ModelShape, full: int, forward: int, skip: int) -> OpTable:
    ops_M = np.repeat(np.array([Op.FULL, Op.FORWARD, Op.SKIP], dtype=np.int8), [full, forward, skip])
    return held_frozen(np.tile(ops_M, (shape.num_blocks, shape.num_heads, 1)), shape)


def _within_budgets(request: SelectionRequest, meter: Meter) -> list[tuple[int, int, int]]:
    """(FULL, FORWARD, SKIP) micro-batches of each step of a cycle."""
    num = meter.num_micro_batches
    tables = [_table(meter.costs.shape, full, 0, num - full) for full in range(1, num + 1)]
    flops, sent = [meter.flops(ops) for ops in tables], [meter.bytes(ops) for ops in tables]
    compute = 1.0 if request.compute is None else request.compute
    limits = [budget * full * (1 + 1e-12) for budget, full in ((compute, flops[-1]), (request.max_bytes, sent[-1]))]
    for total in range(PERIOD * num, PERIOD - 1, -1):
        fulls = _evenly(total)
        if _mean(flops, fulls) <= limits[0] and _mean(sent, fulls) <= limits[1]:
            return [(full, 0, num - full) for full in fulls]
    least = (flops[0] / flops[-1], sent[0] / max(1, sent[-1]))
    name, floor = ("compute", least[0]) if flops[0] > limits[0] else ("bytes", least[1])
    floor = float(np.ceil(100 * floor) / 100)
    raise InfeasibleError(
        f"One FULL micro-batch of {num} in every step takes {floor:.2f} of all-FULL's {name} on this placement.",
        code="budgets_infeasible",
        param="method.budgets",
        remedy=f"Set {name} to {floor:.2f} or more, or use more micro-batches.",
    )


def _evenly(total: int) -> list[int]:
    """So many FULL micro-batches over the steps of a cycle, every step as many as any other or one less."""
    return [(step + 1) * total // PERIOD - step * total // PERIOD for step in range(PERIOD)]


def _mean(cost: Sequence[int], fulls: Sequence[int]) -> float:
    return sum(cost[full - 1] for full in fulls) / len(fulls)
