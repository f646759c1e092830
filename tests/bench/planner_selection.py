"""The selection's knapsack alone: how near to the linear program's optimum it comes, and how fast, beside solvers.

An instance is so many heads × micro-batches on so many workers: blocks of 6 heads (8 in the largest), each shared by 2
workers, or whole on one of them in turn where there is but one head a worker. Worths are log-normal by head, varied by
micro-batch; costs are µs with a fixed charge for taking part, forward and backward apart; every worker has 60 % of its
all-FULL time, and where bytes count 55 % of all-FULL's. "scattered" chooses head by head, "coherent" a worker's heads
of a block together. Seconds are the processor's, medians of several runs; the solvers stop at a time limit.
"""

from __future__ import annotations

import time

import numpy as np
from ortools.linear_solver import pywraplp

from scheduler.selection.hull import pick_by_hull
from scheduler.selection.menus import coherent_menus, scattered_menus
from scheduler.selection.proof import pick_proved
from scheduler.selection.stages import pick_in_stages
from tests.bench.report import target

INSTANCES = {
    "72×5/2": (12, 6, 5, 2),
    "72×16/4": (12, 6, 16, 4),
    "144×64/8": (24, 6, 64, 8),
    "768×64/16": (96, 8, 64, 16),
}
TIME_SHARE, BYTES_SHARE = 0.6, 0.55
FORWARD_US, FORWARD_FIXED_US, MESSAGE_BYTES = 130, 60, 1_228_800
LIMIT_S = 10  # of each solver
REPEATS = 7
LARGEST_SOLVED = 20_000  # options; beyond these a solver has no chance within its limit


def instance(name, grain="scattered", max_bytes=True, seed=0):
    """The menus of one instance; costs differ a little by worker, so that sums rarely hit a budget."""
    blocks, heads, micro_batches, workers = INSTANCES[name]
    rng = np.random.default_rng(seed)
    half, teams = heads // 2, workers // 2
    forward_LH = rng.lognormal(0.0, 0.4, (blocks, heads))
    backward_LHM = rng.lognormal(0.0, 0.8, (blocks, heads, 1)) * rng.lognormal(0.0, 0.5, (blocks, heads, micro_batches))
    shape = (blocks, 2, half, micro_batches)
    forward_GN = 2 * np.broadcast_to(forward_LH.reshape(blocks, 2, half, 1), shape).transpose(0, 1, 3, 2).reshape(
        -1, half
    )
    backward_GN = backward_LHM.reshape(shape).transpose(0, 1, 3, 2).reshape(-1, half)
    block_G, side_G, _ = (a.ravel() for a in np.meshgrid(*map(np.arange, (blocks, 2, micro_batches)), indexing="ij"))
    worker_G = 2 * (block_G % teams) + side_G
    speed_W = rng.uniform(0.9, 1.1, workers)
    curve_K = FORWARD_FIXED_US * (np.arange(half + 1) > 0) + FORWARD_US * np.arange(half + 1)
    cost_GN1 = np.rint(curve_K / speed_W[worker_G][:, None]).astype(np.int64)
    bytes_G2 = np.full((len(worker_G), 2), 4 * MESSAGE_BYTES) * (side_G == 1)[:, None]
    all_full_W = np.bincount(worker_G, weights=3 * cost_GN1[:, -1], minlength=workers)
    budget_W = (TIME_SHARE * all_full_W).astype(np.int64)
    most = float(BYTES_SHARE * bytes_G2.sum()) if max_bytes else np.inf
    if grain == "scattered":
        return scattered_menus(worker_G, forward_GN, backward_GN, cost_GN1, 2 * cost_GN1, bytes_G2, budget_W, most)
    cost_G2 = np.stack([cost_GN1[:, -1], 2 * cost_GN1[:, -1]], axis=1)
    heads_G = np.full(len(worker_G), half)
    return coherent_menus(
        worker_G, forward_GN.sum(axis=1), backward_GN.sum(axis=1), heads_G, cost_G2, bytes_G2, budget_W, most
    )


def rows():
    return [_row(name, grain, limited) for name in INSTANCES for grain in ("scattered", "coherent")
            for limited in (False, True)]  # fmt: skip


def targets(rows):
    """Of what was asked: the gap of every instance, the seconds of two."""
    found = [target("hull: largest gap to the linear program", max(r["hull gap %"] for r in rows), "<=", 0.1)]
    for name, limit in (("72×16/4", 5.0), ("768×64/16", 50.0)):
        slowest = max(r["hull ms"] for r in rows if r["heads×mbs/workers"] == name)
        found.append(target(f"hull: median ms, {name}", slowest, "<=", limit))
    return found


def _row(name, grain, limited):
    menus = instance(name, grain, limited)
    hull, hull_ms = _timed(lambda: pick_by_hull(menus), REPEATS)
    stages, stages_ms = _timed(lambda: pick_in_stages(menus), 1)
    row = {
        "heads×mbs/workers": name,
        "grain": grain,
        "bytes": "55 %" if limited else "free",
        "hull gap %": 100 * hull.gap,
        "hull ms": hull_ms,
        "two-stage gap %": 100 * (hull.bound - stages.worth) / hull.bound,
        "two-stage ms": stages_ms,
    }
    for label, solve in (("CP-SAT", _cpsat), ("HiGHS", _highs)):
        small = np.isfinite(menus.worths).sum() <= LARGEST_SOLVED
        (worth, ms) = _timed(lambda solve=solve: solve(menus), 1) if small else (None, 0.0)
        row[f"{label} gap %"] = "not tried" if worth is None else _gap(hull.bound, worth)
        row[f"{label} ms"] = ms if worth is not None else "not tried"
    return row


def _gap(bound, worth):
    """In percent; a solver may exceed the bound by its tolerance."""
    return "nothing in time" if np.isnan(worth) else 100 * max(0.0, bound - worth) / bound


def _cpsat(menus):
    """With the hull's answer as a hint, as the product uses it."""
    return pick_proved(menus, effort=LIMIT_S, seconds=LIMIT_S).worth


def _highs(menus):
    """The worth that HiGHS finds, nan where it finds nothing in time."""
    solver = pywraplp.Solver.CreateSolver("HIGHS")
    solver.SetTimeLimit(1000 * LIMIT_S)
    solver.SetNumThreads(1)
    usable = np.isfinite(menus.worths)
    picked = [{int(k): solver.BoolVar("") for k in np.flatnonzero(row)} for row in usable]
    used = [[] for _ in menus.budget_W]
    for g, options in enumerate(picked):
        solver.Add(sum(options.values()) == 1)
        used[menus.worker_G[g]] += [int(menus.cost_GK[g, k]) * v for k, v in options.items() if k]
    for spent, budget in zip(used, menus.budget_W.tolist(), strict=True):
        solver.Add(sum(spent) <= budget)
    flat = [(g, k, v) for g, options in enumerate(picked) for k, v in options.items()]
    if np.isfinite(menus.max_bytes):
        solver.Add(sum(int(menus.bytes_GK[g, k]) / MESSAGE_BYTES * v for g, k, v in flat)
                   <= menus.max_bytes / MESSAGE_BYTES)  # fmt: skip
    solver.Maximize(sum(float(menus.worths[g, k]) * v for g, k, v in flat))
    found = solver.Solve() in (pywraplp.Solver.OPTIMAL, pywraplp.Solver.FEASIBLE)
    return solver.Objective().Value() if found else float("nan")


def _timed(work, repeats):
    """(answer, median processor ms)."""
    spent = []
    for _ in range(repeats):
        began = time.process_time()
        answer = work()
        spent.append(1000 * (time.process_time() - began))
    return answer, float(np.median(spent))
