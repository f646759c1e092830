"""Draws: the part of a selection that changes from step to step without looking at worth.

Micro-batches are dealt to units like cards:

- *apart*: what the other units of the block were dealt in this table comes last, so that two workers of a block sit out
  different micro-batches and each of those has one participant and no exchange;
- *even*: then what the unit was dealt least often over the cycle, then by chance;
- *together*: with this probability a block copies the block below it, so that x stays with the worker that runs.

Counts that are not whole, such as 0.5 SKIPs per step, are carried from table to table until they are; where a total is
given, every table meets it to the last head. No micro-batch is left without a FULL head.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scheduler.domain import BoolArray, FloatArray, IntArray, Op, OpTable
from scheduler.errors import InfeasibleError
from scheduler.selection.words import Unit


@dataclass(frozen=True)
class Draw:
    """How to draw: the step's micro-batches, the seed of the window, and how far blocks follow each other (0 to 1)."""

    num_micro_batches: int
    seed: tuple[int, int] = (0, 0)
    together: float = 0.5

    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)


@dataclass(frozen=True, eq=False)
class Counts:
    """Whole counts of one table: count_U[u] for all heads of unit u, and one more for `part` heads of unit `odd`."""

    count_U: IntArray
    odd: int = -1
    part: int = 0


def counts_over_cycle(mean_U: FloatArray, heads_U: IntArray, most_U: IntArray, total: int, tables: int) -> list[Counts]:
    """Counts of each table: Σ heads · count is exactly `total`, no unit above `most_U`, means as near as can be."""
    carried_U, found = np.zeros(len(mean_U)), []
    for _ in range(tables):
        carried_U = carried_U + mean_U
        count_U = np.clip(np.floor(carried_U + 1e-9), 0, most_U).astype(np.int64)
        missing = total - int(heads_U @ count_U)
        while missing < 0:
            able = np.flatnonzero(count_U > 0)
            unit = able[np.argmin((carried_U - count_U)[able])]
            count_U[unit] -= 1
            missing += int(heads_U[unit])
        while (able := np.flatnonzero((count_U < most_U) & (heads_U <= missing))).size:
            unit = able[np.argmax((carried_U - count_U)[able])]
            count_U[unit] += 1
            missing -= int(heads_U[unit])
        carried_U = carried_U - count_U
        able = np.flatnonzero(count_U < most_U)
        if missing and not able.size:
            raise _starved()
        odd = int(able[np.argmax(carried_U[able])]) if missing else -1
        found.append(Counts(count_U, odd, missing))
    return found


class Dealer:
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


def place(ops_LHM: OpTable, units: Sequence[Unit], dealt_UM: BoolArray, op: Op, counts: Counts | None = None) -> None:
    """Write `op` where units were dealt a micro-batch; part of one unit gets one more, if its counts say so."""
    for unit, dealt_M in zip(units, dealt_UM, strict=True):
        ops_LHM[unit.block, list(unit.heads)] = np.where(dealt_M, int(op), ops_LHM[unit.block, list(unit.heads)])
    if counts is not None and counts.part:
        unit = units[counts.odd]
        free = np.flatnonzero(~dealt_UM[counts.odd] & (ops_LHM[unit.block, unit.heads[0]] != int(Op.SKIP)))
        ops_LHM[unit.block, list(unit.heads[-counts.part :]), free[0]] = int(op)


def settle(ops_LHM: OpTable, total: int, worth_LH: FloatArray) -> OpTable:
    """Make the FULL runs exactly `total`: whole words of the most worthy FORWARD heads, or of the least worthy FULL."""
    surplus = int((ops_LHM == Op.FULL).sum()) - total
    before, after = (Op.FULL, Op.FORWARD) if surplus > 0 else (Op.FORWARD, Op.FULL)
    order = np.argsort(worth_LH if surplus > 0 else -worth_LH, axis=None, kind="stable")
    for flat in order:
        if not surplus:
            break
        block, head = np.unravel_index(int(flat), worth_LH.shape)
        word_M = ops_LHM[block, head]
        able = np.flatnonzero(word_M == before)[: abs(surplus)]
        word_M[able] = int(after)
        surplus -= len(able) if surplus > 0 else -len(able)
    return ops_LHM


def feed(ops_LHM: OpTable, units: Sequence[Unit]) -> OpTable:
    """Swap micro-batches of single units until every one has a FULL head; counts per unit stay as they are.

    Raises InfeasibleError when there are fewer FULL runs of units than micro-batches.
    """
    full_UM = np.array([(ops_LHM[u.block, list(u.heads)] == Op.FULL).any(axis=0) for u in units])
    while (starved := np.flatnonzero(~full_UM.any(axis=0))).size:
        rich = int(np.argmax(full_UM.sum(axis=0)))
        if full_UM[:, rich].sum() < 2:
            raise _starved()
        poor, giver = int(starved[0]), int(np.flatnonzero(full_UM[:, rich])[0])
        heads = list(units[giver].heads)
        ops_LHM[units[giver].block, heads] = _swapped(ops_LHM[units[giver].block, heads], poor, rich)
        full_UM[giver] = (ops_LHM[units[giver].block, heads] == Op.FULL).any(axis=0)
    return ops_LHM


def shortest(tables: Sequence[OpTable]) -> tuple[OpTable, ...]:
    """One table where nothing is redrawn."""
    return tuple(tables[:1] if all((table == tables[0]).all() for table in tables) else tables)


def evenly(tables: Sequence[OpTable], cost_T: FloatArray) -> tuple[OpTable, ...]:
    """The tables in an order in which every prefix costs nearly the mean, from below where it can."""
    left, ordered, ahead = list(range(len(tables))), [], 0.0
    excess_T = cost_T - cost_T.mean()
    while left:
        after = [ahead + excess_T[t] for t in left]
        pick = left[int(np.argmin([abs(a) + (a > 1e-9) * abs(a) for a in after]))]
        ahead += float(excess_T[pick])
        left.remove(pick)
        ordered.append(tables[pick])
    return tuple(ordered)


def _same(a: list[int], b: list[int], counts_U: IntArray, allowed_UM: BoolArray) -> bool:
    return bool((counts_U[a] == counts_U[b]).all() and (allowed_UM[a] == allowed_UM[b]).all())


def _swapped(ops_HM: OpTable, a: int, b: int) -> OpTable:
    out = ops_HM.copy()
    out[:, [a, b]] = ops_HM[:, [b, a]]
    return out


def _starved() -> InfeasibleError:
    return InfeasibleError(
        "Some micro-batches would run no FULL head at all.",
        code="starved_micro_batch",
        param="method",
        remedy="Ask for more FULL or fewer SKIP.",
    )
