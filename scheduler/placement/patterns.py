"""Rows of a team: all of them where they are few, else greedy ones and those that a linear program asks for.

*Pricing* finds the row with the least reduced cost by dynamic programming over the team's members: the state is how
many heads (and FULL heads) are given out. Trainers are one program and the others a second; all sets of trainers share
their stages, and each set joins an end of the first with one of the second. The slowest members of forward and of
backward are handled by *cells*: intervals of the times there are, charged at their first; cells that look good are
split. So the value found is a true lower bound over all rows of the team.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import numpy as np

from scheduler.domain import FloatArray, IntArray
from scheduler.placement.chains import by_speed, trainers_of
from scheduler.placement.instance import Instance, Row, Team

COMPLETE_UP_TO = 600  # rows of a team
FOUND = 6  # rows that one pricing brings
CUTS = np.array([0.6, 0.9, 1.1, 1.4])  # of an even share: the first cells
SPLIT_AT_ONCE = 32  # cells


@dataclass(frozen=True, eq=False)
class Prices:
    """What the linear program charges a row for.

    `cost_WAO` by worker and heads, `path` per µs of the slowest member, `full_K` by the row's FULL heads.
    """

    cost_WAO: FloatArray
    path: float
    full_K: FloatArray


def options(instance: Instance, trains: bool, team: Team) -> IntArray:
    """[S, 2]: (FULL, FORWARD) heads that one member may have in one block: each of the others has one at least."""
    return _options(instance.num_heads - len(team) + 1, trains, instance.static is not None)


@cache
def _options(most: int, trains: bool, mixes: bool) -> IntArray:
    if not trains:
        return np.array([(0, o) for o in range(1, most + 1)])
    return np.array([(a, o) for a in range(1, most + 1) for o in range(most - a + 1 if mixes else 1)])


def all_rows(instance: Instance, team: Team) -> list[Row] | None:
    """Every row of a team; None if there are more than a few hundred."""
    rows: list[Row] = []
    for trainers in trainers_of(instance, team):
        members = [options(instance, w in trainers, team).tolist() for w in team]
        rows += itertools.islice(_fill(instance, team, members), COMPLETE_UP_TO + 1 - len(rows))
        if len(rows) > COMPLETE_UP_TO:
            return None
    return rows


def _fill(instance: Instance, team: Team, members: Sequence[Sequence[Sequence[int]]]) -> Iterator[Row]:
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


def without(instance: Instance, row: Row, gone: int) -> Row:
    """The heads of one member go one by one to whom they make the least slow; trainers stay the others."""
    full, only = list(row.full_W), list(row.only_W)
    (a, full[gone]), (o, only[gone]) = (full[gone], 0), (only[gone], 0)
    team = [w for w in row.team if w != gone]
    trainers = [w for w in team if full[w]] or team
    for counts, able, times in ((full, trainers, a), (only, team, o)):
        for _ in range(times):
            taken = counts is full
            best = min(able, key=lambda w: (int(instance.busy_WAO[w, full[w] + taken, only[w] + (not taken)]), w))
            counts[best] += 1
    return Row(tuple(full), tuple(only))


def price(
    instance: Instance, team: Team, prices: Prices, apart: dict[Team, float], enough: float, splits: int
) -> tuple[float, list[Row]]:
    """(Lower bound of the reduced cost over all rows, good rows); `apart` is what each set of trainers costs besides.

    Cells with a bound below `enough` are split, up to `splits` times.
    """
    times = _times(instance, team)
    cells_V4 = _first_cells(instance, team, times)
    bound, rows = np.inf, list[Row]()
    for turn in range(splits + 1):
        forward_V2, backward_V2 = (ts[cells_V4[:, i : i + 2] - [0, 1]] for ts, i in zip(times, (0, 2), strict=True))
        most_V2 = np.stack([forward_V2[:, 1], backward_V2[:, 1]], axis=1)
        ways = _ways(instance, team, list(apart), prices, most_V2)
        least_V = prices.path * (forward_V2[:, 0] + backward_V2[:, 0])
        totals_TVK = np.array([_joined(way).min(axis=1) + apart[trainers] for trainers, way in ways.items()])
        totals_TVK += least_V[:, None] + prices.full_K
        for t, cell, full in _best(totals_TVK, enough):
            rows.append(_row(instance, team, list(ways.values())[t], most_V2[cell], prices, (cell, full)))
        least = totals_TVK.min(axis=(0, 2))
        wide_V = (cells_V4[:, 1] - cells_V4[:, 0] > 1) | (cells_V4[:, 3] - cells_V4[:, 2] > 1)
        order = np.argsort(least, kind="stable")
        hopeful = order[(least[order] < enough) & wide_V[order]][:SPLIT_AT_ONCE]
        if turn == splits or not len(hopeful):
            return min(bound, float(least.min())), list(dict.fromkeys(rows))
        others = np.delete(least, hopeful)
        bound = min(bound, float(others.min()) if len(others) else np.inf)
        cells_V4 = np.concatenate([_split(cell) for cell in cells_V4[hopeful]])
    raise AssertionError("the last turn returns")


def _best(totals_TVK: FloatArray, enough: float) -> list[tuple[int, int, int]]:
    """The final states that are best overall, and for each number of FULL heads: rows of all kinds are needed."""
    ranked = [int(at) for at in np.argsort(totals_TVK, axis=None, kind="stable")[:FOUND]]
    by_full_KX = np.moveaxis(totals_TVK, 2, 0).reshape(totals_TVK.shape[2], -1)
    ranked += [int(at) * len(by_full_KX) + k for k, at in enumerate(by_full_KX.argmin(axis=1))]
    good = [at for at in dict.fromkeys(ranked) if totals_TVK.flat[at] < enough]
    return [tuple(map(int, np.unravel_index(at, totals_TVK.shape))) for at in good]  # type: ignore[misc]


def _times(instance: Instance, team: Team) -> tuple[IntArray, IntArray]:
    """All times that a member's forward calls may take in one block, and its backward calls; rising."""
    forward = instance.forward_WAO[list(team)]
    backward = instance.backward_SWN[:, list(team)].sum(axis=0)
    return np.unique(forward[forward > 0]), np.unique(backward)


def _first_cells(instance: Instance, team: Team, times: tuple[IntArray, IntArray]) -> IntArray:
    """[V, 4]: of the slowest member's time, forward from and up to before which of `times`, and backward."""
    curves = (instance.forward_WAO[list(team), 0, 1:], instance.backward_SWN[:, list(team), 1:].sum(axis=0))
    ends = [
        _cuts(curves_WN, ts) if len(team) > 1 else [0, len(ts)] for curves_WN, ts in zip(curves, times, strict=True)
    ]
    pairs = itertools.product(*map(itertools.pairwise, ends))
    return np.array([[*forward, *backward] for forward, backward in pairs])


def _cuts(curves_WN: IntArray, times: IntArray) -> list[int]:
    """Ends of the first intervals: around an even share of all heads, or of a few."""
    heads = curves_WN.shape[1]
    even = heads / (heads / np.maximum(1, curves_WN[:, -1])).sum()
    return sorted({0, len(times), *map(int, np.searchsorted(times, even * CUTS))})


def _split(cell: IntArray) -> IntArray:
    forward, backward = (sorted({int(low), (int(low) + int(end)) // 2, int(end)}) for low, end in (cell[:2], cell[2:]))
    pairs = itertools.product(itertools.pairwise(forward), itertools.pairwise(backward))
    return np.array([[*f, *b] for f, b in pairs])


Stage: TypeAlias = tuple[tuple[int, bool], FloatArray]  # (a member, whether it trains), least cost [V, H+1, K]
Way: TypeAlias = tuple[list[Stage], list[Stage]]  # of one set of trainers, and of the others


def _ways(instance: Instance, team: Team, sets: Sequence[Team], prices: Prices, most_V2: IntArray) -> dict[Team, Way]:
    """Stages for every set of trainers: these from the fastest on, the others from the slowest on."""
    known: dict[tuple[tuple[int, bool], ...], FloatArray] = {}
    order = by_speed(instance, team)

    def stages(roles: Sequence[tuple[int, bool]], width: int) -> list[Stage]:
        start = np.full((len(most_V2), instance.num_heads + 1, width), np.inf)
        start[:, 0, 0] = 0.0
        out: list[Stage] = [((-1, False), start)]
        for place, role in enumerate(roles):
            path = tuple(roles[: place + 1])
            if path not in known:
                known[path] = _next_stage(instance, team, out[-1][1], role, most_V2, prices.cost_WAO[role[0]])
            out.append((role, known[path]))
        return out

    return {
        trainers: (
            stages([(w, True) for w in order if w in trainers], len(prices.full_K)),
            stages([(w, False) for w in reversed(order) if w not in trainers], 1),
        )
        for trainers in sets
    }


def _joined(way: Way) -> FloatArray:
    """[V, H+1, K]: least cost where trainers have so many of the heads, K of them FULL, and the others the rest."""
    result: FloatArray = way[0][-1][1] + way[1][-1][1][:, ::-1]
    return result


def _next_stage(
    instance: Instance, team: Team, before: FloatArray, role: tuple[int, bool], most_V2: IntArray, cost_AO: FloatArray
) -> FloatArray:
    after = np.full_like(before, np.inf)
    size, width = before.shape[1:]
    costs_VS = _costs(instance, team, role, most_V2, cost_AO)
    for s, (a, o) in enumerate(options(instance, role[1], team).tolist()):
        heads, full = a + o, a if width > 1 else 0
        target = after[:, heads:, full:]
        np.minimum(target, before[:, : size - heads, : width - full] + costs_VS[:, s, None, None], out=target)
    return after


def _costs(
    instance: Instance, team: Team, role: tuple[int, bool], most_V2: IntArray, cost_AO: FloatArray
) -> FloatArray:
    """[V, options]: what a member's share costs, infinite in cells where the member may not have it."""
    worker, (a, o) = role[0], options(instance, role[1], team).T
    fits_VS = instance.forward_WAO[worker, a, o] <= most_V2[:, 0, None]
    fits_VS &= instance.backward_SWN[:, worker, a].sum(axis=0) <= most_V2[:, 1, None]
    return np.where(fits_VS, cost_AO[a, o], np.inf)


def _row(instance: Instance, team: Team, way: Way, most_2: IntArray, prices: Prices, end: tuple[int, int]) -> Row:
    """The row behind a final state."""
    index, full = end
    heads = int(_joined(way)[index, :, full].argmin())
    found = _trace(instance, team, way[0], most_2, prices, (index, heads, full))
    found |= _trace(instance, team, way[1], most_2, prices, (index, instance.num_heads - heads, 0))
    return spelled(instance, team, [found[w] for w in team])


def _trace(
    instance: Instance, team: Team, stages: Sequence[Stage], most_2: IntArray, prices: Prices, end: tuple[int, int, int]
) -> dict[int, tuple[int, int]]:
    """The shares behind an end of these stages, found by walking back through them."""
    (index, heads, full), static = end, len(prices.full_K) > 1
    found: dict[int, tuple[int, int]] = {}
    for (_, before), (role, after) in reversed(list(itertools.pairwise(stages))):
        shares = options(instance, role[1], team)
        own = _costs(instance, team, role, most_2[None], prices.cost_WAO[role[0]])[0]
        heads_S, full_S = heads - shares.sum(axis=1), full - shares[:, 0] * static
        own[(heads_S < 0) | (full_S < 0)] = np.inf
        came_S = own + before[index, np.maximum(heads_S, 0), np.maximum(full_S, 0)]
        best = int(np.abs(came_S - after[index, heads, full]).argmin())
        found[role[0]] = (int(shares[best, 0]), int(shares[best, 1]))
        heads, full = int(heads_S[best]), int(full_S[best])
    return found
