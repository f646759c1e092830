"""Proof: the same menus by CP-SAT, from the hull's answer on."""

from __future__ import annotations

import numpy as np
from ortools.sat.python import cp_model

from scheduler.selection.assign import EFFORT
from scheduler.selection.hull import pick_by_hull
from scheduler.selection.menus import Menus, Picked

SCALE = 1_000_000  # worths become integers


def pick_proved(menus: Menus, effort: float = EFFORT, seconds: float = 30.0) -> Picked:
    """The best choice, proved if `effort` (deterministic seconds) suffices; never worse than the hull's."""
    start = pick_by_hull(menus)
    model, groups = cp_model.CpModel(), range(len(menus.worker_G))
    worth_GK, usable = menus.worths, np.isfinite(menus.worths)
    options = [{int(k): model.new_bool_var("") for k in np.flatnonzero(usable[g])} for g in groups]
    for g in groups:
        model.add_exactly_one(options[g].values())
        for k, picked in options[g].items():
            model.add_hint(picked, int(k == start.choice_G[g]))
    flat = [(g, k, picked) for g in groups for k, picked in options[g].items()]
    variables = [picked for _, _, picked in flat]
    for worker, budget in enumerate(menus.budget_W.tolist()):
        mine = [(v, int(menus.cost_GK[g, k])) for g, k, v in flat if menus.worker_G[g] == worker]
        model.add(cp_model.LinearExpr.weighted_sum([v for v, _ in mine], [c for _, c in mine]) <= budget)
    if np.isfinite(menus.max_bytes):
        sent = [int(menus.bytes_GK[g, k]) for g, k, _ in flat]
        model.add(cp_model.LinearExpr.weighted_sum(variables, sent) <= int(menus.max_bytes))
    model.maximize(cp_model.LinearExpr.weighted_sum(variables, [round(worth_GK[g, k] * SCALE) for g, k, _ in flat]))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1  # one thread: the same answer every time
    solver.parameters.linearization_level = 2
    solver.parameters.max_deterministic_time = effort
    solver.parameters.max_time_in_seconds = seconds
    status = solver.solve(model)
    bound = min(start.bound, solver.best_objective_bound / SCALE + len(worth_GK) / SCALE)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return start
    choice_G = np.array([next(k for k, v in options[g].items() if solver.value(v)) for g in groups], dtype=np.int64)
    worth = menus.totals(choice_G)[0]
    if worth < start.worth:
        choice_G, worth = start.choice_G, start.worth
    return Picked(choice_G, worth, max(bound, worth), solver.status_name(status))
