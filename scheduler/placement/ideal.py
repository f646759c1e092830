"""The ideal split: how short a step would be if work were infinitely divisible and wires were free."""

from __future__ import annotations

from ortools.linear_solver import pywraplp

from scheduler.cost import Costs
from scheduler.domain import StaticPart
from scheduler.placement.instance import Instance


def ideal_us(costs: Costs, static: StaticPart | None = None) -> float:
    """µs of a step whose work is shared out by speed; no placement is faster.

    A head costs what it costs in the cheapest call of its worker; embedding and classifier may be shared out too.
    """
    instance = Instance(costs, static)
    times, heads = costs.step.num_micro_batches, range(1, instance.num_heads + 1)
    solver = pywraplp.Solver.CreateSolver("GLOP")
    step, inf = solver.NumVar(0, solver.infinity(), "step"), solver.infinity()
    num_only = instance.num_blocks * instance.num_heads - instance.num_full
    shares = [solver.Constraint(n, n) for n in (instance.num_full, num_only, 1, 1)]
    for w in range(instance.num_workers):
        busy = solver.Constraint(-inf, 0)
        busy.SetCoefficient(step, -1)
        full_us, only_us = instance.busy_WAO[w, :, 0], instance.busy_WAO[w, 0, :]
        run = times * instance.run_share
        each = (
            run * min(int(full_us[n]) / n for n in heads) + costs.update_us(w, 1),
            run * min(int(only_us[n]) / n for n in heads),
            times * costs.embed_us(w),
            times * costs.classify_us(w),
        )
        for share, us in zip(shares, each, strict=True):
            part = solver.NumVar(0, inf, "")
            share.SetCoefficient(part, 1)
            busy.SetCoefficient(part, us)
    solver.Minimize(step)
    if solver.Solve() != pywraplp.Solver.OPTIMAL:
        raise ValueError("the ideal split has no solution")
    return float(solver.Objective().Value())
