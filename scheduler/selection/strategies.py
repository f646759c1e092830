"""Strategies by name: what each looks at, how it shares work out, and which solver it uses.

| strategy | sees | shares | solver |
|---|---|---|---|
| hardest | what images lost last | alike | `hardest`: no head is chosen |
| hull | worth | by time | greedy on convex hulls; prices of training |
| cpsat | worth | by time | CP-SAT, with a proof |
| two_stage | backward worth for FULL, then forward worth | by time | dynamic programming, device by device |
| random | numbers drawn from (seed, window) | by time | as hull |
| uniform | nothing: heads take turns | by heads owned | as hull |

Every strategy that chooses heads answers the same two questions: `assign` (so many FULL, so many FORWARD) and `pick`
(within budgets).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from scheduler.domain import FloatArray, IntArray, OpTable, Scores, SolverReport
from scheduler.selection.assign import Items, assign_by_price, assign_in_stages, assign_proved
from scheduler.selection.hull import pick_by_hull
from scheduler.selection.menus import Menus, Picked
from scheduler.selection.proof import pick_proved
from scheduler.selection.stages import pick_in_stages
from scheduler.selection.words import Selection, SelectionRequest

GOLDEN = (5**0.5 - 1) / 2  # fractional parts of its multiples lie evenly


@dataclass(frozen=True)
class Strategy:
    """One way to choose: `sees` turns the scores into what it looks at; `timed` shares follow the live costs."""

    name: str
    method: str
    sees: Callable[[SelectionRequest, Scores], Scores]
    assign: Callable[[Items], tuple[IntArray, float]]
    pick: Callable[[Menus], Picked]
    timed: bool = True


def strategy_of(request: SelectionRequest) -> Strategy:
    """The strategy asked for; "full" and "hardest" never come here."""
    return _STRATEGIES[request.strategy]


def reported(
    request: SelectionRequest,
    strategy: Strategy,
    cycle: tuple[OpTable, ...],
    worth: float,
    bound: float,
    began: float,
    note: str,
) -> Selection:
    """The answer with its certificate; `began` is when the search did, by `time.perf_counter`."""
    bound = max(bound, worth)
    status = "PROVED" if bound - worth <= 1e-6 * bound else "FEASIBLE"
    method = f"{strategy.method}, hold {request.hold}, {request.grain}"
    report = SolverReport(method, status, worth, bound, (bound - worth) / bound, time.perf_counter() - began, note)
    return Selection(cycle, report)


def _worth(request: SelectionRequest, scores: Scores) -> Scores:
    return scores


def _drawn(request: SelectionRequest, scores: Scores) -> Scores:
    rng = np.random.default_rng((*request.key, 1))
    backward_TLHM = scores.backward_TLHM
    if backward_TLHM is not None:
        backward_TLHM = _mean_one(rng.random(backward_TLHM.shape))
    return Scores(_mean_one(rng.random(scores.backward_LH.shape)), np.ones_like(scores.forward_LH), backward_TLHM)


def _turns(request: SelectionRequest, scores: Scores) -> Scores:
    """Close to equal worths, in an order that spreads over heads and blocks and goes on from window to window."""
    order = (np.arange(scores.backward_LH.size) + 1 + 7 * request.window) * GOLDEN % 1
    worth_LH = _mean_one(1.0 + order.reshape(scores.backward_LH.shape) / 100)
    return Scores(worth_LH, np.ones_like(scores.forward_LH))


def _mean_one(worth: FloatArray) -> FloatArray:
    result: FloatArray = worth / worth.mean()
    return result


_HULL = Strategy("hull", "convex hull", _worth, assign_by_price, pick_by_hull)
_STRATEGIES = {
    "hull": _HULL,
    "cpsat": Strategy("cpsat", "CP-SAT", _worth, assign_proved, pick_proved),
    "two_stage": Strategy("two_stage", "two stages", _worth, assign_in_stages, pick_in_stages),
    "random": replace(_HULL, name="random", method="random", sees=_drawn),
    "uniform": replace(_HULL, name="uniform", method="uniform", sees=_turns, timed=False),
}
