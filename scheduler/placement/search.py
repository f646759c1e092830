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
import numpy.typing as npt

from scheduler.cost import Costs
from scheduler.domain import IntArray, Placement, Scores, SolverReport, StaticPart
from scheduler.errors import UserError
from scheduler.placement.chains import KINDS, chains_of, quick_bound_us
from scheduler.placement.heads import arrange, assign_heads
from scheduler.placement.instance import Chain, Instance, Row
from scheduler.placement.memory import memory_error, rows_of
from scheduler.placement.model import PROVED_WITHIN, Answer, Limits, solve_chain
from scheduler.placement.relaxation import Pool, Relaxed, relax
from scheduler.placement.worth import Losses, full_heads, losses_of, worthiest

BoolArray = npt.NDArray[np.bool_]

MODES = {"auto": KINDS, "split": ("split",), "whole": ("whole",)}
CHAINS = 48  # in which the least lacking memory is sought
HOPELESS = 1.15  # a kind whose bound is above this times the best answer is not worth simulating
LOOSELY = 0.01  # gap of a kind that another one has beaten
LARGE = 12  # workers; above this an answer is wanted within a second
SAME = 1e-3  # relative: as good as the placement in use


@dataclass(frozen=True)
class Effort:
    """How many chains of a kind are relaxed and solved, and the part of the time that one solve may take."""

    relaxed: int
    solved: int
    part: float


EFFORT = Effort(40, 4, 0.1)
EFFORT_STATIC = Effort(6, 2, 0.06)  # FULL and FORWARD heads make models larger
EFFORT_RIVAL = Effort(2, 1, 0.015)  # of a kind that comes after another, with a static part
EFFORT_LARGE = Effort(4, 1, 0.03)
EFFORT_LARGE_STATIC = Effort(1, 1, 0.015)


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
    """Candidate placements of a mode, the best by proxy first; "auto" offers split, whole and mixed ones.

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
    chains = {kind: some for kind, some in chains.items() if some}
    solved: list[Solved] = []
    for kind in sorted(chains, key=lambda kind: quick_bound_us(instance, chains[kind][0])):
        best = min((s.answer.objective for s in solved), default=math.inf)
        if quick_bound_us(instance, chains[kind][0]) < best * HOPELESS:
            found = solve_kind(instance, kind, chains[kind], pool, losses, limits, best)
            solved += [found] if found else []
    if not solved:
        everything = [chain for some in chains.values() for chain in some]
        raise memory_error(instance, tuple(chains), everything[:CHAINS], limits)
    return sorted(solved, key=lambda s: s.answer.objective)


def solve_kind(
    instance: Instance,
    kind: str,
    chains: Sequence[Chain],
    pool: Pool,
    losses: Losses | None,
    limits: Limits,
    rival: float = math.inf,
) -> Solved | None:
    """The best answer over the chains; `rival` is the best of other kinds.

    Chains are taken in order of their bounds: quick, then by relaxation, then solved. What is left gives the bound.
    """
    began = time.perf_counter()
    effort = _effort(instance, rival)
    waiting: list[tuple[float, bool, int]] = [(quick_bound_us(instance, c), False, i) for i, c in enumerate(chains)]
    heapq.heapify(waiting)
    relaxations: dict[int, Relaxed] = {}
    best: Answer | None = None
    bound, fractional, relaxed, solved = math.inf, math.inf, 0, 0
    while waiting:
        known, is_relaxed, index = waiting[0]
        goal = min(math.inf if best is None else best.objective * (1 - PROVED_WITHIN), rival * HOPELESS)
        late = time.perf_counter() - began > limits.wall_seconds or relaxed >= effort.relaxed or solved >= effort.solved
        if known >= goal or (late and (best is not None or solved >= 2 * effort.solved)):
            break
        heapq.heappop(waiting)
        if not is_relaxed:
            relaxed += 1
            better = relax(instance, chains[index], pool, losses, goal)
            if better.bound < math.inf:
                relaxations[index] = better
                heapq.heappush(waiting, (max(known, better.bound), bool(better.rows), index))
            continue
        if best is not None and relaxations[index].fractional >= best.objective * (1 - PROVED_WITHIN):
            bound = min(bound, known)
            continue
        solved += 1
        answer, proved = solve_chain(
            instance,
            chains[index],
            relaxations[index],
            losses,
            limits,
            below=None if best is None else best.objective,
            seconds=limits.seconds * effort.part,
            within=PROVED_WITHIN if known < rival else LOOSELY,
        )
        bound = min(bound, max(known, proved))
        if answer is not None and (best is None or answer.objective < best.objective):
            best, fractional = answer, relaxations[index].fractional
    if best is None:
        return None
    bound = min(bound, best.objective, *(known for known, _, _ in waiting))
    return Solved(kind, best, bound, fractional, len(chains), time.perf_counter() - began)


def _effort(instance: Instance, rival: float) -> Effort:
    if instance.num_workers > LARGE:
        return EFFORT_LARGE if instance.static is None else EFFORT_LARGE_STATIC
    if instance.static is None:
        return EFFORT
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
