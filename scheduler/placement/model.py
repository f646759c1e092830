"""The CP-SAT model of one chain: how often each row is used, and which block has how many FULL heads."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from ortools.sat.python import cp_model

from scheduler.placement.chains import binding_links
from scheduler.placement.instance import Chain, Instance, Row, linked
from scheduler.placement.relaxation import Relaxed
from scheduler.placement.worth import Losses

PROVED_WITHIN = 0.002  # the proxy itself is a few percent off the simulation
CEILING = 1 << 44  # above every time in µs and every size in bytes that a model here can have

Linear: TypeAlias = Any  # a sum of CP-SAT variables, or a plain number where there are none


@dataclass(frozen=True)
class Limits:
    """How much effort to spend: solver seconds by its own deterministic clock, and the seed.

    The wall clock ends a solve only on a machine that is very busy, and then the answer may differ.
    """

    seconds: float = 4.0
    seed: int = 0

    @property
    def wall_seconds(self) -> float:
        return 2 * self.seconds + 5


@dataclass(frozen=True, eq=False)
class Answer:
    """Rows by block, the classifier's worker, and the proxy."""

    rows: tuple[Row, ...]
    classifier: int
    objective: int


def solver_of(limits: Limits, seconds: float | None = None) -> cp_model.CpSolver:
    """One thread and a deterministic clock: the same answer every time, on every machine."""
    solver = cp_model.CpSolver()
    effort = limits.seconds if seconds is None else min(seconds, limits.seconds)
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = limits.seed
    solver.parameters.linearization_level = 2  # the defaults stayed 11–50 % from the optimum on such models
    solver.parameters.max_deterministic_time = effort
    solver.parameters.max_time_in_seconds = limits.wall_seconds
    solver.parameters.relative_gap_limit = PROVED_WITHIN
    return solver


def solve_chain(
    instance: Instance,
    chain: Chain,
    relaxed: Relaxed,
    losses: Losses | None,
    limits: Limits,
    *,
    below: int | None = None,
    seconds: float | None = None,
    within: float = PROVED_WITHIN,
) -> tuple[Answer | None, float]:
    """The best use of the relaxation's rows, or None if none beats `below`; and a bound for all rows."""
    run = _Run(instance, chain, relaxed, losses, limits, seconds, within)
    answer, proved = run.best(below)
    if losses is not None and len(chain) > 1 and answer is not None:
        of_team = Counter(row.team for row in answer.rows)
        lengths = [of_team[team] for team in chain]
        answer, _ = run.best(below, lengths)
    if answer is not None and len(linked(chain)) < len(chain):
        rows = interleaved(answer.rows)
        answer = Answer(rows, answer.classifier, instance.proxy_us(rows, answer.classifier))
    return answer, max(relaxed.bound, min(relaxed.beyond, proved))


def interleaved(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Rows of teams that share members, in turns: as runs of their own they would wait for each other in each."""
    return tuple(_spread(dict(Counter(rows))))


@dataclass(frozen=True)
class _Run:
    """Solves of one chain. With worth, the blocks' own best numbers of FULL heads are a small model.

    It says how long several runs should be, comes first there, and stands in where the large one finds nothing.
    """

    instance: Instance
    chain: Chain
    relaxed: Relaxed
    losses: Losses | None
    limits: Limits
    seconds: float | None
    within: float

    def best(self, below: int | None, lengths: Sequence[int] | None = None) -> tuple[Answer | None, float]:
        """(The best answer below `below`, a bound over the rows of the relaxation)."""
        if self.losses is None:
            return self._solve(self.relaxed, below, lengths)
        narrow = replace(self.relaxed, choices=tuple((k,) for k in self.losses.best_L))
        if len(self.chain) == 1:
            first, bound = self._solve(self.relaxed, below, lengths)
            first = first or self._solve(narrow, below, lengths)[0]
            if first is None or first.objective * (1 - self.within) <= max(bound, self.relaxed.bound):
                return first, bound
            better, proved = self._solve(self.relaxed, first.objective, lengths, first, by_program=False)
            return better or first, max(bound, proved)
        first, _ = self._solve(narrow, below, lengths)
        if lengths is None and first is not None:
            return first, -math.inf
        better, proved = self._solve(self.relaxed, below if first is None else first.objective, lengths, first)
        return better or first, proved

    def _solve(
        self,
        relaxed: Relaxed,
        below: int | None,
        lengths: Sequence[int] | None,
        hint: Answer | None = None,
        by_program: bool = True,
    ) -> tuple[Answer | None, float]:
        model = _Model(self.instance, self.chain, relaxed, self.losses, lengths)
        model.objective(max(0, math.ceil(relaxed.bound - 1e-6)), None if below is None else below + (hint is not None))
        if hint is not None:
            model.hint(hint)
        solver = solver_of(self.limits, self.seconds)
        solver.parameters.relative_gap_limit = self.within
        if self.losses is not None and by_program:
            # Finds in 0.1 s what the default misses for 1 s; probing and symmetries took longer than the search.
            solver.parameters.search_branching = cp_model.LP_SEARCH
            solver.parameters.cp_model_probing_level = 0
            solver.parameters.symmetry_level = 0
        status = solver.solve(model.model)
        if status == cp_model.INFEASIBLE:
            return None, math.inf if below is None else below
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            return None, -math.inf
        rows, classifier = model.read(solver)
        return Answer(rows, classifier, round(solver.objective_value)), solver.best_objective_bound


class _Model:
    """uses[r][p]: how many blocks of run r have row p; full[r, l][k]: block l is in run r and has k FULL heads.

    With `lengths` every run has so many blocks; without, and with several runs, blocks with few and with many FULL
    heads may be in any run, but for frozen ones: a relaxation, which says what good lengths are.
    """

    def __init__(
        self, instance: Instance, chain: Chain, relaxed: Relaxed, losses: Losses | None, lengths: Sequence[int] | None
    ) -> None:
        self.instance, self.chain, self.losses = instance, chain, losses
        self.fixed = instance.fixed(chain)
        self.model = cp_model.CpModel()
        self.rows, self.choices = relaxed.rows, relaxed.choices
        num_blocks = instance.num_blocks
        self.uses = [[self.model.new_int_var(0, num_blocks, "") for _ in rows] for rows in self.rows]
        for uses in self.uses:
            self.model.add(sum(uses) >= 1)
        self.model.add(sum(sum(uses) for uses in self.uses) == num_blocks)
        self.classifies = {w: self.model.new_bool_var(f"classifies{w}") for w in chain[-1]}
        self.model.add_exactly_one(self.classifies.values())
        self._memory()
        self.full: dict[int, dict[int, Any]] = {}
        self.runs = _runs(chain, instance.num_blocks, lengths)
        for places, blocks in self.runs if lengths is not None else ():
            self.model.add(sum(use for place in places for use in self.uses[place]) == len(blocks))
        if losses is not None:
            self._worth(losses)
        if lengths is None and instance.costs.shape.num_frozen:
            self._frozen_first(instance.costs.shape.num_frozen)

    def _terms(self, worker: int, value: Any) -> Linear:
        """Σ over the rows in use of value(row, worker)."""
        places = [place for place, team in enumerate(self.chain) if worker in team]
        return sum(
            value(row) * use for place in places for row, use in zip(self.rows[place], self.uses[place], strict=True)
        )

    def _all(self, value: Any) -> Linear:
        pairs = (
            (r, u) for rows, uses in zip(self.rows, self.uses, strict=True) for r, u in zip(rows, uses, strict=True)
        )
        return sum(value(row) * use for row, use in pairs)

    def _memory(self) -> None:
        instance = self.instance
        for w in sorted({w for team in self.chain for w in team}):
            need = self._terms(w, lambda row, w=w: instance.cost(row).bytes_W[w])
            need += instance.fixed_bytes(w in self.chain[0])
            need += instance.trunk_bytes(False, True) * self.classifies.get(w, 0)
            self.model.add(need <= instance.costs.profiles[w].free_bytes)

    def _worth(self, losses: Losses) -> None:
        """full[l][k]: block l has k FULL heads; as many blocks of each run (or of all) as there are such rows."""
        lost, whole = [], []
        for block in range(self.instance.num_blocks):
            chosen = {k: self.model.new_bool_var("") for k in self.choices[block]}
            self.full[block] = chosen
            self.model.add_exactly_one(chosen.values())
            lost += [int(losses.loss_LK[block, k]) * choice for k, choice in chosen.items()]
            whole += [k * choice for k, choice in chosen.items()]
        self.model.add(sum(lost) <= losses.slack)
        self.model.add(sum(whole) == self.instance.num_full)
        for places, blocks in self.runs:
            pairs = [pair for place in places for pair in zip(self.rows[place], self.uses[place], strict=True)]
            for k in range(self.instance.num_heads + 1):
                have = sum(use for row, use in pairs if row.num_full == k)
                self.model.add(have == sum(self.full[b][k] for b in blocks if k in self.full[b]))

    def _frozen_first(self, frozen: int) -> None:
        """The first runs have the frozen blocks, whose rows have no FULL head."""
        length: Linear = 0
        idle: Linear = 0
        for rows, uses in zip(self.rows[:-1], self.uses, strict=False):
            length += sum(uses)
            idle += sum(use for row, use in zip(rows, uses, strict=True) if not row.num_full)
            fewest = self.model.new_int_var(0, frozen, "")
            self.model.add_min_equality(fewest, [length, frozen])
            self.model.add(idle >= fewest)

    def objective(self, at_least: int, below: int | None) -> None:
        """Minimise the proxy, which is known to be `at_least`, and wanted below `below`."""
        instance, costs, more = self.instance, self.instance.costs, self.instance.more
        slowest = self.model.new_int_var(0, CEILING, "slowest")
        path = self._all(lambda row: instance.cost(row).path_us) + self.fixed.path_us
        path += sum(costs.classify_us(w) * classifies for w, classifies in self.classifies.items())
        self.model.add(instance.in_flight * slowest >= more * path)
        for members, phase in self._phases():
            inside = more - instance.apart * (len(members) > 1)
            for w in members:

                def load(row: Row, w: int = w, inside: int = inside) -> int:
                    return inside * instance.cost(row).load_W[w] + costs.update_us(w, row.full_W[w])

                ends = self.fixed.load_W[w] + costs.classify_us(w) * self.classifies.get(w, 0)
                self.model.add(slowest >= self._terms(w, load) + instance.apart * phase + more * ends)
        for link in binding_links(instance, self.chain):
            taken = self._all(lambda row, link=link: instance.wires_us(row, [link])[0])
            self.model.add(slowest >= more * (taken + self.fixed.wires.get(link, 0)))
        total = slowest + path + self.fixed.tail_us
        self.model.add(total >= at_least)
        if below is not None:
            self.model.add(total < max(below, at_least + 1))
        self.model.minimize(total)

    def _phases(self) -> list[tuple[list[int], Linear]]:
        """Members that go in step, with their largest forward and backward loads together; 0 for one alone."""
        cost, out = self.instance.cost, list[tuple[list[int], Linear]]()
        for teams in linked(self.chain):
            members = sorted({w for team in teams for w in team})
            if len(members) == 1:
                out.append((members, 0))
                continue
            forward, backward = (self.model.new_int_var(0, CEILING, "") for _ in range(2))
            for w in members:
                self.model.add(forward >= self._terms(w, lambda row, w=w: cost(row).forward_W[w]))
                self.model.add(backward >= self._terms(w, lambda row, w=w: cost(row).backward_W[w]))
            out.append((members, forward + backward))
        return out

    def hint(self, known: Answer) -> None:
        """Start from a known answer."""
        counts = Counter(known.rows)
        for rows, uses in zip(self.rows, self.uses, strict=True):
            for row, use in zip(rows, uses, strict=True):
                self.model.add_hint(use, counts[row])
        for block, choices in self.full.items():
            for k, choice in choices.items():
                self.model.add_hint(choice, known.rows[block].num_full == k)
        for w, classifies in self.classifies.items():
            self.model.add_hint(classifies, w == known.classifier)

    def read(self, solver: cp_model.CpSolver) -> tuple[tuple[Row, ...], int]:
        """Rows by block: a run's rows spread evenly over it, or where blocks have so many FULL heads."""
        out: list[Row] = []
        for rows, uses in zip(self.rows, self.uses, strict=True):
            times = {row: solver.value(use) for row, use in zip(rows, uses, strict=True) if solver.value(use)}
            out += _spread(times)
        if self.losses is not None:
            out = self._seated(solver, out)
        return tuple(out), next(w for w, c in self.classifies.items() if solver.boolean_value(c))

    def _seated(self, solver: cp_model.CpSolver, rows: Sequence[Row]) -> list[Row]:
        """Exchange the rows of each run, so that every block has as many FULL heads as chosen."""
        out = list(rows)
        for _, blocks in self.runs:
            waiting: dict[int, list[Row]] = {}
            for row in sorted((rows[b] for b in blocks), key=lambda row: (row.trainers, row.full_W, row.only_W)):
                waiting.setdefault(row.num_full, []).append(row)
            for block in blocks:
                wanted = next(k for k, choice in self.full[block].items() if solver.boolean_value(choice))
                out[block] = waiting[wanted].pop(0)
        return out


def _runs(chain: Chain, num_blocks: int, lengths: Sequence[int] | None) -> list[tuple[list[int], list[int]]]:
    """(Places in the chain, their blocks): each run for itself if lengths are known, else all together."""
    if lengths is None:
        return [(list(range(len(chain))), list(range(num_blocks)))]
    ends = list(itertools.accumulate(lengths, initial=0))
    return [([place], list(range(*span))) for place, span in enumerate(itertools.pairwise(ends))]


def _spread(times: dict[Row, int]) -> list[Row]:
    """Each row at even distances, so that the slowest member changes."""
    places = [((i + 0.5) / n, index, row) for index, (row, n) in enumerate(times.items()) for i in range(n)]
    return [row for _, _, row in sorted(places, key=lambda place: place[:2])]
