"""Rows of a team: all of them where they are few, else greedy ones and those that a linear program asks for.

*Pricing* finds the row with the least reduced cost by dynamic programming over the team's members: the state is how
many heads (and FULL heads) are given out. The slowest members of forward and of backward are handled by *cells*:
intervals of both times, charged at their lower ends; cells that look good are split. So the value found is a true lower
bound over all rows of the team with these trainers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from scheduler.domain import IntArray
from scheduler.placement.chains import trainers_of
from scheduler.placement.instance import Instance, Row, Team

FloatArray = npt.NDArray[np.float64]
COMPLETE_UP_TO = 600  # rows of a team
FOUND = 6  # rows that one pricing brings
CUTS = np.array([0.6, 0.9, 1.1, 1.4])  # of an even share: the first cells
PARTS = 2  # a good cell is split so often, both ways
SPLIT_AT_ONCE = 64  # cells


@dataclass(frozen=True, eq=False)
class Prices:
    """What the linear program charges a row for.

    `cost_WAO` by worker and heads, `path` per µs of the slowest member, `full_K` by the row's FULL heads.
    """

    cost_WAO: FloatArray
    path: float
    full_K: FloatArray


def options(instance: Instance, trains: bool) -> list[tuple[int, int]]:
    """(FULL, FORWARD) heads of one member in one block."""
    heads = instance.num_heads
    if not trains:
        return [(0, o) for o in range(1, heads + 1)]
    if instance.static is None:
        return [(a, 0) for a in range(1, heads + 1)]
    return [(a, o) for a in range(1, heads + 1) for o in range(heads - a + 1)]


def all_rows(instance: Instance, team: Team) -> list[Row] | None:
    """Every row of a team; None if there are more than a few hundred."""
    rows: list[Row] = []
    for trainers in trainers_of(instance, team):
        members = [options(instance, w in trainers) for w in team]
        rows += itertools.islice(_fill(instance, team, members), COMPLETE_UP_TO + 1 - len(rows))
        if len(rows) > COMPLETE_UP_TO:
            return None
    return rows


def _fill(instance: Instance, team: Team, members: Sequence[Sequence[tuple[int, int]]]) -> Iterator[Row]:
    def rest(place: int, left: int) -> Iterator[tuple[tuple[int, int], ...]]:
        if place == len(team):
            if left == 0:
                yield ()
            return
        for a, o in members[place]:
            if a + o <= left - (len(team) - place - 1):
                for more in rest(place + 1, left - a - o):
                    yield ((a, o), *more)

    for shares in rest(0, instance.num_heads):
        yield spelled(instance, team, shares)


def spelled(instance: Instance, team: Team, shares: Sequence[tuple[int, int]]) -> Row:
    """A team's (FULL, FORWARD) shares as a row over all workers."""
    full, only = [0] * instance.num_workers, [0] * instance.num_workers
    for w, (a, o) in zip(team, shares, strict=True):
        full[w], only[w] = a, o
    return Row(tuple(full), tuple(only))


def first_rows(instance: Instance, team: Team) -> list[Row]:
    """Greedy rows to start from: every number of FULL heads, shared out by speed and by memory."""
    rows: dict[Row, None] = {}
    rooms = np.array([max(1, p.free_bytes) for p in instance.costs.profiles], dtype=np.float64)
    by_memory = instance.bytes_AO[None] / rooms[:, None, None]
    for trainers in trainers_of(instance, team):
        lone = len(team) - len(trainers)
        counts = (
            [instance.num_heads] if instance.static is None else range(len(trainers), instance.num_heads - lone + 1)
        )
        for full in counts if trainers else [0]:
            for cost_WAO in (instance.busy_WAO, by_memory):
                rows.setdefault(_greedy(instance, team, trainers, full, cost_WAO))
    return list(rows)


def _greedy(instance: Instance, team: Team, trainers: Team, num_full: int, cost_WAO: IntArray | FloatArray) -> Row:
    """Give out heads one by one to whom they make the least slow; every member gets one, every trainer a FULL one."""
    shares = {w: (1, 0) if w in trainers else (0, 1) for w in team}
    for kind, left in ((0, num_full - len(trainers)), (1, instance.num_heads - num_full - len(team) + len(trainers))):
        for _ in range(left):
            able = trainers if kind == 0 else team
            grown = {w: (shares[w][0] + (kind == 0), shares[w][1] + (kind == 1)) for w in able}
            best = min(able, key=lambda w: (cost_WAO[w, grown[w][0], grown[w][1]], w))
            shares[best] = grown[best]
    return spelled(instance, team, [shares[w] for w in team])


def price(
    instance: Instance, team: Team, trainers: Team, prices: Prices, enough: float, splits: int
) -> tuple[float, list[Row]]:
    """(Lower bound of the reduced cost over all rows, good rows); what does not depend on shares is left out.

    Cells with a bound below `enough` are split, up to `splits` times.
    """
    cells_V4 = _first_cells(instance, team, trainers)
    bound, rows = np.inf, list[Row]()
    for turn in range(splits + 1):
        stages = [np.full((len(cells_V4), instance.num_heads + 1, len(prices.full_K)), np.inf)]
        stages[0][:, 0, 0] = 0.0
        for w in team:
            choices = options(instance, w in trainers)
            stages.append(_next_stage(instance, stages[-1], w, choices, cells_V4, prices.cost_WAO[w]))
        least_V = prices.path * (cells_V4[:, 0] + cells_V4[:, 2])
        totals = stages[-1][:, -1, :] + least_V[:, None] + prices.full_K[None]
        for at in _best(totals):
            rows.append(_trace(instance, team, trainers, stages, cells_V4, prices, divmod(at, totals.shape[1])))
        least = totals.min(axis=1)
        order = np.argsort(least, kind="stable")
        hopeful = order[:SPLIT_AT_ONCE][least[order[:SPLIT_AT_ONCE]] < enough]
        if turn == splits or not len(hopeful):
            return min(bound, float(least.min())), list(dict.fromkeys(rows))
        others = np.delete(least, hopeful)
        bound = min(bound, float(others.min()) if len(others) else np.inf)
        cells_V4 = np.concatenate([_split(cell) for cell in cells_V4[hopeful]])
    raise AssertionError("the last turn returns")


def _best(totals: FloatArray) -> list[int]:
    """The final states that are best, from different cells or numbers of FULL heads."""
    ranked = (int(at) for at in np.argsort(totals, axis=None, kind="stable")[:FOUND])
    return [at for at in ranked if np.isfinite(totals.flat[at])]


def _first_cells(instance: Instance, team: Team, trainers: Team) -> FloatArray:
    """[V, 4]: forward time of the slowest member above and up to which, and backward time; no row is outside."""
    forward = _cuts([instance.forward_WAO[w, 0, 1:] for w in team])
    backward = _cuts([instance.backward_SWN[:, w, 1:].sum(axis=0) for w in trainers])
    if len(team) == 1:
        forward, backward = forward[[0, -1]], backward[[0, -1]]
    pairs = itertools.product(itertools.pairwise(forward), itertools.pairwise(backward))
    return np.array([[*f, *b] for f, b in pairs])


def _cuts(curves: Sequence[IntArray]) -> FloatArray:
    """Ends of the first intervals: around an even share of all heads, or of a few."""
    if not curves:
        return np.array([0.0, 1.0])
    heads = len(curves[0])
    even = heads / sum(heads / max(1, int(curve[-1])) for curve in curves)
    highest = 2.0 * max(int(curve[-1]) for curve in curves) + 1
    return np.array([0.0, *(even * CUTS)[even * CUTS < highest], highest])


def _split(cell: FloatArray) -> FloatArray:
    forward, backward = (np.linspace(low, high, PARTS + 1) for low, high in (cell[:2], cell[2:]))
    pairs = itertools.product(itertools.pairwise(forward), itertools.pairwise(backward))
    return np.array([[*f, *b] for f, b in pairs])


def _next_stage(
    instance: Instance,
    before: FloatArray,
    worker: int,
    choices: Sequence[tuple[int, int]],
    cells_V4: FloatArray,
    cost_AO: FloatArray,
) -> FloatArray:
    after = np.full_like(before, np.inf)
    size, width = before.shape[1:]
    for a, o in choices:
        fits = _fits(instance, worker, a, o, cells_V4)
        if not fits.any():
            continue
        heads, full = a + o, a if width > 1 else 0
        came = before[:, : size - heads, : width - full] + cost_AO[a, o]
        if not fits.all():
            came[~fits] = np.inf
        target = after[:, heads:, full:]
        np.minimum(target, came, out=target)
    return after


def _fits(instance: Instance, worker: int, a: int, o: int, cells_V4: FloatArray) -> npt.NDArray[np.bool_]:
    """In which cells a member may have this share."""
    forward = instance.forward_WAO[worker, a, o] <= cells_V4[:, 1]
    return forward & (instance.backward_SWN[:, worker, a].sum() <= cells_V4[:, 3])


def _trace(
    instance: Instance,
    team: Team,
    trainers: Team,
    stages: Sequence[FloatArray],
    cells_V4: FloatArray,
    prices: Prices,
    end: tuple[int, int],
) -> Row:
    """The row behind a final state, found by walking back through the stages."""
    cell, full = end
    heads, static = instance.num_heads, stages[0].shape[2] > 1
    shares: list[tuple[int, int]] = []
    for place in range(len(team) - 1, -1, -1):
        w, value = team[place], stages[place + 1][cell, heads, full]

        def came(share: tuple[int, int], place: int = place, w: int = w, heads: int = heads, full: int = full) -> float:
            a, o = share
            f = full - a if static else 0
            if a + o > heads or f < 0 or not _fits(instance, w, a, o, cells_V4[[cell]])[0]:
                return np.inf
            return float(stages[place][cell, heads - a - o, f] + prices.cost_WAO[w, a, o])

        a, o = min(options(instance, w in trainers), key=lambda share: abs(came(share) - value))
        shares.append((a, o))
        heads, full = heads - a - o, full - a if static else 0
    return spelled(instance, team, shares[::-1])
