"""Plans: placement, selection and forecast for one window.

    propose placements ─► select ops on each ─► compile and simulate its cycle ─► keep the fastest that meets the
    budgets

Of several placements, the one with the shortest simulated step *under its own selection* wins, if that is worth nearly
as much as the worthiest: all-FULL steps would favour placements whose gain the selection takes away again. A placement
that cannot meet the budgets is passed over.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from scheduler.check import check, forecast, memory_faults
from scheduler.cost import Costs
from scheduler.domain import (
    BoolArray,
    Forecast,
    Op,
    OpTable,
    Placement,
    Plan,
    Scores,
    SolverReport,
    mean_forecast,
    uniform_ops,
)
from scheduler.errors import InfeasibleError, SystemFault
from scheduler.memory import needs_of
from scheduler.placement import Candidate, Limits, propose
from scheduler.request import PlanRequest
from scheduler.selection import PERIOD, Selection, SelectionRequest, select, static_part, worth_fraction

SAMPLED = 2  # steps simulated to compare placements
SLOWER = 1.15  # than the fastest one: out of the question
NEARLY = 0.98  # of the best worth: what a faster placement may cost
STILL = 0.9  # of the best worth: what FULL heads must be worth to stay, so that noise in the scores moves none
KEPT = SolverReport("kept", "KEPT", 0.0, 0.0, 0.0, 0.0, "the placement of the last window")


def make_plan(
    request: PlanRequest,
    costs: Costs,
    scores: Scores,
    *,
    version: int = 1,
    window: int = 0,
    placement: Placement | None = None,
    held: Sequence[str] | None = None,
    current: Placement | None = None,
    limits: Limits | None = None,
    samples: int = PERIOD,
) -> Plan:
    """The plan of one window. A given `placement` is kept; else candidates are solved for and the fastest one is taken.

    `held` are the FULL heads of the last window under a kept placement, as `held_rows` gives them: they stay while
    they are worth nearly the most and the workers still finish together. `current` is the placement in use, from which
    to depart only for something better. The forecast is the mean over `samples` tables of the cycle. A request with a
    schedule is taken as it is at the start. Raises InfeasibleError (memory, ratios or budgets), UserError for words
    that it does not know.
    """
    request = request.at(0.0)
    asked, scores = request.selection(window), _trainable(scores, costs)
    if placement is not None:
        offers: Iterable[Sequence[Candidate]] = [[Candidate(placement, _worthy(held, scores), KEPT)]]
    else:
        offers = _candidates(request, asked, costs, scores, limits or Limits(seed=request.seed), current)
    drafts = _drafts(request, asked, costs, scores, offers)
    worthy = max(draft.worth for draft in drafts) * NEARLY
    best = min((draft for draft in drafts if draft.worth >= worthy), key=lambda draft: draft.step_us)
    more = _sample(best.selection.cycle, samples)[len(best.steps) :]
    full = uniform_ops(costs.shape, costs.step.num_micro_batches, Op.FULL)
    all_full = (
        best.steps[0] if (best.selection.cycle[0] == full).all() else forecast(request, best.placement, full, costs)
    )
    seen = mean_forecast([*best.steps, *(forecast(request, best.placement, ops, costs) for ops in more)])
    needs = needs_of(best.placement, best.selection.cycle, costs, seen, all_full, scored=request.chooses_heads)
    plan = Plan(
        version=version,
        window=window,
        placement=best.placement,
        cycle=best.selection.cycle,
        forecast=seen,
        all_full=all_full,
        placement_report=best.placement_report,
        selection_report=best.selection.report,
        skip_fill=request.skip_fill,
        memory_bytes=tuple(need.total for need in needs),
    )
    if faults := check(plan, costs, request, play=False):
        raise SystemFault(f"The planner broke its own rules: {'; '.join(faults)}.", code="bad_plan")
    return plan


@dataclass(frozen=True, eq=False)
class _Draft:
    """A placement with its selection, what that is worth, and the forecasts of its first steps."""

    placement: Placement
    placement_report: SolverReport
    selection: Selection
    worth: float
    steps: tuple[Forecast, ...]

    @property
    def step_us(self) -> int:
        return mean_forecast(self.steps).step_us


def _candidates(
    request: PlanRequest,
    asked: SelectionRequest,
    costs: Costs,
    scores: Scores,
    limits: Limits,
    current: Placement | None,
) -> Iterator[list[Candidate]]:
    """The mode's best placements; then, where it allows others and none keeps the bytes, those of split blocks.

    Whole blocks send little, and nearly all of that whatever is selected, so that no fraction of it can be saved.
    """
    static = static_part(asked, costs, scores)
    modes = [request.placement]
    if request.placement in ("auto", "unmixed") and costs.num_workers > 1 and asked.max_bytes < 1:
        modes.append("split")
    for mode in modes:
        yield propose(costs, mode, static=static, scores=scores, limits=limits, current=current)


def _drafts(
    request: PlanRequest, asked: SelectionRequest, costs: Costs, scores: Scores, offers: Iterable[Sequence[Candidate]]
) -> list[_Draft]:
    """Those of the first offer in which some candidate can do what is asked."""
    misses: list[InfeasibleError] = []
    for candidates in offers:
        drafts: list[_Draft] = []
        for candidate in candidates:
            placement = candidate.placement
            try:
                selection = select(asked, placement, costs, scores, full_LH=candidate.full_LH)
                _check_memory(placement, selection, costs)
            except InfeasibleError as error:
                misses.append(error)
                continue
            least = min((draft.step_us for draft in drafts), default=math.inf)
            steps = _first_steps(request, placement, selection, costs, least)
            worth = worth_fraction(selection.cycle, scores)
            drafts.append(_Draft(placement, candidate.report, selection, worth, steps))
        if drafts:
            return drafts
    raise _no_plan(misses)


def _first_steps(
    request: PlanRequest, placement: Placement, selection: Selection, costs: Costs, least_us: float
) -> tuple[Forecast, ...]:
    """Enough forecasts to compare with the fastest placement so far; one shows which are out of the question."""
    first, *others = _sample(selection.cycle, SAMPLED)
    step = forecast(request, placement, first, costs)
    if step.step_us > SLOWER * least_us:
        return (step,)
    return (step, *(forecast(request, placement, ops, costs) for ops in others))


def held_rows(plan: Plan) -> list[str]:
    """The heads that the plan holds FULL whenever they run, a text of 1 and 0 for each block."""
    ops = np.stack(plan.cycle)
    full_LH = (ops == Op.FULL).any(axis=(0, 3)) & ~(ops == Op.FORWARD).any(axis=(0, 3))
    return ["".join("1" if full else "0" for full in row) for row in full_LH]


def _trainable(scores: Scores, costs: Costs) -> Scores:
    """The worths with nothing for training a frozen head."""
    backward_LH, singles = scores.backward_LH.copy(), scores.backward_TLHM
    backward_LH[: costs.shape.num_frozen] = 0
    if singles is not None and costs.shape.num_frozen:
        singles = singles.copy()
        singles[:, : costs.shape.num_frozen] = 0
    return replace(scores, backward_LH=backward_LH, backward_TLHM=singles)


def _worthy(held: Sequence[str] | None, scores: Scores) -> BoolArray | None:
    if held is None:
        return None
    full_LH = np.array([[word == "1" for word in row] for row in held])
    best = np.sort(scores.backward_LH, axis=None)[::-1][: int(full_LH.sum())].sum()
    return full_LH if scores.backward_LH[full_LH].sum() >= STILL * best else None


def _sample(cycle: Sequence[OpTable], samples: int) -> Sequence[OpTable]:
    """Tables whose mean stands for the cycle's; fewer samples are the first of more."""
    stride = -(-len(cycle) // max(PERIOD, samples))
    return cycle[::stride][:samples]


def _check_memory(placement: Placement, selection: Selection, costs: Costs) -> None:
    """Which heads train is known only now: a placement that was made for others may not hold these."""
    if faults := list(memory_faults(placement, selection.cycle, costs)):
        raise InfeasibleError(
            f"The selection does not fit into memory on this placement: {'; '.join(faults)}.",
            code="memory_infeasible",
            param="workers",
            remedy="Add workers, free memory, raise worker_memory_bytes, or make micro-batches smaller.",
        )


def _no_plan(misses: list[InfeasibleError]) -> InfeasibleError:
    """One error for all candidates; the nearest that each could meet stays in the message."""
    first = misses[0]
    if len(misses) == 1:
        return first
    message = " ".join(f"Placement {number}: {error.message}" for number, error in enumerate(misses, 1))
    return InfeasibleError(message, code=first.code, param=first.param, remedy=first.remedy)
