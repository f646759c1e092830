"""Draws: the part of a selection that changes from step to step, as a cycle of op tables.

A *unit* draws together: the heads of one worker in one block ("coherent", so that the worker has nothing to exchange
when they sit out), or one head ("scattered"). Micro-batches are dealt like cards:

- *apart*: what the other units of the block were dealt in this table comes last, so that two workers of a block sit out
  different micro-batches and each of those has one participant and no exchange;
- *even*: then what the unit was dealt least often over the cycle, then by chance;
- *together*: with this probability a block copies the block below it, so that x stays with the worker that runs.

A count that is not whole, such as 0.5 SKIPs per step, is met over the cycle, and in every step as nearly as can be by
each worker. No micro-batch is left without a FULL head.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from scheduler.domain import IntArray, Op, OpTable, Placement
from scheduler.errors import InfeasibleError
from scheduler.knapsack import BoolArray

PERIOD = 8  # tables of a cycle, where anything is redrawn


@dataclass(frozen=True)
class Unit:
    """Heads of one block, all of one worker, that draw together."""

    block: int
    worker: int
    heads: tuple[int, ...]


@dataclass(frozen=True)
class Draw:
    """How to draw: the step's micro-batches, the seed of the window, and how far blocks follow each other (0 to 1)."""

    num_micro_batches: int
    seed: tuple[int, int] = (0, 0)
    together: float = 0.5

    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)


@dataclass(frozen=True)
class Swing:
    """One head that is FULL for `runs` of the micro-batches it runs: it makes up what whole heads leave of a total."""

    block: int
    head: int
    runs: int

    def apply(self, ops_LHM: OpTable) -> None:
        word_M = ops_LHM[self.block, self.head]
        word_M[np.flatnonzero(word_M)[: self.runs]] = int(Op.FULL)


def groups_of(placement: Placement) -> list[Unit]:
    """One unit per (block, worker)."""
    blocks = range(len(placement.owner_LH))
    return [Unit(b, w, placement.heads_of(w, b)) for b in blocks for w in placement.holders(b)]


def heads_of(placement: Placement) -> list[Unit]:
    """One unit per head."""
    owners = enumerate(placement.owner_LH.tolist())
    return [Unit(block, worker, (head,)) for block, row in owners for head, worker in enumerate(row)]


def held_cycle(
    placement: Placement, full_LH: BoolArray, swing: Swing | None, skip: float, draw: Draw
) -> tuple[OpTable, ...]:
    """FULL and FORWARD held still; every group sits out `skip` micro-batches per step on average."""
    units, rng = groups_of(placement), draw.rng()
    base_LH = np.where(full_LH, int(Op.FULL), int(Op.FORWARD)).astype(np.int8)
    dealer = _Dealer(units, draw, rng, apart=True)
    tables = []
    for counts_U in counts_over_cycle(units, skip, draw.together >= 1):
        rests_UM = dealer.deal(counts_U, np.ones((len(units), draw.num_micro_batches), dtype=np.bool_))
        ops_LHM = np.repeat(base_LH[:, :, None], draw.num_micro_batches, axis=2)
        for unit, rests_M in zip(units, rests_UM, strict=True):
            ops_LHM[unit.block, list(unit.heads)] = np.where(
                rests_M, int(Op.SKIP), ops_LHM[unit.block, list(unit.heads)]
            )
        if swing is not None:
            swing.apply(ops_LHM)
        tables.append(feed(ops_LHM, units))
    return _shortest(tables)


def redrawn_cycle(placement: Placement, scattered: bool, fulls: float, skip: float, draw: Draw) -> tuple[OpTable, ...]:
    """Every unit draws which micro-batches it runs FULL and which it sits out; it runs the others FORWARD.

    `fulls` bounds the FULL runs of all heads in a mean step, `skip` is the mean of a unit.
    """
    units = heads_of(placement) if scattered else groups_of(placement)
    rng, apart, aligned = draw.rng(), not scattered, draw.together >= 1
    draw = Draw(draw.num_micro_batches, draw.seed, 0.0) if scattered else draw
    resting, training = _Dealer(units, draw, rng, apart), _Dealer(units, draw, rng, apart)
    tables = []
    means = (skip, _spread(units, fulls, rng))
    for skips_U, fulls_U in zip(*(counts_over_cycle(units, mean, aligned) for mean in means), strict=True):
        rests_UM = resting.deal(skips_U, np.ones((len(units), draw.num_micro_batches), dtype=np.bool_))
        full_UM = training.deal(np.minimum(fulls_U, draw.num_micro_batches - skips_U), ~rests_UM)
        ops_LHM = np.zeros((*placement.owner_LH.shape, draw.num_micro_batches), dtype=np.int8)
        for unit, rests_M, full_M in zip(units, rests_UM, full_UM, strict=True):
            word_M = np.where(rests_M, int(Op.SKIP), np.where(full_M, int(Op.FULL), int(Op.FORWARD)))
            ops_LHM[unit.block, list(unit.heads)] = word_M
        tables.append(feed(ops_LHM, units))
    return _shortest(tables)


def counts_over_cycle(units: Sequence[Unit], mean: float | npt.NDArray[np.float64], aligned: bool) -> IntArray:
    """[T, U]: whole counts per table whose mean over the cycle is `mean`, staggered over the units of a worker.

    `mean` is for all units or for each, in multiples of 1/`PERIOD`. If `aligned`, a worker's units have the same count.
    """
    seen: dict[int, int] = {}
    owned = {worker: sum(u.worker == worker for u in units) for worker in {u.worker for u in units}}
    phase_U = np.zeros(len(units))
    for index, unit in enumerate(units):
        phase_U[index] = unit.worker / len(owned) if aligned else seen.get(unit.worker, 0) / owned[unit.worker]
        seen[unit.worker] = seen.get(unit.worker, 0) + 1
    edges = np.floor(np.arange(PERIOD + 1)[:, None] * mean + phase_U + 1e-9)
    counts: IntArray = np.diff(edges, axis=0).astype(np.int64)
    return counts


def feed(ops_LHM: OpTable, units: Sequence[Unit]) -> OpTable:
    """Swap micro-batches of single units until every one has a FULL head; counts per unit stay as they are.

    Raises InfeasibleError when there are fewer FULL runs of units than micro-batches.
    """
    full_UM = np.array([(ops_LHM[u.block, list(u.heads)] == Op.FULL).any(axis=0) for u in units])
    while (starved := np.flatnonzero(~full_UM.any(axis=0))).size:
        rich = int(np.argmax(full_UM.sum(axis=0)))
        if full_UM[:, rich].sum() < 2:
            raise InfeasibleError(
                "Some micro-batches would run no FULL head at all.",
                code="starved_micro_batch",
                param="method",
                remedy="Ask for more FULL or fewer SKIP.",
            )
        poor, giver = int(starved[0]), int(np.flatnonzero(full_UM[:, rich])[0])
        heads = list(units[giver].heads)
        ops_LHM[units[giver].block, heads] = _swapped(ops_LHM[units[giver].block, heads], poor, rich)
        full_UM[giver] = (ops_LHM[units[giver].block, heads] == Op.FULL).any(axis=0)
    return ops_LHM


def _spread(units: Sequence[Unit], fulls: float, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """[U]: mean FULL runs of each unit, in multiples of 1/`PERIOD`, with no more than `fulls` over all heads."""
    heads_U = np.array([len(unit.heads) for unit in units])
    mean_U = np.full(len(units), np.floor(PERIOD * fulls / heads_U.sum() + 1e-9) / PERIOD)
    order = rng.permutation(len(units))
    affordable = np.cumsum(heads_U[order]) <= PERIOD * (fulls - (heads_U * mean_U).sum()) + 1e-9
    mean_U[order[affordable]] += 1 / PERIOD
    return mean_U


def _shortest(tables: Sequence[OpTable]) -> tuple[OpTable, ...]:
    """One table where nothing is redrawn."""
    return tuple(tables[:1] if all((table == tables[0]).all() for table in tables) else tables)


def _swapped(ops_HM: OpTable, a: int, b: int) -> OpTable:
    out = ops_HM.copy()
    out[:, [a, b]] = ops_HM[:, [b, a]]
    return out


class _Dealer:
    """Deals micro-batches to units, table after table; `used_UM` counts what each unit was dealt so far."""

    def __init__(self, units: Sequence[Unit], draw: Draw, rng: np.random.Generator, apart: bool) -> None:
        self.blocks = [list(items) for _, items in itertools.groupby(range(len(units)), key=lambda u: units[u].block)]
        self.workers = [[units[u].worker for u in block] for block in self.blocks]
        self.draw, self.rng, self.apart = draw, rng, apart
        self.used_UM = np.zeros((len(units), draw.num_micro_batches), dtype=np.int64)

    def deal(self, counts_U: IntArray, allowed_UM: BoolArray) -> BoolArray:
        """[U, M] true where a unit is dealt the micro-batch: counts_U[u] of those that `allowed_UM` allows it."""
        dealt_UM = np.zeros_like(allowed_UM)
        for index, block in enumerate(self.blocks):
            below = self.blocks[index - 1] if index and self.workers[index - 1] == self.workers[index] else []
            if below and self.rng.random() < self.draw.together and _same(below, block, counts_U, allowed_UM):
                dealt_UM[block] = dealt_UM[below]
            else:
                self._deal_block(block, counts_U, allowed_UM, dealt_UM)
        self.used_UM += dealt_UM
        return dealt_UM

    def _deal_block(self, block: list[int], counts_U: IntArray, allowed_UM: BoolArray, dealt_UM: BoolArray) -> None:
        taken_M = np.zeros(self.draw.num_micro_batches, dtype=np.int64)
        for unit in self.rng.permutation(block):
            chance_M = self.rng.random(self.draw.num_micro_batches)
            keys = (chance_M, self.used_UM[unit], taken_M * self.apart, ~allowed_UM[unit])
            chosen = np.lexsort(keys)[: counts_U[unit]]
            dealt_UM[unit, chosen] = True
            taken_M[chosen] += 1


def _same(a: list[int], b: list[int], counts_U: IntArray, allowed_UM: npt.NDArray[np.bool_]) -> bool:
    return bool((counts_U[a] == counts_U[b]).all() and (allowed_UM[a] == allowed_UM[b]).all())
