"""Menus: the instance of a multiple-choice knapsack, and its judge that knows no solver.

A group is one worker's heads of one block for one micro-batch. Its menu has an option for each (heads that run, heads
that train); option 0 is that all of them sit out, at no cost. Exactly one option of each group is picked:

    maximise   Σ worth
    subject to Σ cost ≤ budget of every worker,  Σ bytes ≤ max_bytes over all

Costs are integers of any unit (µs, FLOPs); those of an option hold the fixed charges of taking part in forward, and in
backward, once each. Axes: G groups, K options (padded with options of worth −inf), W workers, N heads of a group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from scheduler.domain import FloatArray, IntArray, Op


@dataclass(frozen=True, eq=False)
class Menus:
    """One instance. `forward_GK` and `backward_GK` sum to the worth; `runs_GK` ≥ `trains_GK` are numbers of heads.

    `full_share` of the time is for FULL operations where a strategy chooses these first: FULL costs three times a
    FORWARD, so three quarters are as many of the one as of the other.
    """

    worker_G: IntArray
    forward_GK: FloatArray
    backward_GK: FloatArray
    cost_GK: IntArray
    bytes_GK: IntArray
    runs_GK: IntArray
    trains_GK: IntArray
    budget_W: IntArray
    max_bytes: float = np.inf
    full_share: float = 0.75

    @cached_property
    def worths(self) -> FloatArray:
        """[G, K], −inf where a menu has no such option."""
        result: FloatArray = self.forward_GK + self.backward_GK
        return result

    @cached_property
    def floats(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """(worth, cost, bytes) as [G, K], floating."""
        arrays = (self.worths, self.cost_GK, self.bytes_GK)
        worth, cost, sent = (np.ascontiguousarray(array, dtype=np.float64) for array in arrays)
        return worth, cost, sent

    def sample(self, stride: int) -> Menus:
        """Every so many groups, with their part of the budgets."""
        rows = slice(None, None, stride)
        share_W = np.bincount(self.worker_G[rows], minlength=len(self.budget_W)) / np.maximum(
            np.bincount(self.worker_G, minlength=len(self.budget_W)), 1
        )
        names = ("worker_G", "forward_GK", "backward_GK", "cost_GK", "bytes_GK", "runs_GK", "trains_GK")
        parts = {name: getattr(self, name)[rows] for name in names}
        total = max(1.0, float(self.bytes_GK.max(axis=1).sum()))
        max_bytes = self.max_bytes * float(parts["bytes_GK"].max(axis=1).sum()) / total
        return replace(self, **parts, budget_W=(self.budget_W * share_W).astype(np.int64), max_bytes=max_bytes)

    def totals(self, choice_G: IntArray) -> tuple[float, IntArray, int]:
        """(worth, cost per worker, bytes) of one choice."""
        rows = np.arange(len(choice_G))
        cost_W = np.bincount(self.worker_G, weights=self.cost_GK[rows, choice_G], minlength=len(self.budget_W))
        return (
            float(self.worths[rows, choice_G].sum()),
            cost_W.astype(np.int64),
            int(self.bytes_GK[rows, choice_G].sum()),
        )

    def fits(self, choice_G: IntArray) -> bool:
        worth, cost_W, sent = self.totals(choice_G)
        return bool(np.isfinite(worth) and (cost_W <= self.budget_W).all() and sent <= self.max_bytes)


@dataclass(frozen=True, eq=False)
class Prices:
    """What a unit of each worker's time costs, and a byte, in worth."""

    time_W: FloatArray
    bytes: float


@dataclass(frozen=True, eq=False)
class Picked:
    """An option of every group, its worth, an upper bound on any choice's worth, and what the solver says."""

    choice_G: IntArray
    worth: float
    bound: float
    status: str

    @property
    def gap(self) -> float:
        return max(0.0, self.bound - self.worth) / max(self.bound, 1e-12)


def coherent_menus(
    worker_G: IntArray,
    forward_G: FloatArray,
    backward_G: FloatArray,
    heads_G: IntArray,
    cost_G2: IntArray,
    bytes_G2: IntArray,
    budget_W: IntArray,
    max_bytes: float = np.inf,
) -> Menus:
    """Groups that do one thing: SKIP, FORWARD or FULL. `cost_G2`, `bytes_G2`: of forward, and of backward on top."""
    zero_G = np.zeros_like(forward_G)
    return Menus(
        worker_G,
        np.stack([zero_G, forward_G, forward_G], axis=1),
        np.stack([zero_G, zero_G, backward_G], axis=1),
        _stages(cost_G2),
        _stages(bytes_G2),
        np.stack([0 * heads_G, heads_G, heads_G], axis=1),
        np.stack([0 * heads_G, 0 * heads_G, heads_G], axis=1),
        budget_W,
        max_bytes,
    )


def scattered_menus(
    worker_G: IntArray,
    forward_GN: FloatArray,
    backward_GN: FloatArray,
    forward_cost_GN1: IntArray,
    backward_cost_GN1: IntArray,
    bytes_G2: IntArray,
    budget_W: IntArray,
    max_bytes: float = np.inf,
) -> Menus:
    """Head by head: (r, t) for every t ≤ r, with the r heads and t of them that are worth most together.

    Worths of heads that a group does not have are −inf; entry k of a cost curve is for k heads, entry 0 is 0.
    """
    heads = forward_GN.shape[1]
    pairs = [(r, t) for r in range(heads + 1) for t in range(r + 1)]
    worth, forward = best_subsets(forward_GN, backward_GN)
    runs_K, trains_K = (np.array(column) for column in zip(*pairs, strict=True))
    forward_GK = np.stack([forward[:, r, t] for r, t in pairs], axis=1)
    backward_GK = np.stack([worth[:, r, t] for r, t in pairs], axis=1)
    usable = np.isfinite(backward_GK)
    backward_GK = np.where(usable, backward_GK - np.where(usable, forward_GK, 0.0), -np.inf)
    sent = bytes_G2[:, :1] * (runs_K > 0) + bytes_G2[:, 1:] * (trains_K > 0)
    return Menus(
        worker_G,
        np.where(usable, forward_GK, 0.0),
        backward_GK,
        forward_cost_GN1[:, runs_K] + backward_cost_GN1[:, trains_K],
        sent,
        np.broadcast_to(runs_K, forward_GK.shape),
        np.broadcast_to(trains_K, forward_GK.shape),
        budget_W,
        max_bytes,
    )


def best_subsets(forward_GN: FloatArray, backward_GN: FloatArray) -> tuple[FloatArray, FloatArray]:
    """([G, r, t] worth of the best r heads to run and t of them to train, the forward worth in it), head by head."""
    groups, heads = forward_GN.shape
    worth = np.full((groups, heads + 1, heads + 1), -np.inf)
    forward = np.zeros_like(worth)
    worth[:, 0, 0] = 0.0
    for head in range(heads):
        f, b = forward_GN[:, head, None, None], backward_GN[:, head, None, None]
        for shift, gain in (((1, 0), f), ((1, 1), f + b)):
            source = (slice(None), slice(0, heads), slice(0, heads + 1 - shift[1]))
            goal = (slice(None), slice(1, heads + 1), slice(shift[1], heads + 1))
            if shift == (1, 0):
                before, before_forward, new, new_forward = worth.copy(), forward.copy(), worth.copy(), forward.copy()
            candidate = before[source] + gain
            better = candidate > new[goal]
            new[goal] = np.where(better, candidate, new[goal])
            new_forward[goal] = np.where(better, before_forward[source] + f, new_forward[goal])
        worth, forward = new, new_forward
    return worth, forward


def best_ops(forward_N: FloatArray, backward_N: FloatArray, runs: int, trains: int) -> IntArray:
    """[N] ops of one group's heads: the most worthy way for `runs` of them to run and `trains` of these to train."""
    order = range(len(forward_N))
    table = {(0, 0): (0.0, ())}
    for head in order:
        grown: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
        for (r, t), (worth, ops) in table.items():
            f, b = float(forward_N[head]), float(backward_N[head])
            for op, gain in ((Op.SKIP, 0.0), (Op.FORWARD, f), (Op.FULL, f + b)):
                key = (r + (op > Op.SKIP), t + (op == Op.FULL))
                if key[0] <= runs and key[1] <= trains and (key not in grown or worth + gain > grown[key][0]):
                    grown[key] = (worth + gain, (*ops, int(op)))
        table = grown  # type: ignore[assignment]
    return np.array(table[runs, trains][1], dtype=np.int64)


def _stages(amount_G2: IntArray) -> IntArray:
    zero_G = np.zeros_like(amount_G2[:, 0])
    result: IntArray = np.stack([zero_G, amount_G2[:, 0], amount_G2.sum(axis=1)], axis=1)
    return result
