"""Held still: which heads stay FULL over a window.

    maximise   Σ worth of the FULL heads
    subject to `total` FULL heads, each worker its share of them, rounded down or up

Without a charge on messages the most worthy heads of each worker are the answer; what rounding leaves goes to the
workers whose next head is worth most. CP-SAT says the same, as a proof.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ortools.sat.python import cp_model

from scheduler.domain import BoolArray, FloatArray, Placement
from scheduler.selection.assign import EFFORT, SCALE


@dataclass(frozen=True, eq=False)
class Held:
    """The FULL heads and what they are worth."""

    full_LH: BoolArray
    worth: float


def choose_full(
    worth_LH: FloatArray, placement: Placement, limits: Sequence[tuple[int, int]], total: int, *, proved: bool = False
) -> Held:
    """`total` heads, between the least and the most of each worker; raises ValueError where the limits forbid it."""
    if not sum(least for least, _ in limits) <= total <= sum(most for _, most in limits):
        raise ValueError(f"{total} heads cannot be chosen within {list(limits)}")
    full_LH = (_proved if proved else _greedy)(worth_LH, placement, limits, total)
    return Held(full_LH, float(worth_LH[full_LH].sum()))


def _greedy(worth_LH: FloatArray, placement: Placement, limits: Sequence[tuple[int, int]], total: int) -> BoolArray:
    worth, owner = worth_LH.ravel(), placement.owner_LH.ravel()
    order = np.argsort(-worth, kind="stable")
    full = np.zeros(worth.size, dtype=np.bool_)
    taken_W = np.zeros(placement.num_workers, dtype=np.int64)
    rest = []
    for head in order:
        least, most = limits[owner[head]]
        if taken_W[owner[head]] < least:
            full[head] = True
        elif taken_W[owner[head]] < most:
            rest.append(head)
        taken_W[owner[head]] += 1
    full[rest[: total - int(full.sum())]] = True
    return full.reshape(worth_LH.shape)


def _proved(worth_LH: FloatArray, placement: Placement, limits: Sequence[tuple[int, int]], total: int) -> BoolArray:
    model, owners = cp_model.CpModel(), placement.owner_LH.ravel()
    full = [model.new_bool_var("") for _ in owners]
    model.add(sum(full) == total)
    for worker, (least, most) in enumerate(limits):
        mine = [y for y, owner in zip(full, owners, strict=True) if owner == worker]
        model.add_linear_constraint(sum(mine), least, most)
    worths = np.rint(worth_LH.ravel() * SCALE).astype(int).tolist()
    model.maximize(cp_model.LinearExpr.weighted_sum(full, worths))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1  # one thread: the same answer every time
    solver.parameters.linearization_level = 2
    solver.parameters.max_deterministic_time = EFFORT
    if solver.solve(model) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return _greedy(worth_LH, placement, limits, total)
    return np.array([solver.boolean_value(y) for y in full], dtype=np.bool_).reshape(worth_LH.shape)
