"""The judge of plans, which knows no solver; and the forecast of one op table, by simulation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from scheduler.compiler import rehearse
from scheduler.cost import Costs
from scheduler.domain import BoolArray, Forecast, Op, OpTable, Placement, Plan, step_flops, uniform_ops
from scheduler.errors import D2ftError
from scheduler.placement import memory_bytes_of
from scheduler.request import PlanRequest
from scheduler.simulate import forecast_of
from scheduler.transfers import step_bytes


def check(plan: Plan, costs: Costs, request: PlanRequest, *, play: bool = True) -> list[str]:
    """Everything wrong with a plan, one sentence each; none for a good plan. `play` also compiles and simulates it."""
    shapes = [*_placement_faults(plan.placement, costs), *_table_faults(plan, costs, request.strategy == "hardest")]
    if shapes:
        return shapes
    faults = [
        *memory_faults(plan.placement, plan.cycle, costs),
        *_forecast_faults(plan),
        *_request_faults(plan, costs, request),
    ]
    if play:
        faults += _play_faults(plan, costs, request)
    return faults


def memory_faults(placement: Placement, cycle: Sequence[OpTable], costs: Costs) -> Iterator[str]:
    """Workers that lack memory for the heads that train in the cycle."""
    trained_LH = np.any([(ops == Op.FULL).any(axis=2) for ops in cycle], axis=0)
    needs = memory_bytes_of(placement, costs, trained_LH)
    for worker, (need, profile) in enumerate(zip(needs, costs.profiles, strict=True)):
        if need > profile.free_bytes:
            yield f"worker {worker} needs {(need - profile.free_bytes) / 1e9:.3g} GB more than it has"


def forecast(request: PlanRequest, placement: Placement, ops_LHM: OpTable, costs: Costs) -> Forecast:
    """What one op table will cost; raises DeadlockError."""
    seen = rehearse(placement, ops_LHM, costs, embed_grad=request.embed_grad, skip_fill=request.skip_fill)
    return forecast_of(seen, costs)


def _placement_faults(placement: Placement, costs: Costs) -> Iterator[str]:
    shape, workers = costs.shape, costs.num_workers
    if placement.num_workers != workers:
        yield f"the placement is for {placement.num_workers} workers, not {workers}"
    if placement.owner_LH.shape != (shape.num_blocks, shape.num_heads):
        yield f"owners have shape {placement.owner_LH.shape}, not {(shape.num_blocks, shape.num_heads)}"
    elif placement.owner_LH.min() < 0 or placement.owner_LH.max() >= workers:
        yield f"a head's owner is not one of the ranks 0 to {workers - 1}"
    elif placement.classifier not in placement.holders(shape.num_blocks - 1):
        yield f"the classifier's worker {placement.classifier} holds no head of the last block"


def _table_faults(plan: Plan, costs: Costs, sits_out: bool) -> Iterator[str]:
    """With `sits_out`, whole micro-batches may train nothing."""
    wanted = (costs.shape.num_blocks, costs.shape.num_heads, costs.step.num_micro_batches)
    if not plan.cycle:
        yield "the cycle has no table"
    for index, ops in enumerate(plan.cycle):
        if ops.shape != wanted:
            yield f"table {index} has shape {ops.shape}, not {wanted}"
        elif not np.isin(ops, [int(op) for op in Op]).all():
            yield f"table {index} has values that are no op"
        else:
            trained_M = _trains(ops, costs)
            if not (trained_M.any() if sits_out else trained_M.all()):
                starved = np.flatnonzero(~trained_M).tolist()
                yield f"table {index} runs no FULL head for micro-batches {starved}"
            elif (ops[: costs.shape.num_frozen] == Op.FULL).any():
                yield f"table {index} has FULL heads in blocks that are frozen"


def _trains(ops_LHM: OpTable, costs: Costs) -> BoolArray:
    """[M] whether something learns from a micro-batch: a FULL head, or the classifier alone where all are frozen."""
    op = Op.FORWARD if costs.shape.num_frozen == costs.shape.num_blocks else Op.FULL
    result: BoolArray = (ops_LHM == op).any(axis=(0, 1))
    return result


def _forecast_faults(plan: Plan) -> Iterator[str]:
    for name, seen in (("forecast", plan.forecast), ("all-FULL forecast", plan.all_full)):
        numbers = [
            seen.step_us,
            seen.flops,
            *seen.busy_us,
            *seen.peak_bytes,
            *(b for row in seen.link_bytes for b in row),
        ]
        if min(numbers) < 0:
            yield f"the {name} has a negative number"


def _request_faults(plan: Plan, costs: Costs, request: PlanRequest) -> Iterator[str]:
    if request.ratios is not None:
        first = costs.shape.num_frozen
        heads = plan.placement.owner_LH[first:].size
        for index, ops in enumerate(plan.cycle):
            counts = tuple(int((ops[first:] == op).sum()) for op in (Op.FULL, Op.FORWARD, Op.SKIP))
            if counts != tuple(heads * n for n in request.ratios):
                yield f"table {index} has {counts} FULL, FORWARD and SKIP, not {request.ratios} × {heads}"
    elif request.compute is not None:
        flops = _fraction(plan, costs, lambda ops: step_flops(costs.shape, costs.step, ops))
        spent = _fraction(plan, costs, lambda ops: _step_bytes(plan, costs, request, ops))
        if flops > request.compute + 1e-9:
            yield f"it computes {flops:.4f} of all-FULL, more than {request.compute}"
        if spent > request.max_bytes + 1e-9:
            yield f"it sends {spent:.4f} of all-FULL's bytes, more than {request.max_bytes}"


def _fraction(plan: Plan, costs: Costs, measure: Callable[[OpTable], int]) -> float:
    full = measure(uniform_ops(costs.shape, costs.step.num_micro_batches, Op.FULL))
    return sum(map(measure, plan.cycle)) / len(plan.cycle) / full if full else 0.0


def _step_bytes(plan: Plan, costs: Costs, request: PlanRequest, ops_LHM: OpTable) -> int:
    return int(step_bytes(plan.placement, ops_LHM, costs.shape, costs.step, request.embed_grad).sum())


def _play_faults(plan: Plan, costs: Costs, request: PlanRequest) -> Iterator[str]:
    for index, ops in enumerate(plan.cycle):
        try:
            seen = forecast(request, plan.placement, ops, costs)
        except D2ftError as error:
            yield f"table {index} does not run: {error.message}"
            continue
        if seen.total_bytes != _step_bytes(plan, costs, request, ops):
            yield f"table {index} sends other bytes than counted"
