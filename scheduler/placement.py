"""Placement: which worker owns which head, solved by CP-SAT over head counts.

The instance, and what its objective means, is in `teams`; `plan` simulates the candidates from here and has the last word.

| mode | teams that a block may have |
|---|---|
| split | one team of at least two workers for all blocks |
| whole | single workers, each with one run of consecutive blocks |
| auto | the best of split, of whole, and of a free mix |
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ortools.sat.python import cp_model

from scheduler.cost import Costs
from scheduler.domain import IntArray, Placement, Scores, SolverReport
from scheduler.errors import InfeasibleError, UserError
from scheduler.teams import Instance, Link, teams_of

MODES = ("auto", "split", "whole")
KINDS = {"auto": ("split", "whole", "mixed"), "split": ("split",), "whole": ("whole",)}
CEILING = 1 << 44  # above every time in µs and every size in bytes that a model here can have
GB = 1e9


@dataclass(frozen=True)
class Limits:
    """How long and with how many threads to solve. What is proved optimal depends on the seed alone, not on the clock."""

    seconds: float = 4.0
    workers: int = 2
    seed: int = 0


def propose(
    costs: Costs, mode: str = "auto", *, scores: Scores | None = None, limits: Limits | None = None
) -> list[tuple[Placement, SolverReport]]:
    """Candidate placements of a mode, the best by proxy first; "auto" offers split, whole and mixed ones.

    Raises InfeasibleError when the model does not fit into the fleet's memory in any of the ways of the mode.
    """
    if mode not in MODES:
        raise UserError(f"'{mode}' is not a placement mode.", code="unknown_placement", param="placement")
    found: dict[bytes, tuple[Placement, SolverReport]] = {}
    misses: list[InfeasibleError] = []
    for kind in KINDS[mode] if costs.num_workers > 1 else ("whole",):
        best = min(found.values(), key=lambda pair: pair[1].objective, default=None)
        try:
            placement, report = solve(costs, kind, scores=scores, limits=limits, hint=best and best[0])
            found.setdefault(placement.owner_LH.tobytes(), (placement, report))
        except InfeasibleError as error:
            misses.append(error)
    if not found:
        raise misses[-1]
    return sorted(found.values(), key=lambda pair: pair[1].objective)


def solve(
    costs: Costs,
    kind: str,
    *,
    scores: Scores | None = None,
    limits: Limits | None = None,
    hint: Placement | None = None,
) -> tuple[Placement, SolverReport]:
    """The best placement of one kind ("split", "whole" or "mixed") by the proxy, with the solver's bound.

    Raises InfeasibleError, naming the worker that lacks memory.
    """
    limits = limits or Limits()
    model = _Model(Instance(costs, teams_of(costs, kind)), kind)
    if hint is not None:
        model.hint(counts_of(hint))
    solver = _solver(limits)
    status = solver.solve(model.model)
    if status == cp_model.INFEASIBLE:
        raise _memory_error(model.instance, kind, limits)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        raise InfeasibleError(
            f"No {kind} placement was found in {limits.seconds:g} s.", code="placement_unsolved", param="placement"
        )
    counts_LW, classifier = model.read(solver)
    placement = Placement(assign_heads(counts_LW, classifier, scores), costs.num_workers, classifier)
    return placement, _report(solver, kind, status, counts_LW)


def counts_of(placement: Placement) -> IntArray:
    """Head counts [L, W] of a placement."""
    rows = [np.bincount(row, minlength=placement.num_workers) for row in placement.owner_LH]
    return np.array(rows, dtype=np.int64)


def assign_heads(counts_LW: IntArray, classifier: int, scores: Scores | None = None) -> IntArray:
    """Owners [L, H] from counts: a block's most worthy heads go to its *lead*, so that FULL heads can lie on few workers.

    Consecutive blocks with the same team share out the lead in proportion to their members' heads, the classifier's worker
    on top: a held-still set of FULL heads then needs no gradient sums and few crossings. Without scores the order is by index.
    """
    num_heads = int(counts_LW[0].sum())
    owner_LH = np.zeros((len(counts_LW), num_heads), dtype=np.int64)
    for block, members in enumerate(_leads(counts_LW, classifier)):
        worth_H = np.zeros(num_heads) if scores is None else scores.backward_LH[block]
        order = np.argsort(-worth_H, kind="stable")
        owner_LH[block, order] = np.repeat(members, counts_LW[block, members])
    return owner_LH


def _leads(counts_LW: IntArray, classifier: int) -> list[list[int]]:
    """For each block its members, the lead first."""
    out: list[list[int]] = []
    for team, blocks in itertools.groupby(range(len(counts_LW)), key=lambda b: tuple(np.flatnonzero(counts_LW[b]))):
        run = list(blocks)
        members = sorted((int(w) for w in team), key=lambda w: (w == classifier, w))
        shares = counts_LW[run][:, members].sum(axis=0)
        edges = np.cumsum(shares) / shares.sum() * len(run)
        for index in range(len(run)):
            lead = int(np.searchsorted(edges, index + 0.5))
            out.append(members[lead:] + members[:lead])
    return out


def _solver(limits: Limits) -> cp_model.CpSolver:
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = limits.workers
    solver.parameters.random_seed = limits.seed
    solver.parameters.max_time_in_seconds = limits.seconds
    solver.parameters.linearization_level = 2  # the defaults stayed 11–50 % from the optimum on such models
    return solver


def _report(solver: cp_model.CpSolver, kind: str, status: cp_model.CpSolverStatus, counts_LW: IntArray) -> SolverReport:
    objective, bound = solver.objective_value, solver.best_objective_bound
    return SolverReport(
        method=f"CP-SAT {kind}",
        status=solver.status_name(status),
        objective=objective,
        bound=bound,
        gap=(objective - bound) / max(objective, 1.0),
        seconds=solver.wall_time,
        note=f"µs of an all-FULL step by the proxy; heads per worker {counts_LW.sum(axis=0).tolist()}",
    )


def _memory_error(instance: Instance, kind: str, limits: Limits) -> InfeasibleError:
    """Ask for the placement that lacks the fewest bytes, and say who lacks them."""
    model = _Model(instance, kind, slack=True)
    solver = _solver(limits)
    if solver.solve(model.model) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return InfeasibleError(f"No {kind} placement exists for this fleet.", code="placement_infeasible", param="placement")
    counts_LW, classifier = model.read(solver)
    parts = []
    for worker, profile in enumerate(instance.costs.profiles):
        need = instance.memory_bytes(counts_LW[:, worker], worker == classifier)
        if need > profile.free_bytes:
            lack = (need - profile.free_bytes) / GB
            parts.append(f"worker {worker} needs {lack:.3g} GB more ({need / GB:.3g} needed, {profile.free_bytes / GB:.3g} free)")
    return InfeasibleError(
        f"The model does not fit: even in the {kind} placement that lacks least, {', '.join(parts)}. Counted are weights, "
        f"gradients and AdamW's moments, and the activations of {instance.in_flight} micro-batches in flight.",
        code="memory_infeasible",
        param="workers",
        remedy="Add workers, free memory, or make micro-batches smaller.",
    )


class _Model:
    """The CP-SAT model: takes[l][w][k] worker w has k heads of block l, has[l][t] block l has team t."""

    def __init__(self, instance: Instance, kind: str, *, slack: bool = False) -> None:
        self.instance = instance
        self.model = cp_model.CpModel()
        blocks, workers, heads = (range(n) for n in (instance.num_blocks, instance.num_workers, instance.num_heads + 1))
        new = self.model.new_bool_var
        self.has = [[new(f"has{b}_{t}") for t in range(len(instance.teams))] for b in blocks]
        self.takes = [[[new(f"takes{b}_{w}_{k}") for k in heads] for w in workers] for b in blocks]
        self.classifies = [new(f"classifies{w}") for w in workers]
        self.lacks = [self.model.new_int_var(0, CEILING if slack else 0, f"lacks{w}") for w in workers]
        self._counts_and_teams()
        self._memory()
        if kind == "split":
            self._one_team()
        self._flow()
        if kind == "whole":
            self._one_run_each()
        if slack:
            self.model.minimize(sum(self.lacks))
        else:
            self._objective()

    def read(self, solver: cp_model.CpSolver) -> tuple[IntArray, int]:
        """Counts [L, W] and the classifier's worker."""
        counts = [[_chosen(solver, counts) for counts in takes] for takes in self.takes]
        return np.array(counts, dtype=np.int64), _chosen(solver, self.classifies)

    def hint(self, counts_LW: IntArray) -> None:
        """Start the search from known counts."""
        for takes, row in zip(self.takes, counts_LW, strict=True):
            for worker, counts in enumerate(takes):
                for k, chosen in enumerate(counts):
                    self.model.add_hint(chosen, k == int(row[worker]))

    def _counts_and_teams(self) -> None:
        for has, takes in zip(self.has, self.takes, strict=True):
            self.model.add_exactly_one(has)
            for worker, counts in enumerate(takes):
                self.model.add_exactly_one(counts)
                joined = [has[t] for t, team in enumerate(self.instance.teams) if worker in team]
                self.model.add(sum(joined) == 1 - counts[0])
            self.model.add(sum(k * c for counts in takes for k, c in enumerate(counts)) == self.instance.num_heads)
        self.model.add_exactly_one(self.classifies)
        for worker, classifies in enumerate(self.classifies):
            self.model.add_implication(classifies, self.takes[-1][worker][0].negated())

    def _memory(self) -> None:
        instance = self.instance
        sizes = [instance.block_bytes(k) for k in range(instance.num_heads + 1)]
        for worker, profile in enumerate(instance.costs.profiles):
            need = sum(sizes[k] * takes[worker][k] for takes in self.takes for k in range(1, len(sizes)))
            need += instance.embed_bytes() * self._embeds(worker) + instance.classifier_bytes() * self.classifies[worker]
            self.model.add(need <= profile.free_bytes + self.lacks[worker])

    def _embeds(self, worker: int) -> cp_model.LinearExpr:
        return 1 - self.takes[0][worker][0]

    def _one_team(self) -> None:
        for has in self.has[1:]:
            for first, here in zip(self.has[0], has, strict=True):
                self.model.add(first == here)

    def _flow(self) -> None:
        """moves[l][s][t]: block l has team s and block l+1 has team t. As a flow, its relaxation is tight."""
        teams = range(len(self.instance.teams))
        new = self.model.new_bool_var
        self.moves = [[[new(f"moves{b}_{s}_{t}") for t in teams] for s in teams] for b in range(len(self.has) - 1)]
        for block, move in enumerate(self.moves):
            for team in teams:
                self.model.add(sum(move[team]) == self.has[block][team])
                self.model.add(sum(row[team] for row in move) == self.has[block + 1][team])

    def _one_run_each(self) -> None:
        for team in range(len(self.instance.teams)):
            entries = [row[team] for move in self.moves for s, row in enumerate(move) if s != team]
            self.model.add(self.has[0][team] + sum(entries) <= 1)

    def _objective(self) -> None:
        more = self.instance.costs.step.num_micro_batches - 1
        slowest = self.model.new_int_var(0, CEILING, "slowest")
        path = self._path()
        self.model.add(self.instance.in_flight * slowest >= more * path)
        for worker in range(self.instance.num_workers):
            owned = sum(k * c for takes in self.takes for k, c in enumerate(takes[worker]) if k)
            self.model.add(slowest >= more * self._load(worker) + self.instance.costs.update_us(worker, 1) * owned)
        for wire in self._wires().values():
            self.model.add(slowest >= more * sum(wire))
        self.model.minimize(slowest + path)

    def _load(self, worker: int) -> cp_model.LinearExpr:
        costs, curve_us = self.instance.costs, self.instance.curve_us[worker].tolist()
        load = costs.embed_us(worker) * self._embeds(worker) + costs.classify_us(worker) * self.classifies[worker]
        return load + sum(curve_us[k] * c for takes in self.takes for k, c in enumerate(takes[worker]) if k)

    def _path(self) -> cp_model.LinearExpr:
        """An expression of the path; each block's slowest member and the slowest embedder are variables bounded from below."""
        instance, costs = self.instance, self.instance.costs
        workers = range(instance.num_workers)
        path = self._at_least("embed", [costs.embed_us(w) * self._embeds(w) for w in workers])
        path += sum(costs.classify_us(w) * c for w, c in enumerate(self.classifies))
        hops = [instance.exchange_path_us(team) for team in instance.teams]
        curves = instance.curve_us.tolist()
        for block, (takes, has) in enumerate(zip(self.takes, self.has, strict=True)):
            members = [sum(curves[w][k] * c for k, c in enumerate(takes[w]) if k) for w in workers]
            path += self._at_least(f"block{block}", members)
            path += sum(us * chosen for us, chosen in zip(hops, has, strict=True) if us)
        pairs = itertools.product(enumerate(instance.teams), repeat=2)
        us = {(s, t): instance.crossing_path_us(before, after) for (s, before), (t, after) in pairs}
        return path + sum(cost * move[s][t] for move in self.moves for (s, t), cost in us.items() if cost)

    def _at_least(self, name: str, terms: Sequence[cp_model.LinearExprT]) -> cp_model.IntVar:
        top = self.model.new_int_var(0, CEILING, name)
        for term in terms:
            self.model.add(top >= term)
        return top

    def _wires(self) -> dict[Link, list[cp_model.LinearExpr]]:
        """Terms of the time that each link is taken."""
        instance, teams = self.instance, self.instance.teams
        wires: dict[Link, list[cp_model.LinearExpr]] = {}
        for t, team in enumerate(teams):
            for link, us in instance.exchange_us(team).items():
                wires.setdefault(link, []).extend(us * has[t] for has in self.has if us)
        for s, before in enumerate(teams):
            for t, after in enumerate(teams):
                for link in instance.crossing_links(before, after):
                    us = instance.taken_us(*link)
                    wires.setdefault(link, []).extend(us * move[s][t] for move in self.moves if us)
        return {link: terms for link, terms in wires.items() if terms}


def _chosen(solver: cp_model.CpSolver, options: Sequence[cp_model.IntVar]) -> int:
    return next(k for k, option in enumerate(options) if solver.boolean_value(option))
