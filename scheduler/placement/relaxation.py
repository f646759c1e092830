"""The fractional relaxation of one chain: a true lower bound, and the rows that a good placement is made of.

A linear program over rows, each used a fractional number of times. Where a team has too many rows to write down, rows
are generated: the program's prices go to `patterns.price`, whose best rows come back, until none would help. The bound
is Lagrange's, valid for all rows at any time: objective + blocks · least reduced cost.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ortools.linear_solver import pywraplp

from scheduler.placement.chains import binding_links, quick_bound_us, trainers_of
from scheduler.placement.instance import Chain, Instance, Row, Team, linked
from scheduler.placement.patterns import Prices, all_rows, first_rows, price, without
from scheduler.placement.worth import Losses

ROUNDS = 40  # of column generation; each gives a valid bound
ROUNDS_ROUGH = 4  # to see whether a chain is worth more
CLOSE = 5e-4  # bound and objective: further rows are not worth their time
CLOSE_STATIC = 2e-3
MEGABYTE = 1e6
SPLITS = (0, 8)  # of cells in pricing: to find rows, to prove that there are none
MANY_WORKERS = 12  # above, greedy rows must do for a rough look
LACKING = 1e-3  # megabytes: more than rounding
DEAR = 1e3  # a lacking megabyte, in thousandths of a step
KEPT_ROWS = 60  # by team, for CP-SAT
KEPT_STATIC = 20
KEPT_EACH = 1  # of them at least, with each number of FULL heads
KEPT_WITHIN = 0.05  # of the bound: reduced cost of a block's number of FULL heads


@dataclass
class Pool:
    """Rows by team, shared by all chains of an instance; a complete team has every row there is."""

    instance: Instance
    rows: dict[Team, list[Row]] = field(default_factory=dict)
    complete: set[Team] = field(default_factory=set)

    def of(self, team: Team) -> list[Row]:
        if team not in self.rows:
            everything = all_rows(self.instance, team)
            self.rows[team] = self._first(team) if everything is None else everything
            if everything is not None:
                self.complete.add(team)
        return self.rows[team]

    def _first(self, team: Team) -> list[Row]:
        """Greedy rows, and those of a team with one more member whose heads go to another."""
        rows = dict.fromkeys(first_rows(self.instance, team))
        larger = next((t for t in self.rows if len(t) == len(team) + 1 and set(t) > set(team)), None)
        if larger is not None and self.instance.static is not None:
            [gone] = set(larger) - set(team)
            for row in self.rows[larger]:
                rows.setdefault(without(self.instance, row, gone))
        return list(rows)

    def add(self, team: Team, rows: list[Row]) -> list[Row]:
        """Those of `rows` that are new here."""
        known = set(self.of(team))
        fresh = [row for row in dict.fromkeys(rows) if row not in known]
        self.rows[team] += fresh
        return fresh


@dataclass(frozen=True)
class Relaxed:
    """The bound on the proxy, and what a placement near it is made of.

    `fractional` is the program's own objective over the rows known. `rows` by place in the chain and `choices` by block
    (numbers of FULL heads) are those of small reduced cost; a placement that uses others has a proxy above `beyond`.
    """

    bound: float
    fractional: float = math.inf
    beyond: float = -math.inf
    rows: tuple[tuple[Row, ...], ...] = ()
    choices: tuple[tuple[int, ...], ...] = ()


def relax(
    instance: Instance,
    chain: Chain,
    pool: Pool,
    losses: Losses | None,
    goal: float = math.inf,
    rough: bool = False,
) -> Relaxed:
    """Bound the proxy of a chain from below (inf if it cannot fit) and find the rows that matter.

    Stops early once the bound is above `goal`; `rough` is content with good rows and a poor bound.
    """
    program, best, level, objective = _Program(instance, chain, pool, losses), -math.inf, 0, None
    close = CLOSE if instance.static is None else CLOSE_STATIC
    last, levels = (ROUNDS_ROUGH * (instance.num_workers <= MANY_WORKERS), SPLITS[:1]) if rough else (ROUNDS, SPLITS)
    for turn in range(last + 1):
        objective = program.solve()
        if objective is None:  # rarely, after many new rows; from scratch it finds its way
            program = _Program(instance, chain, pool, losses)
            objective = program.solve()
        if objective is None:
            nothing = max(best, quick_bound_us(instance, chain)), -math.inf, -math.inf
            return Relaxed(*nothing, *_unpriced(instance, chain, pool, losses))
        if set(chain) <= pool.complete:
            best, level, rough = objective, len(levels), False
        if turn == last or level == len(levels) or best >= min(goal, objective * (1 - close)):
            break
        enough = close / 2 * objective
        if level and not program.lacking:
            enough = max(enough, objective - goal)
        least, wanted = program.wanted(enough / instance.num_blocks, levels[level])
        best = max(best, objective + instance.num_blocks * min(0.0, least))
        if best < goal:
            level += not program.grow(wanted)
    if program.lacking and level == len(levels) and not rough and best < goal:
        return Relaxed(math.inf)
    return program.cut(max(best, quick_bound_us(instance, chain)), math.inf if objective is None else objective)


def _unpriced(
    instance: Instance, chain: Chain, pool: Pool, losses: Losses | None
) -> tuple[tuple[tuple[Row, ...], ...], tuple[tuple[int, ...], ...]]:
    """Rows and choices when there are no prices to judge them by."""
    rows = tuple(tuple(pool.of(team)[: 2 * KEPT_ROWS]) for team in chain)
    blocks = range(instance.num_blocks if losses else 0)
    return rows, tuple(tuple(losses.choices(block)) for block in blocks if losses)


class _Program:
    """min slowest + path + (dear) lacking memory, over fractional uses of rows."""

    def __init__(self, instance: Instance, chain: Chain, pool: Pool, losses: Losses | None) -> None:
        self.instance, self.chain, self.pool, self.losses = instance, chain, pool, losses
        self.fixed = instance.fixed(chain)
        self.workers = sorted({w for team in chain for w in team})
        self.solver = pywraplp.Solver.CreateSolver("GLOP")
        self.inf, self.lacking = self.solver.infinity(), False
        self.unit = max(1.0, quick_bound_us(instance, chain) / 1e3)  # µs: keeps the program's numbers near 1
        self.uses: list[list[tuple[Row, Any]]] = [[] for _ in chain]
        self.chosen: list[dict[int, Any]] = [{} for _ in range(instance.num_blocks if losses else 0)]
        self.slowest = self.solver.NumVar(0, self.inf, "slowest")
        self.objective = self.solver.Objective()
        self.objective.SetMinimization()
        self.objective.SetCoefficient(self.slowest, 1)
        self.objective.SetOffset((self.fixed.path_us + self.fixed.tail_us) / self.unit)
        self._frame()
        self._trunk()
        if losses is not None:
            self._worth(losses)
        for place, team in enumerate(chain):
            for row in pool.of(team):
                self._column(place, row)

    def _frame(self) -> None:
        """Rows of the program: one run per team, path, loads, memory, links."""
        instance, new, inf = self.instance, self.solver.Constraint, self.inf
        more = instance.more / self.unit
        self.runs = [new(1, inf) for _ in self.chain]
        self.all_blocks = new(instance.num_blocks, instance.num_blocks)
        self.path = new(more * self.fixed.path_us, inf)
        self.path.SetCoefficient(self.slowest, instance.in_flight)
        self.loads, self.rooms, self.short = dict[int, Any](), dict[int, Any](), dict[int, Any]()
        for w in self.workers:
            self.loads[w] = new(more * self.fixed.load_W[w], inf)
            self.loads[w].SetCoefficient(self.slowest, 1)
            trunk = instance.fixed_bytes(w in self.chain[0])
            self.rooms[w] = new(-inf, (instance.costs.profiles[w].free_bytes - trunk) / MEGABYTE)
            self.short[w] = self.solver.NumVar(0, inf, f"short{w}")
            self.objective.SetCoefficient(self.short[w], DEAR)
            self.rooms[w].SetCoefficient(self.short[w], -1)
        phases: dict[Team, dict[int, tuple[Any, Any]]] = {}
        for teams in linked(self.chain):
            phases |= dict.fromkeys(teams, self._phase(sorted({w for team in teams for w in team})))
        self.phases = [phases[team] for team in self.chain]
        links = binding_links(instance, self.chain)
        self.wires = {link: new(more * self.fixed.wires.get(link, 0), inf) for link in links}
        for wire in self.wires.values():
            wire.SetCoefficient(self.slowest, 1)

    def _phase(self, members: Sequence[int]) -> dict[int, tuple[Any, Any]]:
        """Rows that hold the largest forward and backward loads above those of members that go in step."""
        if len(members) == 1:
            return {}
        largest = [self.solver.NumVar(0, self.inf, "") for _ in range(2)]
        out = {}
        for w in members:
            out[w] = (self.solver.Constraint(0, self.inf), self.solver.Constraint(0, self.inf))
            for phase, most in zip(out[w], largest, strict=True):
                phase.SetCoefficient(most, 1)
                self.loads[w].SetCoefficient(most, -self.instance.apart)
        return out

    def _trunk(self) -> None:
        """The classifier is with one member of the last team."""
        instance, one = self.instance, self.solver.Constraint(1, 1)
        for w in self.chain[-1]:
            classifies = self.solver.NumVar(0, 1, f"classifies{w}")
            us = instance.costs.classify_us(w) / self.unit
            one.SetCoefficient(classifies, 1)
            self.objective.SetCoefficient(classifies, us)
            self.loads[w].SetCoefficient(classifies, -instance.more * us)
            self.path.SetCoefficient(classifies, -instance.more * us)
            self.rooms[w].SetCoefficient(classifies, instance.trunk_bytes(False, True) / MEGABYTE)

    def _worth(self, losses: Losses) -> None:
        """Every block has some number of FULL heads; all together as many as asked, losing no more than allowed."""
        new, num_full = self.solver.Constraint, self.instance.num_full
        self.have = [new(0, 0) for _ in range(self.instance.num_heads + 1)]
        whole, lost = new(num_full, num_full), new(-self.inf, 1)
        for block in range(self.instance.num_blocks):
            one = new(1, 1)
            for k in losses.choices(block):
                chosen = self.solver.NumVar(0, 1, f"full{block}_{k}")
                self.chosen[block][k] = chosen
                one.SetCoefficient(chosen, 1)
                self.have[k].SetCoefficient(chosen, -1)
                whole.SetCoefficient(chosen, k)
                lost.SetCoefficient(chosen, int(losses.loss_LK[block, k]) / losses.slack)

    def _column(self, place: int, row: Row) -> None:
        instance, cost = self.instance, self.instance.cost(row)
        more, apart = instance.more / self.unit, instance.apart / self.unit
        uses = self.solver.NumVar(0, self.inf, "")
        self.uses[place].append((row, uses))
        self.objective.SetCoefficient(uses, cost.path_us / self.unit)
        self.runs[place].SetCoefficient(uses, 1)
        self.all_blocks.SetCoefficient(uses, 1)
        self.path.SetCoefficient(uses, -more * cost.path_us)
        for w in self.chain[place]:
            update = instance.costs.update_us(w, row.full_W[w]) / self.unit
            inside = more - apart if self.phases[place] else more
            self.loads[w].SetCoefficient(uses, -(inside * cost.load_W[w] + update))
            self.rooms[w].SetCoefficient(uses, cost.bytes_W[w] / MEGABYTE)
            if w in self.phases[place]:
                forward, backward = self.phases[place][w]
                forward.SetCoefficient(uses, -cost.forward_W[w] / self.unit)
                backward.SetCoefficient(uses, -cost.backward_W[w] / self.unit)
        for wire, us in zip(self.wires.values(), instance.wires_us(row, list(self.wires)), strict=True):
            if us:
                wire.SetCoefficient(uses, -more * us)
        if self.losses is not None:
            self.have[row.num_full].SetCoefficient(uses, 1)

    def solve(self) -> float | None:
        """The objective over the rows known so far, in µs; None if the program has gone astray numerically."""
        if self.solver.Solve() != pywraplp.Solver.OPTIMAL:
            return None
        self.lacking = sum(short.solution_value() for short in self.short.values()) > LACKING
        return float(self.objective.Value()) * self.unit

    def wanted(self, close: float, splits: int) -> tuple[float, list[tuple[int, list[Row]]]]:
        """(Least reduced cost of any row, rows worth adding by place); reduced costs above −close are good enough."""
        least, wanted = 0.0, list[tuple[int, list[Row]]]()
        prices = self._prices()
        for place, team in enumerate(self.chain):
            if team in self.pool.complete:
                continue
            apart = {trainers: self._apart(place, team, trainers) for trainers in trainers_of(self.instance, team)}
            bound, rows = price(self.instance, team, prices, apart, -close, splits)
            least = min(least, bound)
            if bound < -close:
                wanted.append((place, rows))
        return least, wanted

    def grow(self, wanted: list[tuple[int, list[Row]]]) -> bool:
        """Add rows; says whether any was new."""
        before = self.solver.NumVariables()
        for place, rows in wanted:
            for row in self.pool.add(self.chain[place], rows):
                self._column(place, row)
        return bool(self.solver.NumVariables() > before)

    def cut(self, bound: float, fractional: float) -> Relaxed:
        """What has a small reduced cost, and the bound on all else."""
        rows, beyond, most = [], math.inf, KEPT_ROWS if self.losses is None else KEPT_STATIC
        for team, uses in zip(self.chain, self.uses, strict=True):
            ranked = sorted((use.reduced_cost(), i, row) for i, (row, use) in enumerate(uses))
            of_full = Counter[int]()
            kept_rows, left = list[Row](), math.inf
            for cost, _, row in ranked:
                of_full[row.num_full] += 1
                if len(kept_rows) < most or of_full[row.num_full] <= KEPT_EACH:
                    kept_rows.append(row)
                else:
                    left = min(left, cost)
            rows.append(tuple(kept_rows))
            beyond = min(beyond, left if team in self.pool.complete else 0.0)
        choices = []
        for block in self.chosen:
            ranked_k = sorted((choice.reduced_cost(), k) for k, choice in block.items())
            kept = [k for cost, k in ranked_k if cost * self.unit <= KEPT_WITHIN * bound]
            choices.append(tuple(kept))
            beyond = min([beyond, *(cost for cost, k in ranked_k if k not in kept)])
        return Relaxed(bound, fractional, bound + max(0.0, beyond) * self.unit, tuple(rows), tuple(choices))

    def _prices(self) -> Prices:
        instance, share = self.instance, self.instance.run_share
        cost_WAO = np.zeros(instance.busy_WAO.shape)
        backward_WN = instance.backward_SWN.sum(axis=0)
        for place, w in ((place, w) for place, team in enumerate(self.chain) for w in team):
            updates_A = np.array([instance.costs.update_us(w, a) for a in range(instance.num_heads + 1)])
            forward, backward = self._per_load(place, w)
            cost_WAO[w] = share * forward * instance.forward_WAO[w]
            cost_WAO[w] += (share * backward * backward_WN[w] + _dual(self.loads[w]) * updates_A)[:, None]
            cost_WAO[w] += max(0.0, -self.rooms[w].dual_value()) * self.unit * instance.bytes_AO / MEGABYTE
        full_K = np.zeros(1)
        if self.losses is not None:
            full_K = -self.unit * np.array([have.dual_value() for have in self.have])
        return Prices(cost_WAO, share * self._per_path(), full_K)

    def _per_load(self, place: int, worker: int) -> tuple[float, float]:
        """Prices of a µs of a member's forward and of its backward load."""
        load = _dual(self.loads[worker])
        if not self.phases[place]:
            return self.instance.more * load, self.instance.more * load
        inside = (self.instance.more - self.instance.apart) * load
        forward, backward = self.phases[place][worker]
        return inside + _dual(forward), inside + _dual(backward)

    def _per_path(self) -> float:
        return 1.0 + self.instance.more * _dual(self.path)

    def _apart(self, place: int, team: Team, trainers: Team) -> float:
        """The part of a row's reduced cost that its shares do not change."""
        instance, share = self.instance, self.instance.run_share
        out = -self.unit * (self.runs[place].dual_value() + self.all_blocks.dual_value())
        for phase, part in enumerate((team, trainers)):
            out += share * self._per_path() * instance.exchange_path_us(part)
            exchanged = instance.exchange_us(part)
            for link, wire in self.wires.items():
                out += share * instance.more * exchanged.get(link, 0) * _dual(wire)
            for w in part:
                out += share * instance.handling_WN[w][len(part)] * self._per_load(place, w)[phase]
        return float(out)


def _dual(constraint: Any) -> float:
    """The price of a ≥ row, rid of the solver's rounding below 0."""
    return max(0.0, constraint.dual_value())
