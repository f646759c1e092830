"""Placement: which worker owns which head, solved by CP-SAT over head counts.

The instance, and what its objective means, is in `teams`; `plan` simulates the candidates from here and has the last
word.

| mode | teams that a block may have |
|---|---|
| split | one team of at least two workers for all blocks |
| whole | single workers, each with one run of consecutive blocks |
| auto | the best of split, of whole, and of a free mix |
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from ortools.sat.python import cp_model

from scheduler.cost import Costs
from scheduler.domain import IntArray, Placement, Scores, SolverReport
from scheduler.errors import InfeasibleError, UserError
from scheduler.teams import Instance, Link, Team, teams_of

MODES = ("auto", "split", "whole")
KINDS = {"auto": ("split", "whole", "mixed"), "split": ("split",), "whole": ("whole",)}
PROVED_WITHIN = 0.005  # the proxy itself is a few percent off the simulation
CEILING = 1 << 44  # above every time in µs and every size in bytes that a model here can have
GB = 1e9

Linear: TypeAlias = Any  # a sum of CP-SAT variables, or a plain number where there are none


@dataclass(frozen=True)
class Limits:
    """How long and with how many threads to solve."""

    seconds: float = 4.0
    workers: int = 2
    seed: int = 0


def propose(
    costs: Costs,
    mode: str = "auto",
    *,
    scores: Scores | None = None,
    styles: Sequence[str] = ("even",),
    limits: Limits | None = None,
) -> list[tuple[Placement, SolverReport]]:
    """Candidate placements of a mode, the best by proxy first; "auto" offers split, whole and mixed ones.

    Each is offered once per style of `assign_heads`, where that makes a difference. Raises InfeasibleError when the
    model does not fit into the fleet's memory in any of the ways of the mode.
    """
    if mode not in MODES:
        raise UserError(f"'{mode}' is not a placement mode.", code="unknown_placement", param="placement")
    solved: list[Solved] = []
    misses: list[InfeasibleError] = []
    for kind in KINDS[mode] if costs.num_workers > 1 else ("whole",):
        best = min(solved, key=lambda found: found.report.objective, default=None)
        try:
            solved.append(solve(costs, kind, limits=limits, hint=best))
        except InfeasibleError as error:
            misses.append(error)
    if not solved:
        raise misses[-1]
    candidates: dict[bytes, tuple[Placement, SolverReport]] = {}
    for found in sorted(solved, key=lambda found: found.report.objective):
        for style in styles:
            owner_LH = assign_heads(found.counts_LW, found.classifier, scores, style)
            placement = Placement(owner_LH, costs.num_workers, found.classifier)
            candidates.setdefault(owner_LH.tobytes(), (placement, found.report))
    return list(candidates.values())


@dataclass(frozen=True, eq=False)
class Solved:
    """Head counts of one kind of placement, with the solver's status, objective and bound."""

    counts_LW: IntArray
    classifier: int
    report: SolverReport


def solve(costs: Costs, kind: str, *, limits: Limits | None = None, hint: Solved | None = None) -> Solved:
    """The best counts of one kind ("split", "whole" or "mixed") by the proxy; `hint` is where to start from.

    Raises InfeasibleError, naming the workers that lack memory.
    """
    limits = limits or Limits()
    model = _Model(Instance(costs, teams_of(costs, kind)), kind)
    if hint is not None:
        model.hint(hint)
    solver = _solver(limits)
    status = solver.solve(model.model)
    if status == cp_model.INFEASIBLE:
        raise _memory_error(model.instance, kind, limits)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        raise InfeasibleError(
            f"No {kind} placement was found in {limits.seconds:g} s.", code="placement_unsolved", param="placement"
        )
    counts_LW, classifier = model.read(solver)
    return Solved(counts_LW, classifier, _report(solver, kind, status, counts_LW))


def counts_of(placement: Placement) -> IntArray:
    """Head counts [L, W] of a placement."""
    rows = [np.bincount(row, minlength=placement.num_workers) for row in placement.owner_LH]
    return np.array(rows, dtype=np.int64)


def assign_heads(counts_LW: IntArray, classifier: int, scores: Scores | None = None, style: str = "even") -> IntArray:
    """Owners [L, H] from counts, by the backward worth of heads; without scores their index is their rank.

    "even" lets the members of a block take turns, so that all train alike: short steps where links are fast. "lead"
    gives a block's most worthy heads to one member, so that a held-still set of FULL heads can lie on few workers: few
    bytes.
    """
    num_heads = int(counts_LW[0].sum())
    owner_LH = np.zeros((len(counts_LW), num_heads), dtype=np.int64)
    for block, members in enumerate(_leads(counts_LW, classifier)):
        worth_H = np.zeros(num_heads) if scores is None else scores.backward_LH[block]
        order = np.argsort(-worth_H, kind="stable")
        counts = [int(counts_LW[block, w]) for w in members]
        if style == "even" and scores is not None:
            owner_LH[block, order] = _turns(members, counts, block)
        else:
            owner_LH[block, order] = np.repeat(members, counts)
    return owner_LH


def _turns(members: Sequence[int], counts: Sequence[int], first: int) -> list[int]:
    """Members in the order in which they take a head: who has most of its count to go; `first` breaks ties."""
    left = list(counts)
    out: list[int] = []
    for _ in range(sum(counts)):
        place = max(range(len(left)), key=lambda i: (left[i] / counts[i], (i + first) % len(left)))
        left[place] -= 1
        out.append(members[place])
    return out


def _leads(counts_LW: IntArray, classifier: int) -> list[list[int]]:
    """For each block its members, the lead first.

    Consecutive blocks with the same team share out the lead in proportion to their members' heads, the classifier's
    worker on top, so that the gradient crosses between leads seldom.
    """
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
    solver.parameters.relative_gap_limit = PROVED_WITHIN
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
        return InfeasibleError(
            f"No {kind} placement exists for this fleet.", code="placement_infeasible", param="placement"
        )
    counts_LW, classifier = model.read(solver)
    parts = []
    for worker, profile in enumerate(instance.costs.profiles):
        need = instance.memory_bytes(counts_LW[:, worker], worker == classifier)
        if need > profile.free_bytes:
            lack = (need - profile.free_bytes) / GB
            parts.append(
                f"worker {worker} needs {lack:.3g} GB more ({need / GB:.3g} needed, {profile.free_bytes / GB:.3g} free)"
            )
    return InfeasibleError(
        f"The model does not fit: even in the {kind} placement that lacks least, {', '.join(parts)}. Counted are "
        f"weights, gradients, AdamW's moments, and the activations of {instance.in_flight} micro-batches in flight.",
        code="memory_infeasible",
        param="workers",
        remedy="Add workers, free memory, or make micro-batches smaller.",
    )


class _Model:
    """The CP-SAT model: plays[t][p] blocks have team t in its pattern p; goes[s, t] t follows s, None ends."""

    def __init__(self, instance: Instance, kind: str, *, slack: bool = False) -> None:
        self.instance = instance
        self.model = cp_model.CpModel()
        teams, workers = range(len(instance.teams)), range(instance.num_workers)
        new = self.model.new_bool_var
        self.patterns = [instance.patterns(team) for team in instance.teams]
        self.plays = [
            [self.model.new_int_var(0, instance.num_blocks, f"plays{t}_{p}") for p in range(len(self.patterns[t]))]
            for t in teams
        ]
        self.used = [new(f"used{t}") for t in teams]
        self.classifies = [new(f"classifies{w}") for w in workers]
        self.lacks = [self.model.new_int_var(0, CEILING if slack else 0, f"lacks{w}") for w in workers]
        self._runs()
        self._memory()
        if kind == "split":
            self.model.add_exactly_one(self.used)
        if slack:
            self.model.minimize(sum(self.lacks))
        else:
            self._objective()

    def read(self, solver: cp_model.CpSolver) -> tuple[IntArray, int]:
        """Counts [L, W], a team's patterns spread evenly over its run, and the classifier's worker."""
        rows: list[tuple[int, ...]] = []
        team = self._after(solver, None)
        while team is not None:
            times = [solver.value(play) for play in self.plays[team]]
            spread = [((i + 0.5) / n, p) for p, n in enumerate(times) for i in range(n)]
            rows += [
                self.instance.spelled(self.instance.teams[team], self.patterns[team][p]) for _, p in sorted(spread)
            ]
            team = self._after(solver, team)
        classifier = next(w for w, c in enumerate(self.classifies) if solver.boolean_value(c))
        return np.array(rows, dtype=np.int64), classifier

    def _after(self, solver: cp_model.CpSolver, team: int | None) -> int | None:
        return next(t for (s, t), goes in self.goes.items() if s == team and solver.boolean_value(goes))

    def hint(self, known: Solved) -> None:
        """Start from a known answer, if this kind allows it; with only part of it the solver would not find it."""
        runs = [team for team, _ in itertools.groupby(tuple(np.flatnonzero(row).tolist()) for row in known.counts_LW)]
        if not set(runs) <= set(self.instance.teams):
            return
        rows = Counter(tuple(row) for row in known.counts_LW.tolist())
        for team, patterns, plays in zip(self.instance.teams, self.patterns, self.plays, strict=True):
            for pattern, play in zip(patterns, plays, strict=True):
                self.model.add_hint(play, rows[self.instance.spelled(team, pattern)])
        stops: list[int | None] = [None, *(self.instance.teams.index(team) for team in runs), None]
        moves = set(itertools.pairwise(stops))
        for move, goes in self.goes.items():
            self.model.add_hint(goes, move in moves)
        for index, used in enumerate(self.used):
            self.model.add_hint(used, index in stops)
        for worker, classifies in enumerate(self.classifies):
            self.model.add_hint(classifies, worker == known.classifier)

    def _runs(self) -> None:
        """Every team that is used has one run of consecutive blocks: the runs form a path."""
        num_blocks = self.instance.num_blocks
        ends: list[int | None] = [None, *range(len(self.used))]
        pairs = [(s, t) for s, t in itertools.product(ends, repeat=2) if s != t]
        self.goes = {(s, t): self.model.new_bool_var(f"goes{s}_{t}") for s, t in pairs}
        arcs: list[tuple[int, int, Any]] = [(_node(s), _node(t), goes) for (s, t), goes in self.goes.items()]
        arcs += [(_node(t), _node(t), used.negated()) for t, used in enumerate(self.used)]
        self.model.add_circuit(arcs)
        for used, plays in zip(self.used, self.plays, strict=True):
            self.model.add(sum(plays) >= used)
            self.model.add(sum(plays) <= num_blocks * used)
        self.model.add(sum(sum(plays) for plays in self.plays) == num_blocks)
        self.model.add_exactly_one(self.classifies)
        for worker, classifies in enumerate(self.classifies):
            self.model.add(classifies <= sum(self.goes[t, None] for t in self._with(worker)))

    def _with(self, worker: int) -> list[int]:
        return [t for t, team in enumerate(self.instance.teams) if worker in team]

    def _embeds(self, worker: int) -> Linear:
        return sum(self.goes[None, t] for t in self._with(worker))

    def _total(self, worker: int, each: Sequence[int]) -> Linear:
        """Σ over the blocks of each[heads that the worker has there]."""
        terms = []
        for t in self._with(worker):
            place = self.instance.teams[t].index(worker)
            terms += [
                each[pattern[place]] * play for pattern, play in zip(self.patterns[t], self.plays[t], strict=True)
            ]
        return sum(terms)

    def _memory(self) -> None:
        instance = self.instance
        sizes = [instance.block_bytes(k) for k in range(instance.num_heads + 1)]
        for worker, profile in enumerate(instance.costs.profiles):
            need = self._total(worker, sizes)
            need += (
                instance.embed_bytes() * self._embeds(worker) + instance.classifier_bytes() * self.classifies[worker]
            )
            self.model.add(need <= profile.free_bytes + self.lacks[worker])

    def _objective(self) -> None:
        costs, more = self.instance.costs, self.instance.costs.step.num_micro_batches - 1
        slowest = self.model.new_int_var(0, CEILING, "slowest")
        path = self._path()
        self.model.add(self.instance.in_flight * slowest >= more * path)
        for worker, curve_us in enumerate(self.instance.curve_us.tolist()):
            load = self._total(worker, [more * us + costs.update_us(worker, k) for k, us in enumerate(curve_us)])
            ends = costs.embed_us(worker) * self._embeds(worker) + costs.classify_us(worker) * self.classifies[worker]
            self.model.add(slowest >= load + more * ends)
        for wire in self._wires().values():
            self.model.add(slowest >= more * sum(wire))
        self.model.minimize(slowest + path)

    def _path(self) -> Linear:
        instance, costs = self.instance, self.instance.costs
        terms = [costs.classify_us(w) * c for w, c in enumerate(self.classifies)]
        for t, team in enumerate(instance.teams):
            terms.append(max(costs.embed_us(w) for w in team) * self.goes[None, t])
            hops = instance.exchange_path_us(team)
            for pattern, play in zip(self.patterns[t], self.plays[t], strict=True):
                slowest = max(int(instance.curve_us[w, k]) for w, k in zip(team, pattern, strict=True))
                terms.append((slowest + hops) * play)
        terms += [instance.crossing_path_us(before, after) * goes for before, after, goes in self._crossings()]
        return sum(terms)

    def _crossings(self) -> list[tuple[Team, Team, cp_model.IntVar]]:
        teams = self.instance.teams
        return [(teams[s], teams[t], goes) for (s, t), goes in self.goes.items() if s is not None and t is not None]

    def _wires(self) -> dict[Link, list[Linear]]:
        """Terms of the time that each link is taken."""
        instance = self.instance
        wires: dict[Link, list[Linear]] = {}
        for team, plays in zip(instance.teams, self.plays, strict=True):
            for link, us in instance.exchange_us(team).items():
                wires.setdefault(link, []).append(us * sum(plays))
        for before, after, goes in self._crossings():
            for link in instance.crossing_links(before, after):
                wires.setdefault(link, []).append(instance.taken_us(*link) * goes)
        return wires


def _node(team: int | None) -> int:
    """Circuit node of a team; node 0 closes the path."""
    return 0 if team is None else team + 1
