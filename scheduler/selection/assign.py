"""Assignment: F items FULL, O items FORWARD, the rest SKIP, worth most; items cost the same.

    maximise   Σ forward over the items that run + Σ backward over those that train

With a price θ on training an item gains forward + max(0, backward − θ) by running, so those gaining most run, and θ is
raised until F of them would train. For every θ the Lagrangian Σ gains + θ·F bounds the optimum from above; where no
items are tied to a group it is reached, up to ties. Items of a group run together as far as the counts allow: at most
one group is cut.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from ortools.sat.python import cp_model

from scheduler.domain import FloatArray, IntArray, Op

SCALE = 10_000  # worths become integers of 1e-4 of a mean head's worth
EFFORT = 1.0  # deterministic seconds of CP-SAT: the answer does not depend on how busy the machine is
HALVINGS = 40


@dataclass(frozen=True, eq=False)
class Items:
    """What may run: worth of running and of training each item, and the group that it belongs to.

    `train_together`: the items of a group also train together; they have the same worths then.
    """

    forward_I: FloatArray
    backward_I: FloatArray
    group_I: IntArray
    num_full: int
    num_run: int
    train_together: bool = False

    def worth(self, ops_I: IntArray) -> float:
        """Of an answer, whoever gave it."""
        runs, trains = ops_I > Op.SKIP, ops_I == Op.FULL
        return float(self.forward_I[runs].sum() + self.backward_I[trains].sum())


def assign_by_price(items: Items) -> tuple[IntArray, float]:
    """(ops, upper bound) by halving the price of training."""
    low, high = -1.0, float(items.backward_I.max(initial=0.0)) + 1.0
    best, worth, bound = _at(items, 0.0)
    for _ in range(HALVINGS):
        price = (low + high) / 2
        ops_I, seen, above = _at(items, price)
        if seen > worth:
            best, worth = ops_I, seen
        bound = min(bound, above)
        if bound - worth <= 1e-9:
            break
        willing = (items.backward_I[ops_I > Op.SKIP] > price).sum()
        low, high = (price, high) if willing > items.num_full else (low, price)
    return best, max(bound, worth)


def assign_in_stages(items: Items) -> tuple[IntArray, float]:
    """FULL by backward worth alone, then FORWARD by forward worth among the rest; the bound is that of the whole."""
    backward, forward = (_means(worth, items.group_I) for worth in (items.backward_I, items.forward_I))
    ops_I = np.zeros(len(items.group_I), dtype=np.int64)
    ops_I[_top(backward, items.group_I, items.num_full)] = int(Op.FULL)
    rest = np.where(ops_I == Op.FULL, -np.inf, forward)
    ops_I[_top(rest, items.group_I, items.num_run - items.num_full)] = int(Op.FORWARD)
    return ops_I, assign_by_price(items)[1]


def assign_proved(items: Items) -> tuple[IntArray, float]:
    """The same instance by CP-SAT, which may cut one group for running and one for training."""
    model = cp_model.CpModel()
    count = len(items.group_I)
    runs, trains = ([model.new_bool_var("") for _ in range(count)] for _ in range(2))
    for run, train in zip(runs, trains, strict=True):
        model.add_implication(train, run)
    model.add(sum(runs) == items.num_run)
    model.add(sum(trains) == items.num_full)
    for tied in (runs, trains)[: 1 + items.train_together]:
        _tie(model, tied, items.group_I)
    forward, backward = (np.rint(w * SCALE).astype(int).tolist() for w in (items.forward_I, items.backward_I))
    model.maximize(cp_model.LinearExpr.weighted_sum(runs + trains, forward + backward))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.linearization_level = 2
    solver.parameters.max_deterministic_time = EFFORT
    for variable, value in zip(runs + trains, _hints(assign_by_price(items)[0]), strict=True):
        model.add_hint(variable, value)
    if solver.solve(model) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return assign_by_price(items)
    ops_I = np.array([solver.value(r) + solver.value(t) for r, t in zip(runs, trains, strict=True)], dtype=np.int64)
    return ops_I, max(items.worth(ops_I), solver.best_objective_bound / SCALE)


def _tie(model: cp_model.CpModel, chosen: list[cp_model.IntVar], group_I: IntArray) -> None:
    """Items of a group are chosen together, but for one group."""
    cuts = []
    for group in np.flatnonzero(np.bincount(group_I) > 1):
        cut, members = model.new_bool_var(""), np.flatnonzero(group_I == group).tolist()
        cuts.append(cut)
        for a, b in itertools.pairwise([*members, members[0]]):
            model.add_bool_or(chosen[a].negated(), chosen[b], cut)
    model.add_at_most_one(cuts)


def _at(items: Items, price: float) -> tuple[IntArray, float, float]:
    """(ops, their worth, the Lagrangian) at one price of training; the Lagrangian knows no groups."""
    gain_I = items.forward_I + np.maximum(0.0, items.backward_I - price)
    bound = float(np.sort(gain_I)[::-1][: items.num_run].sum()) + price * items.num_full
    order = _whole_groups(gain_I, items.group_I, items.num_run)
    ops_I = np.zeros(len(items.group_I), dtype=np.int64)
    ops_I[order] = int(Op.FORWARD)
    train = np.argsort(-items.backward_I[order], kind="stable")[: items.num_full]
    ops_I[order[train]] = int(Op.FULL)
    return ops_I, items.worth(ops_I), bound


def _whole_groups(gain_I: FloatArray, group_I: IntArray, count: int) -> IntArray:
    """`count` items: whole groups by mean gain while they fit, then the best items of the one group that gives most."""
    size_G = np.bincount(group_I)
    if size_G.max(initial=1) == 1:
        return _top(gain_I, group_I, count)
    mean_G = np.bincount(group_I, weights=gain_I) / size_G
    whole_G, left = np.zeros(len(size_G), dtype=np.bool_), count
    for group in np.argsort(-mean_G, kind="stable"):
        if size_G[group] <= left:
            whole_G[group], left = True, left - int(size_G[group])
    taken = np.flatnonzero(whole_G[group_I])
    taken = taken[np.lexsort((taken, group_I[taken], -mean_G[group_I[taken]]))]
    if not left:
        return taken
    order = np.lexsort((-gain_I, group_I))
    place = np.arange(len(order)) - (np.cumsum(size_G) - size_G)[group_I[order]]
    first = order[(place < left) & ~whole_G[group_I[order]]]
    gain_G = np.bincount(group_I[first], weights=gain_I[first], minlength=len(size_G))
    cut = int(np.argmax(np.where(whole_G, -np.inf, gain_G)))
    return np.concatenate([taken, first[group_I[first] == cut]])


def _top(worth_I: FloatArray, group_I: IntArray, count: int) -> IntArray:
    """Indices of the `count` worthiest; items of one group follow each other."""
    order: IntArray = np.lexsort((group_I, -worth_I))[:count].astype(np.int64)
    return order


def _means(worth_I: FloatArray, group_I: IntArray) -> FloatArray:
    count = np.bincount(group_I)
    if count.max(initial=1) == 1:
        return worth_I
    means: FloatArray = (np.bincount(group_I, weights=worth_I) / np.maximum(count, 1))[group_I]
    return means


def _hints(ops_I: IntArray) -> list[int]:
    return [*(ops_I > Op.SKIP).astype(int).tolist(), *(ops_I == Op.FULL).astype(int).tolist()]
