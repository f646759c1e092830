"""Two stages, the published way: FULL operations by backward worth first, then FORWARD ones by forward worth.

Each device solves both by itself, by dynamic programming over its time budget: the first stage gets the instance's
`full_share` of it, the second what is left. Nobody looks at bytes; where there is a limit on them, all budgets shrink
until it is kept.
"""

from __future__ import annotations

import numpy as np

from scheduler.domain import FloatArray, IntArray
from scheduler.selection.hull import price_bytes
from scheduler.selection.menus import Menus, Picked

CELLS = 2000  # of a device's budget: costs are rounded up to them
SHRINKS = 12  # halvings of the common factor on the budgets


def pick_in_stages(menus: Menus) -> Picked:
    """A choice within the budgets; the bound is that of the whole problem."""
    bound = price_bytes(menus)[1]
    choice_G = _at_scale(menus, 1.0)
    low, high = 0.0, 1.0
    if menus.totals(choice_G)[2] > menus.max_bytes:
        for _ in range(SHRINKS):
            middle = (low + high) / 2
            fits = menus.totals(_at_scale(menus, middle))[2] <= menus.max_bytes
            low, high = (middle, high) if fits else (low, middle)
        choice_G = _at_scale(menus, low)
    worth = menus.totals(choice_G)[0]
    return Picked(choice_G, worth, max(bound, worth), "HEURISTIC")


def best_options(value_GK: FloatArray, cost_GK: IntArray, budget: int) -> IntArray:
    """[G] option of every group, most valuable within the budget, by dynamic programming; option 0 costs nothing.

    Exact when the budget is at most `CELLS`; above that costs are rounded up to cells.
    """
    cell = max(1, -(-budget // CELLS))
    size, cost_GK = budget // cell, -(-cost_GK // cell)
    best = np.zeros(size + 1)
    taken = np.zeros((len(value_GK), size + 1), dtype=np.int16)
    for group, (values, costs) in enumerate(zip(value_GK, cost_GK, strict=True)):
        grown = best + values[0]
        for option in np.flatnonzero(np.isfinite(values) & (costs <= size)):
            if option == 0:
                continue
            shifted = best[: size + 1 - costs[option]] + values[option]
            better = shifted > grown[costs[option] :]
            grown[costs[option] :][better] = shifted[better]
            taken[group, costs[option] :][better] = option
        best = grown
    choice, left = np.zeros(len(value_GK), dtype=np.int64), size
    for group in reversed(range(len(value_GK))):
        choice[group] = taken[group, left]
        left -= int(cost_GK[group, choice[group]])
    return choice


def _at_scale(menus: Menus, scale: float) -> IntArray:
    choice_G = np.zeros(len(menus.worker_G), dtype=np.int64)
    for worker, budget in enumerate((menus.budget_W * scale).astype(int).tolist()):
        mine = np.flatnonzero(menus.worker_G == worker)
        if len(mine):
            choice_G[mine] = _device(menus, mine, budget)
    return choice_G


def _device(menus: Menus, mine: IntArray, budget: int) -> IntArray:
    runs, trains = menus.runs_GK[mine], menus.trains_GK[mine]
    cost, rows = menus.cost_GK[mine], np.arange(len(mine))
    first = best_options(
        np.where(runs == trains, menus.backward_GK[mine], -np.inf), cost, int(budget * menus.full_share)
    )
    spent = cost[rows, first]
    usable = np.isfinite(menus.backward_GK[mine])
    extends = usable & (trains == trains[rows, first][:, None]) & (runs >= runs[rows, first][:, None])
    more = np.where(extends, cost - spent[:, None], 0)
    value = np.where(extends, menus.forward_GK[mine] - menus.forward_GK[mine][rows, first][:, None], -np.inf)
    return _onto(value, more, budget - int(spent.sum()), first)


def _onto(value_GK: FloatArray, cost_GK: IntArray, budget: int, first_G: IntArray) -> IntArray:
    """The second stage, in which the first stage's option is each group's option 0."""
    rows = np.arange(len(first_G))
    swapped_value, swapped_cost = value_GK.copy(), cost_GK.copy()
    for array in (swapped_value, swapped_cost):
        array[rows, 0], array[rows, first_G] = array[rows, first_G].copy(), array[rows, 0].copy()
    chosen = best_options(swapped_value, swapped_cost, budget)
    return np.where(chosen == 0, first_G, np.where(chosen == first_G, 0, chosen))
