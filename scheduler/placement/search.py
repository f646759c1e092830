"""Search: the best chain of each kind, by bounds first, and the candidates for `plan`.

Chains come in order of their quick bound. One whose bound cannot beat the best answer so far is passed over; else its
relaxation gives a better bound and the rows, and CP-SAT the whole numbers.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scheduler.cost import Costs
from scheduler.domain import BoolArray, IntArray, Placement, Scores, SolverReport, StaticPart
from scheduler.errors import UserError
from scheduler.placement.chains import KINDS, chains_of, quick_bound_us
from scheduler.placement.heads import arrange, assign_heads
from scheduler.placement.instance import Chain, Instance, Row
from scheduler.placement.memory import memory_error, rows_of
from scheduler.placement.model import PROVED_WITHIN, Answer, Limits, solve_chain
from scheduler.placement.relaxation import Pool, Relaxed, relax
from scheduler.placement.worth import Losses, full_heads, losses_of, worthiest

MODES = {"auto": KINDS, "unmixed": ("split", "whole"), "split": ("split",), "whole": ("whole",)}
CHAINS = 48  # in which the least lacking memory is sought
HOPELESS = 1.15  # a kind whose bound is above this times the best answer is not worth simulating
PROVED_STATIC = 0.005  # as PROVED_WITHIN, with FULL and FORWARD heads: bounds are dear
LOOSELY = 0.01  # gap of a kind that another one has beaten
LARGE = 12  # workers; above this an answer is wanted within a second
SAME = 1e-3  # relative: as good as the placement in use


@dataclass(frozen=True)
class Effort:
    """How many chains of a kind are relaxed, solved and bounded, and the part of the time that one solve may take."""

    relaxed: int
    solved: int
    part: float
    bounded: int = 0


EFFORT = Effort(40, 4, 0.1)
EFFORT_STATIC = Effort(1, 1, 0.065, 6)  # FULL and FORWARD heads make models larger
EFFORT_RIVAL = Effort(2, 1, 0.015)  # of a kind that comes after another, with a static part
EFFORT_LARGE = Effort(4, 1, 0.03)
EFFORT_LARGE_STATIC = Effort(1, 1, 0.04, 3)
EFFORT_LARGE_RIVAL = Effort(1, 1, 0.01)
CHEAP = 0.1  # of relaxing a chain: one whose teams have few rows
SIZE = 24 * 16 * 16  # of a large model
TINY = 30  # numbers of FULL heads to choose from


@dataclass(frozen=True, eq=False)
class Candidate:
    """A placement, the heads that it decided to be FULL (None without a static part), and how good it is."""

    placement: Placement
    full_LH: BoolArray | None
    report: SolverReport


@dataclass(frozen=True, eq=False)
class Solved:
    """The best answer of one kind, a bound over all its chains, and the relaxation of the chain that won."""

    kind: str
    answer: Answer
    bound: float
    fractional: float
    chains: int
    seconds: float


def propose(
    costs: Costs,
    mode: str = "auto",
    *,
    static: StaticPart | None = None,
    scores: Scores | None = None,
    limits: Limits | None = None,
    current: Placement | None = None,
) -> list[Candidate]:
    """Candidate placements of a mode, the best by proxy first; "auto" offers split, whole and mixed ones,
    "unmixed" no mixed ones.

    With a `static` part the same model decides which heads are FULL. `current` is the placement in use: no answer is
    worse, an equally good one keeps it, and heads that can stay stay. Raises InfeasibleError when the model does not
    fit into the fleet's memory in any way of the mode.
    """
    if mode not in MODES:
        raise UserError(
            f"'{mode}' is not a placement mode.",
            code="unknown_placement",
            param="method.placement",
            remedy=f"Use one of {', '.join(MODES)}.",
        )
    limits = limits or Limits()
    instance = Instance(costs, static)
    kinds = MODES[mode] if costs.num_workers > 1 else ("whole",)
    solved = solve_kinds(instance, kinds, limits)
    kept = _kept(instance, current, solved, kinds, limits)
    found: dict[bytes, Candidate] = {}
    for candidate in ([kept] if kept else []) + [_candidate(instance, s, scores, current) for s in solved]:
        key = candidate.placement.owner_LH.tobytes()
        found.setdefault(key + (b"" if candidate.full_LH is None else candidate.full_LH.tobytes()), candidate)
    return list(found.values())


def solve_kinds(instance: Instance, kinds: Sequence[str], limits: Limits) -> list[Solved]:
    """The best answer of each kind that has one, the best first. Raises InfeasibleError if none has."""
    pool, losses = Pool(instance), losses_of(instance)
    chains = {kind: chains_of(instance, kind) for kind in kinds}
    quests = [Quest(instance, kind, some, pool, losses, limits) for kind, some in chains.items() if some]
    solved: list[Solved] = []
    for quest in _by_promise(quests):
        found = quest.solve_below(min((s.answer.objective for s in solved), default=math.inf))
        solved += [found] if found else []
    if not solved:
        everything = [chain for some in chains.values() for chain in some]
        raise memory_error(instance, tuple(quest.kind for quest in quests), everything[:CHAINS], limits)
    return sorted(solved, key=lambda s: s.answer.objective)


def _by_promise(quests: Sequence[Quest]) -> list[Quest]:
    """By what the kinds may come to: by their bounds; with a static part by a look at their chains."""
    order = sorted(quests, key=lambda quest: min(quest.known))
    least = math.inf
    for quest in order if order and order[0].losses is not None else []:
        if min(quest.known) < least * HOPELESS:
            quest.look()
            least = min(least, quest.promise)
    return sorted(order, key=lambda quest: quest.promise)


class Quest:
    """One kind's search. `known[i]` is a bound on chain i, quick at first."""

    def __init__(
        self,
        instance: Instance,
        kind: str,
        chains: Sequence[Chain],
        pool: Pool,
        losses: Losses | None,
        limits: Limits,
    ) -> None:
        self.instance, self.kind, self.chains, self.pool, self.losses = instance, kind, chains, pool, losses
        self.limits, self.rival, self.effort = limits, math.inf, _effort(instance, math.inf)
        self.known: list[float] = [quick_bound_us(instance, chain) for chain in chains]
        self.relaxations: dict[int, Relaxed] = {}
        self.best: tuple[Answer, float] | None = None
        self.seconds = 0.0
        self.solved = 0

    @property
    def promise(self) -> float:
        """What the kind may come to: its least fractional objective, or its bound."""
        if self.losses is None:
            return min(self.known)
        return min((self.relaxations[i].fractional for i in self._promising()), default=math.inf)

    def solve_below(self, rival: float) -> Solved | None:
        """The best answer over the chains; `rival` is the best of other kinds."""
        began = time.perf_counter()
        self.late_at = began + self.limits.wall_seconds
        self.rival, self.effort = rival, _effort(self.instance, rival)
        if self.instance.static is None:
            self._by_bound()
        else:
            self._by_promise()
        if self.best is None:
            return None
        answer, fractional = self.best
        seconds = self.seconds + time.perf_counter() - began
        return Solved(self.kind, answer, self.bound(), fractional, len(self.chains), seconds)

    @property
    def objective(self) -> float:
        return math.inf if self.best is None else self.best[0].objective

    @property
    def late(self) -> bool:
        return time.perf_counter() > self.late_at

    @property
    def size(self) -> float:
        """Of the model, at most 1: small ones need less time; tiny ones end by themselves."""
        heads = self.instance.num_heads
        if self.losses is None or self.losses.loss_LK.size <= TINY:
            return 1.0
        return float(np.clip(self.instance.num_blocks * heads**2 / SIZE, 0.05, 1.0))

    @property
    def within(self) -> float:
        return PROVED_WITHIN if self.losses is None else PROVED_STATIC

    def bound(self) -> float:
        return min(self.objective, *self.known)

    def goal(self) -> float:
        """A chain that cannot have less is passed over."""
        return min(self.objective * (1 - self.within), self.rival * HOPELESS)

    def _by_bound(self) -> None:
        """The chain with the least bound is relaxed, then solved, until none can beat the answer."""
        waiting = [(bound, False, i) for i, bound in enumerate(self.known)]
        heapq.heapify(waiting)
        relaxed = 0
        while waiting and waiting[0][0] < self.goal():
            enough = self.late or relaxed >= self.effort.relaxed or self.solved >= self.effort.solved
            if enough and (self.best is not None or self.solved >= 2 * self.effort.solved):
                break
            _, is_relaxed, index = heapq.heappop(waiting)
            if is_relaxed:
                self.solve(index)
            else:
                relaxed += 1
                self.relax(index)
                if self.relaxations[index].bound < math.inf:
                    heapq.heappush(waiting, (self.known[index], bool(self.relaxations[index].rows), index))

    def look(self) -> None:
        """Relax roughly the chains of small quick bounds."""
        began, spent = time.perf_counter(), 0.0
        for i in sorted(range(len(self.chains)), key=lambda i: self.known[i]):
            if spent >= self.effort.relaxed and self._promising():
                break
            self.relax(i, rough=True)
            spent += CHEAP if set(self.chains[i]) <= self.pool.complete else 1
        self.seconds += time.perf_counter() - began

    def _by_promise(self) -> None:
        """The most promising chain is solved, then bounds are tightened where they are below its own."""
        if not self.relaxations and self.rival == math.inf:
            self.look()
        tight = math.inf
        for i in self._promising():
            tried = self.late or self.solved >= self.effort.solved
            if tried and (self.best is not None or self.solved >= 2 * self.effort.solved):
                break
            if self.effort.bounded and self.relaxations[i].fractional < self.goal():
                self.relax(i)
                tight = min(tight, self.known[i])
            self.solve(i)
        for i in sorted(range(len(self.chains)), key=lambda i: self.known[i])[: self.effort.bounded]:
            if self.known[i] < min(tight, self.goal()) and not self.late:
                self.relax(i, goal=min(tight, self.goal()))
                if self.known[i] < min(tight, self.goal()):
                    self.solve(i)

    def _promising(self) -> list[int]:
        """Relaxed chains that may fit, the least fractional objective first."""
        found = (i for i, relaxed in self.relaxations.items() if relaxed.bound < math.inf)
        return sorted(found, key=lambda i: (self.relaxations[i].fractional, i))

    def relax(self, index: int, rough: bool = False, goal: float | None = None) -> None:
        if index in self.relaxations and set(self.chains[index]) <= self.pool.complete:
            return
        goal = self.goal() if goal is None else goal
        found = relax(self.instance, self.chains[index], self.pool, self.losses, goal, rough)
        self.known[index] = max(self.known[index], found.bound)
        self.relaxations[index] = found

    def solve(self, index: int) -> None:
        relaxed = self.relaxations[index]
        if relaxed.fractional >= self.goal():
            return
        self.solved += 1
        part = self.effort.part if relaxed.fractional >= self.rival else _effort(self.instance, math.inf).part
        answer, proved = solve_chain(
            self.instance,
            self.chains[index],
            relaxed,
            self.losses,
            self.limits,
            below=None if self.best is None else self.best[0].objective,
            seconds=self.limits.seconds * part * self.size,
            within=self.within if self.known[index] < self.rival else LOOSELY,
        )
        self.known[index] = max(self.known[index], proved)
        if answer is not None and answer.objective < self.objective:
            self.best = answer, relaxed.fractional


def _effort(instance: Instance, rival: float) -> Effort:
    if instance.static is None:
        return EFFORT if instance.num_workers <= LARGE else EFFORT_LARGE
    if instance.num_workers > LARGE:
        return EFFORT_LARGE_STATIC if rival == math.inf else EFFORT_LARGE_RIVAL
    return EFFORT_STATIC if rival == math.inf else EFFORT_RIVAL


def _candidate(instance: Instance, solved: Solved, scores: Scores | None, current: Placement | None) -> Candidate:
    rows = list(solved.answer.rows)
    full_LH = _full_heads(instance, rows)
    if current is not None and current.owner_LH.shape == full_LH.shape:
        rows = arrange(rows, full_LH, current)
        owner_LH = assign_heads(rows, full_LH, scores, current)
    else:
        owner_LH = assign_heads(rows, full_LH, scores)
    placement = Placement(owner_LH, instance.num_workers, solved.answer.classifier)
    return Candidate(placement, None if instance.static is None else full_LH, _report(instance, solved))


def _full_heads(instance: Instance, rows: Sequence[Row]) -> BoolArray:
    full_L: IntArray = np.array([row.num_full for row in rows], dtype=np.int64)
    if instance.static is None:
        return np.ones((instance.num_blocks, instance.num_heads), dtype=np.bool_)
    return full_heads(instance.static, full_L)


def _report(instance: Instance, solved: Solved) -> SolverReport:
    objective, bound = solved.answer.objective, solved.bound
    loss = max(0.0, objective / solved.fractional - 1) if 0 < solved.fractional < math.inf else 0.0
    rows = solved.answer.rows
    heads_W = np.sum([np.add(row.full_W, row.only_W) for row in rows], axis=0).tolist()
    note = f"µs of a step by the proxy; heads per worker {heads_W}"
    if instance.static is not None:
        note += f", FULL {np.sum([row.full_W for row in rows], axis=0).tolist()}"
    gap = max(0.0, objective - bound) / max(objective, 1)
    return SolverReport(
        method=f"CP-SAT {solved.kind}",
        status="OPTIMAL" if gap <= PROVED_WITHIN else "FEASIBLE",
        objective=float(objective),
        bound=float(bound),
        gap=gap,
        seconds=solved.seconds,
        note=f"{note}; bound over {solved.chains} chains of teams; rounding loss {loss:.4f}",
        rounding_loss=loss,
    )


def _kept(
    instance: Instance, current: Placement | None, solved: Sequence[Solved], kinds: Sequence[str], limits: Limits
) -> Candidate | None:
    """The placement in use, where it is as good as the best answer and still fits."""
    shape = (instance.num_blocks, instance.num_heads)
    if current is None or current.num_workers != instance.num_workers or current.owner_LH.shape != shape:
        return None
    full_LH = None if instance.static is None else worthiest(instance.static)
    rows = rows_of(current, full_LH)
    fits = all(
        need <= profile.free_bytes
        for need, profile in zip(instance.memory_bytes(rows, current.classifier), instance.costs.profiles, strict=True)
    )
    objective, best = instance.proxy_us(rows, current.classifier), solved[0]
    if not fits or kind_of(rows) not in kinds or objective > best.answer.objective * (1 + SAME):
        return None
    bound = min(best.bound, objective)
    same = Solved(
        best.kind, Answer(tuple(rows), current.classifier, objective), bound, best.fractional, best.chains, best.seconds
    )
    return Candidate(current, full_LH, _report(instance, same))


def kind_of(rows: Sequence[Row]) -> str:
    """What kind of placement these rows make."""
    teams = {row.team for row in rows}
    if all(len(team) == 1 for team in teams):
        return "whole"
    return "split" if len(teams) == 1 else "mixed"
