"""Plans: placement, selection and forecast for one window, and the judge that knows no solver.

    propose placements ─► select ops on each ─► compile and simulate its cycle ─► keep the fastest that meets the
    budgets

Of several placements, the one with the shortest simulated step *under its own selection* wins, if that is worth nearly
as much as the worthiest: all-FULL steps would favour placements whose gain the selection takes away again. A placement
that cannot meet the budgets is passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scheduler.budgets import select_budgets
from scheduler.compiler import compile_step
from scheduler.cost import Costs
from scheduler.domain import (
    Forecast,
    Op,
    OpTable,
    Placement,
    Plan,
    Scores,
    SolverReport,
    mean_forecast,
    step_flops,
    uniform_ops,
)
from scheduler.errors import D2ftError, InfeasibleError, SystemFault, UserError
from scheduler.placement import Limits, counts_of, propose
from scheduler.selection import STRATEGIES, Selection, SelectionRequest, all_full, select_ratios, worth_fraction
from scheduler.simulate import simulate
from scheduler.teams import Instance
from scheduler.transfers import step_bytes

SAMPLED = 2  # steps simulated to compare placements; the plan's forecast is over the whole cycle
NEARLY = 0.98  # of the best worth: what a faster placement may cost
KEPT = SolverReport("kept", "KEPT", 0.0, 0.0, 0.0, 0.0, "the placement of the last window")


@dataclass(frozen=True)
class PlanRequest:
    """What a job asks of its plans.

    `ratios` (full, forward, skip), or `compute` with `max_bytes` as fractions of all-FULL; neither means all-FULL.
    `placement` is a mode of `propose`. `embed_grad` says whether the embedding is trained.
    """

    ratios: tuple[int, int, int] | None = None
    compute: float | None = None
    max_bytes: float = 1.0
    strategy: str = "held"
    score: str = "fisher"
    skip_fill: str = "zero"
    placement: str = "auto"
    embed_grad: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise UserError(
                f"'{self.strategy}' is not a strategy.",
                code="unknown_strategy",
                param="method.strategy",
                remedy=f"Use one of {', '.join(STRATEGIES)}.",
            )

    @property
    def styles(self) -> tuple[str, ...]:
        """Ways to assign heads that are worth trying: whose they are matters where some are held FULL, others not."""
        mixes = self.compute is not None or (self.ratios is not None and self.ratios[1] > 0)
        if self.strategy != "held" or not mixes:
            return ("even",)
        return ("lead",) if self.compute is not None and self.max_bytes < 1 else ("even", "lead")

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PlanRequest:
        """From the job's words: `ratios` {full, forward, skip} and `budgets` {compute, bytes} may be absent or None."""
        ratios, budgets = data.get("ratios"), data.get("budgets")
        rest = {key: value for key, value in data.items() if key not in ("ratios", "budgets")}
        return cls(
            ratios=ratios and (ratios["full"], ratios.get("forward", 0), ratios.get("skip", 0)),
            compute=budgets and budgets["compute"],
            max_bytes=(budgets or {}).get("bytes", 1.0),
            **rest,
        )

    def to_dict(self) -> dict[str, Any]:
        """Inverse of `from_dict`."""
        ratios = self.ratios and dict(zip(("full", "forward", "skip"), self.ratios, strict=True))
        budgets = self.compute and {"compute": self.compute, "bytes": self.max_bytes}
        keys = ("strategy", "score", "skip_fill", "placement", "embed_grad", "seed")
        return {"ratios": ratios or None, "budgets": budgets or None, **{key: getattr(self, key) for key in keys}}


def make_plan(
    request: PlanRequest,
    costs: Costs,
    scores: Scores,
    *,
    version: int = 1,
    window: int = 0,
    placement: Placement | None = None,
    limits: Limits | None = None,
) -> Plan:
    """The plan of one window. A given `placement` is kept; else candidates are solved for and the fastest one is taken.

    Raises InfeasibleError (memory, ratios or budgets), UserError for words that it does not know.
    """
    if placement is not None:
        candidates = [(placement, KEPT)]
    else:
        limits = limits or Limits(seed=request.seed)
        candidates = propose(costs, request.placement, scores=scores, styles=request.styles, limits=limits)
    drafts = _drafts(request, costs, scores, candidates, window)
    worthy = max(draft.worth for draft in drafts) * NEARLY
    best = min((draft for draft in drafts if draft.worth >= worthy), key=lambda draft: draft.step_us)
    full = uniform_ops(costs.shape, costs.step.num_micro_batches, Op.FULL)
    plan = Plan(
        version=version,
        window=window,
        placement=best.placement,
        cycle=best.selection.cycle,
        forecast=mean_forecast(forecast(request, best.placement, ops, costs) for ops in best.selection.cycle),
        all_full=forecast(request, best.placement, full, costs),
        placement_report=best.placement_report,
        selection_report=best.selection.report,
        skip_fill=request.skip_fill,
    )
    if faults := check(plan, costs, request, play=False):
        raise SystemFault(f"The planner broke its own rules: {'; '.join(faults)}.", code="bad_plan")
    return plan


@dataclass(frozen=True, eq=False)
class _Draft:
    """A placement with its selection, what that is worth, and the simulated µs of its first steps."""

    placement: Placement
    placement_report: SolverReport
    selection: Selection
    worth: float
    step_us: int


def _drafts(
    request: PlanRequest,
    costs: Costs,
    scores: Scores,
    candidates: Sequence[tuple[Placement, SolverReport]],
    window: int,
) -> list[_Draft]:
    drafts: list[_Draft] = []
    misses: list[InfeasibleError] = []
    for placement, report in candidates:
        try:
            selection = select(request, placement, costs, scores, window)
        except InfeasibleError as error:
            misses.append(error)
            continue
        steps = [forecast(request, placement, ops, costs) for ops in selection.cycle[:SAMPLED]]
        worth = worth_fraction(selection.cycle, scores)
        drafts.append(_Draft(placement, report, selection, worth, mean_forecast(steps).step_us))
    if not drafts:
        raise _no_plan(misses)
    return drafts


def select(request: PlanRequest, placement: Placement, costs: Costs, scores: Scores, window: int = 0) -> Selection:
    """The ops of one window on a placement, as asked: all-FULL, exact ratios, or within budgets."""
    asked = SelectionRequest(
        ratios=request.ratios,
        compute=request.compute,
        max_bytes=request.max_bytes,
        strategy=request.strategy,
        embed_grad=request.embed_grad,
        seed=request.seed,
        window=window,
    )
    if asked.is_all_full:
        return all_full(placement, costs.step.num_micro_batches)
    if asked.ratios is not None:
        return select_ratios(asked, placement, scores, costs.step.num_micro_batches)
    return select_budgets(asked, placement, costs, scores)


def forecast(request: PlanRequest, placement: Placement, ops_LHM: OpTable, costs: Costs) -> Forecast:
    """What one op table will cost; raises DeadlockError."""
    programs = compile_step(placement, ops_LHM, costs, embed_grad=request.embed_grad, skip_fill=request.skip_fill)
    return simulate(programs, costs)


def check(plan: Plan, costs: Costs, request: PlanRequest, *, play: bool = True) -> list[str]:
    """Everything wrong with a plan, one sentence each; none for a good plan. `play` also compiles and simulates it."""
    shapes = [*_placement_faults(plan.placement, costs), *_table_faults(plan, costs)]
    if shapes:
        return shapes
    faults = [*_memory_faults(plan.placement, costs), *_forecast_faults(plan), *_request_faults(plan, costs, request)]
    if play:
        faults += _play_faults(plan, costs, request)
    return faults


def _no_plan(misses: list[InfeasibleError]) -> InfeasibleError:
    """One error for all candidates; the nearest that each could meet stays in the message."""
    first = misses[0]
    if len(misses) == 1:
        return first
    message = " ".join(f"Placement {number}: {error.message}" for number, error in enumerate(misses, 1))
    return InfeasibleError(message, code=first.code, param=first.param, remedy=first.remedy)


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


def _table_faults(plan: Plan, costs: Costs) -> Iterator[str]:
    wanted = (costs.shape.num_blocks, costs.shape.num_heads, costs.step.num_micro_batches)
    if not plan.cycle:
        yield "the cycle has no table"
    for index, ops in enumerate(plan.cycle):
        if ops.shape != wanted:
            yield f"table {index} has shape {ops.shape}, not {wanted}"
        elif not np.isin(ops, [int(op) for op in Op]).all():
            yield f"table {index} has values that are no op"
        elif starved := np.flatnonzero(~(ops == Op.FULL).any(axis=(0, 1))).tolist():
            yield f"table {index} runs no FULL head for micro-batches {starved}"


def _memory_faults(placement: Placement, costs: Costs) -> Iterator[str]:
    instance, counts_LW = Instance(costs, ()), counts_of(placement)
    for worker, profile in enumerate(costs.profiles):
        need = instance.memory_bytes(counts_LW[:, worker], worker == placement.classifier)
        if need > profile.free_bytes:
            yield f"worker {worker} needs {(need - profile.free_bytes) / 1e9:.3g} GB more than it has"


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
        heads = plan.placement.owner_LH.size
        for index, ops in enumerate(plan.cycle):
            counts = tuple(int((ops == op).sum()) for op in (Op.FULL, Op.FORWARD, Op.SKIP))
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
