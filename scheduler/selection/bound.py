"""Bound: the linear program over mean participation, which bounds the worth of every selection within the budgets.

Per micro-batch, as means over the cycle: r[u] of a unit that it runs, q[g] of a group that it trains, t[h] of a head
that it is FULL; t ≤ q ≤ r. The fixed charge of taking part is the messages that P participants of a block exchange:

    up      4·(P − 1) for a block; 3·(P − 1) for the lowest that runs, whose workers all embed
    down    4·(P − 1); the lowest trained block saves P − 1 where the embedding is not trained
    across  1 more each way between blocks next to each other, both running, whose teams have nobody in common

Every micro-batch trains at least one head. Means of P − 1 above 0 are no smaller than the mean of P less 1, so all of
this is linear from below. Workers keep their shares of the compute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from ortools.linear_solver import pywraplp

from scheduler.cost import tally_bytes, trunk_bytes
from scheduler.domain import FloatArray, Scores
from scheduler.program import EMBED_UNIT
from scheduler.selection.meter import Meter
from scheduler.selection.words import FORWARD_WEIGHT, Unit

Variable = Any  # pywraplp has no types


@dataclass(frozen=True, eq=False)
class Means:
    """An optimum: mean runs of every unit and FULL share of every head, and its worth as a fraction of all-FULL."""

    runs_U: FloatArray
    full_LH: FloatArray
    worth: float


class MeansProgram:
    """The program for one placement, built once and solved for several limits on bytes."""

    def __init__(
        self,
        meter: Meter,
        scores: Scores,
        units: list[Unit],
        budget: float,
        caps_W: FloatArray,
        least_full: float = 1.0,
    ) -> None:
        self.meter, self.units = meter, units
        self.solver = solver = pywraplp.Solver.CreateSolver("GLOP")
        placement, forward = meter.placement, meter.forward_LH / float(meter.forward_LH.max())
        scale, back = meter.num_micro_batches * float(meter.forward_LH.max()), meter.backward_weight
        blocks, heads = placement.owner_LH.shape
        self.runs = [solver.NumVar(0, 1, "") for _ in units]
        self.full = [[solver.NumVar(0, 1, "") for _ in range(heads)] for _ in range(blocks)]
        joins: dict[tuple[int, int], Variable] = {}
        trains: dict[tuple[int, int], Variable] = {}
        work: list[list[pywraplp.LinearExpr]] = [[] for _ in range(placement.num_workers)]
        worth = []
        for unit, run in zip(units, self.runs, strict=True):
            key = (unit.block, unit.worker)
            if key not in joins:
                joins[key], trains[key] = solver.NumVar(0, 1, ""), solver.NumVar(0, 1, "")
                solver.Add(trains[key] <= joins[key])
            solver.Add(joins[key] >= run)
            for h in unit.heads:
                solver.Add(self.full[unit.block][h] <= run)
                solver.Add(self.full[unit.block][h] <= trains[key])
                work[unit.worker].append(float(forward[unit.block, h]) * (run + back * self.full[unit.block][h]))
                worth.append(FORWARD_WEIGHT * float(scores.forward_LH[unit.block, h]) * run)
                worth.append(float(scores.backward_LH[unit.block, h]) * self.full[unit.block][h])
        for mine, cap in zip(work, caps_W.tolist(), strict=True):
            if mine:
                solver.Add(sum(mine) <= cap / scale)
        solver.Add(sum(sum(mine) for mine in work if mine) <= budget / scale)
        solver.Add(sum(full for row in self.full for full in row) >= least_full)
        self.limit = solver.Add(self._sent(joins, trains) <= 0)
        self.worth = sum(worth)
        self.total = float((FORWARD_WEIGHT * scores.forward_LH + scores.backward_LH).sum())

    def solve(self, max_bytes: float) -> Means | None:
        """The optimum within so many bytes of a step; None where there is none."""
        meter, embedders = self.meter, len(self.meter.placement.embedders)
        workers = meter.placement.num_workers
        fixed = workers * (workers - 1) * tally_bytes(meter.costs.step)
        fixed += 2 * (embedders - 1) * meter.embed_grad * trunk_bytes(meter.costs.shape, meter.costs.step, [EMBED_UNIT])
        widest = max(len(meter.placement.holders(b)) for b in range(len(meter.placement.owner_LH)))
        spare = 0 if meter.embed_grad else widest - 1
        self.limit.SetUb((max_bytes - fixed) / meter.costs.residual_bytes / meter.num_micro_batches + spare)
        self.solver.Maximize(self.worth)
        if self.solver.Solve() != pywraplp.Solver.OPTIMAL:
            return None
        return Means(
            np.array([run.solution_value() for run in self.runs]),
            np.array([[full.solution_value() for full in row] for row in self.full]),
            self.solver.Objective().Value() / self.total,
        )

    def _sent(
        self, joins: dict[tuple[int, int], Variable], trains: dict[tuple[int, int], Variable]
    ) -> pywraplp.LinearExpr:
        """Messages of a micro-batch, from below; gradients of norms count as parts of a message."""
        solver, placement = self.solver, self.meter.placement
        teams = [placement.holders(b) for b in range(len(placement.owner_LH))]
        norm = trunk_bytes(self.meter.costs.shape, self.meter.costs.step, [0]) / self.meter.costs.residual_bytes
        empty = solver.NumVar(0, 1, "")  # micro-batches for which nobody runs the lowest block
        terms = [-(max(map(len, teams)) - 1) * empty]
        for b, team in enumerate(teams):
            up, down, touched = (solver.NumVar(0, solver.infinity(), "") for _ in range(3))
            solver.Add(up >= sum(joins[b, w] for w in team) - 1)
            solver.Add(down >= sum(trains[b, w] for w in team) - 1)
            terms += [(3 if b == 0 else 4) * up, 4 * down]
            if len(team) > 1:
                terms.append(2 * (len(team) - 1) * norm / self.meter.num_micro_batches * touched)
            for w in team:
                solver.Add(touched >= trains[b, w])
                if b == 0:
                    solver.Add(empty <= 1 - joins[b, w])
            if b and not set(team) & set(teams[b - 1]):
                for part in (joins, trains):
                    cross = solver.NumVar(0, solver.infinity(), "")
                    terms.append(cross)
                    for below in teams[b - 1]:
                        for above in team:
                            solver.Add(cross >= part[b - 1, below] + part[b, above] - 1)
        return sum(terms)
