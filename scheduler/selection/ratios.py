"""Exact ratios F:O:S: in every table the FULL, FORWARD and SKIP runs of all heads are F, O and S times their number.

| hold | FULL / FORWARD | SKIP |
|---|---|---|
| training | still for the window: each worker's most worthy heads, as many as its share | drawn for every step |
| all | one table: whole heads FULL, FORWARD and SKIP | still too |
| none | chosen for every micro-batch; all heads take turns | likewise |

What whole heads leave of a total is met by single heads that do two things.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from scheduler.cost import Costs
from scheduler.domain import BoolArray, FloatArray, IntArray, Op, OpTable, Placement, Scores
from scheduler.errors import InfeasibleError
from scheduler.selection.assign import Items, assign_by_price
from scheduler.selection.draws import Dealer, Draw, counts_over_cycle, feed, place, settle, shortest
from scheduler.selection.held import choose_full
from scheduler.selection.shares import Shares, equal_shares, timed_shares, together, whole
from scheduler.selection.strategies import Strategy, reported, strategy_of
from scheduler.selection.turns import Turns, group_numbers, items_of
from scheduler.selection.words import (
    FORWARD_WEIGHT,
    PERIOD,
    Selection,
    SelectionRequest,
    Unit,
    starving,
    worth_fraction,
)

Ratios = tuple[int, int, int]
_Found = tuple[tuple[OpTable, ...], float, str]  # cycle, bound on its worth, note
TOGETHER = 0.5  # half of the blocks follow the one below
NEAR = 0.04  # a placement's own FULL heads may end later than the shares by this, or one head if that is more


def select_ratios(
    request: SelectionRequest, placement: Placement, costs: Costs, scores: Scores, full_LH: BoolArray | None = None
) -> Selection:
    """A selection whose counts over all (head, micro-batch) are exactly the ratios, in every table.

    Raises UserError when they do not sum to the step's micro-batches, InfeasibleError when a micro-batch would train
    nothing.
    """
    began = time.perf_counter()
    ratios = request.checked_ratios(costs.step.num_micro_batches)
    strategy = strategy_of(request)
    if ratios[0] == 0:
        raise starving(ratios)
    shares = timed_shares(placement, costs, ratios) if strategy.timed else equal_shares(placement, ratios)
    case = _Case(request, strategy, placement, costs, scores, shares, ratios, full_LH)
    holds = {"training": _held_training, "all": _held_all, "none": _held_none}
    try:
        cycle, bound, note = holds[request.hold](case)
    except InfeasibleError as error:
        raise starving(ratios) from error
    seen = scores if request.hold == "none" else Scores(scores.backward_LH, scores.forward_LH)
    worth = worth_fraction(cycle, seen)
    return reported(request, strategy, cycle, worth, bound, began, note)


@dataclass(frozen=True, eq=False)
class _Case:
    """What is asked, of whom, and each worker's part of it; `given_LH` are the placement's own FULL heads, if any."""

    request: SelectionRequest
    strategy: Strategy
    placement: Placement
    costs: Costs
    scores: Scores
    shares: Shares
    ratios: Ratios
    given_LH: BoolArray | None


def _held_training(case: _Case) -> _Found:
    request, strategy, placement, shares = case.request, case.strategy, case.placement, case.shares
    full, _, skip = case.ratios
    heads, micro_batches, owned_W = placement.owner_LH.size, sum(case.ratios), placement.heads_owned
    total = min(heads, max(1, int(shares.fulls_W.sum() + 1e-6)))
    limits = whole(shares.fulls_W, total, owned_W.astype(np.float64))
    seen = strategy.sees(request, case.scores)
    note = f"{total} of {heads} heads FULL"
    if case.given_LH is not None and _fits(case.given_LH, placement, case.costs, shares, total, micro_batches):
        full_LH = case.given_LH.astype(np.bool_)
        note += ", as the placement decided"
    else:
        full_LH = choose_full(seen.backward_LH, placement, limits, total, proved=strategy.name == "cpsat").full_LH
    units = request.units(placement)
    heads_U = np.array([len(unit.heads) for unit in units])
    mean_U = shares.skips_W[[unit.worker for unit in units]]
    most_U = np.full(len(units), micro_batches - 1)
    tables = PERIOD if skip else 1
    draw = Draw(micro_batches, request.key, TOGETHER if request.coherent else 0.0)
    dealer = Dealer(units, draw, draw.rng(), apart=request.coherent)
    base_LH = np.where(full_LH, int(Op.FULL), int(Op.FORWARD)).astype(np.int8)
    rank_LH = _rank(seen.backward_LH, full_LH, placement)
    cycle = []
    for counts in counts_over_cycle(mean_U, heads_U, most_U, skip * heads, tables):
        rests_UM = dealer.deal(counts.count_U, np.ones((len(units), micro_batches), dtype=np.bool_))
        ops_LHM = np.repeat(base_LH[:, :, None], micro_batches, axis=2)
        place(ops_LHM, units, rests_UM, Op.SKIP, counts)
        cycle.append(feed(settle(ops_LHM, full * heads, rank_LH), units))
    return shortest(cycle), _training_bound(case.scores, placement, shares, limits, case.ratios), note


def _fits(
    full_LH: BoolArray, placement: Placement, costs: Costs, shares: Shares, total: int, micro_batches: int
) -> bool:
    """Whether the placement's own FULL heads are as many as asked, and let workers finish together."""
    if full_LH.shape != placement.owner_LH.shape or int(full_LH.sum()) != total:
        return False
    fulls_W = np.bincount(placement.owner_LH[full_LH], minlength=placement.num_workers)
    near = (np.abs(fulls_W - shares.fulls_W) <= 1).all()
    return bool(near) or together(placement, costs, full_LH, shares, micro_batches) <= NEAR


def _rank(worth_LH: FloatArray, full_LH: BoolArray, placement: Placement) -> FloatArray:
    """Order in which single heads make up a total: where the worker trains in the block anyway, then by worth."""
    busy_LH = np.array([[full_LH[b][row == w].any() for w in row] for b, row in enumerate(placement.owner_LH)])
    rank_LH: FloatArray = worth_LH + busy_LH * ~full_LH * (1.0 + worth_LH.max())
    return rank_LH


def _training_bound(
    scores: Scores, placement: Placement, shares: Shares, limits: Sequence[tuple[int, int]], ratios: Ratios
) -> float:
    """Worth fraction no FULL heads can exceed that keep the shares, however broken their numbers."""
    micro_batches, heads = sum(ratios), placement.owner_LH.size
    share_W = (micro_batches - shares.skips_W) / micro_batches
    left, left_W = ratios[0] * heads / micro_batches, np.array([most + 1.0 for _, most in limits])
    forward_LH = FORWARD_WEIGHT * scores.forward_LH
    worth = float((forward_LH * share_W[placement.owner_LH]).sum())
    for flat in np.argsort(-scores.backward_LH, axis=None, kind="stable"):
        owner = int(placement.owner_LH.ravel()[flat])
        part = min(1.0, left_W[owner], left / share_W[owner])
        left_W[owner] -= part
        left -= part * share_W[owner]
        worth += part * share_W[owner] * float(scores.backward_LH.ravel()[flat])
    return worth / float((forward_LH + scores.backward_LH).sum())


def _held_all(case: _Case) -> _Found:
    request, strategy, placement, shares = case.request, case.strategy, case.placement, case.shares
    full, forward, _ = case.ratios
    heads, micro_batches, owned_W = placement.owner_LH.size, sum(case.ratios), placement.heads_owned
    share_W = (micro_batches - shares.skips_W) / micro_batches
    runs_W = _rounded(owned_W * share_W, (full + forward) * heads // micro_batches, owned_W)
    fulls_W = _rounded(shares.fulls_W * share_W, full * heads // micro_batches, runs_W)
    if not fulls_W.sum():
        raise starving(case.ratios)
    seen, group_LH = strategy.sees(request, case.scores), group_numbers(request, placement)
    ops_LH = np.zeros_like(placement.owner_LH)
    for worker in range(placement.num_workers):
        mine = placement.owner_LH == worker
        if not mine.any():
            continue
        items = items_of(FORWARD_WEIGHT * seen.forward_LH[mine], seen.backward_LH[mine], group_LH[mine],
                       int(fulls_W[worker]), int(runs_W[worker]))  # fmt: skip
        ops_LH[mine] = strategy.assign(items)[0]
    ops_LHM = np.repeat(ops_LH[:, :, None], micro_batches, axis=2).astype(np.int8)
    missing = (full + forward) * heads - int((ops_LHM > 0).sum())
    if missing:
        rank_LH = np.where(ops_LH == Op.SKIP, seen.forward_LH, -np.inf)
        block, head = np.unravel_index(int(np.argmax(rank_LH)), rank_LH.shape)
        ops_LHM[block, head, :missing] = int(Op.FORWARD)
    settle(ops_LHM, full * heads, seen.backward_LH)
    note = f"{fulls_W.sum()} heads FULL, {runs_W.sum() - fulls_W.sum()} FORWARD, {heads - runs_W.sum()} SKIP"
    cycle = (ops_LHM,)
    return cycle, _free_bound(case.scores, case.ratios), note


def _held_none(case: _Case) -> _Found:
    request, strategy, placement, shares = case.request, case.strategy, case.placement, case.shares
    scores, ratios = case.scores, case.ratios
    bound = _free_bound(scores, ratios)
    if strategy.name == "uniform":
        return tuple(_rotated(request, placement, ratios)), bound, "every unit the same word, shifted by one each table"
    if strategy.name == "random":
        return tuple(_redrawn(request, placement, shares, ratios)), bound, "drawn apart on the workers of a block"
    full, forward, _ = ratios
    heads, micro_batches, owned_W = placement.owner_LH.size, sum(ratios), placement.heads_owned
    runs = micro_batches - shares.skips_W
    tables = PERIOD if scores.backward_TLHM is None else len(scores.backward_TLHM)
    units = request.units(placement)
    turns = Turns(request, placement, scores, units)
    carried = np.zeros((2, placement.num_workers))
    cycle = []
    for table in range(tables):
        carried += np.stack([owned_W * runs, shares.fulls_W * runs])
        runs_W = _rounded(carried[0], (full + forward) * heads, owned_W * micro_batches)
        fulls_W = _rounded(carried[1], full * heads, runs_W)
        carried -= np.stack([runs_W, fulls_W])
        cycle.append(feed(_turn(turns, strategy, table, fulls_W, runs_W, micro_batches), units))
    note = f"{tables} tables, " + ("by worth of their micro-batches" if turns.known else "by mean worth, in turns")
    return tuple(cycle), bound, note


def _free_bound(scores: Scores, ratios: Ratios) -> float:
    """Worth fraction that no tables with these totals exceed, whoever owns the heads and whenever they take turns."""
    micro_batches, heads = sum(ratios), scores.backward_LH.size
    tables = scores.backward_LH[None, :, :, None] if scores.backward_TLHM is None else scores.backward_TLHM
    worth = total = 0.0
    for backward_LHM in tables:
        backward_LHM = np.broadcast_to(backward_LHM, (*scores.backward_LH.shape, micro_batches))
        forward_LHM = np.broadcast_to(FORWARD_WEIGHT * scores.forward_LH[:, :, None], backward_LHM.shape)
        counts = heads * ratios[0], heads * (ratios[0] + ratios[1])
        items = Items(forward_LHM.ravel(), backward_LHM.ravel(), np.arange(backward_LHM.size), *counts)
        worth += assign_by_price(items)[1]
        total += float((forward_LHM + backward_LHM).sum())
    return worth / total


def _turn(
    turns: Turns, strategy: Strategy, table: int, fulls_W: IntArray, runs_W: IntArray, micro_batches: int
) -> OpTable:
    """One table, with exact counts for every worker."""
    backward_LHM = turns.backward(table, micro_batches)
    backward_LHM = backward_LHM + turns.due(table, backward_LHM)
    forward_LHM = np.repeat(FORWARD_WEIGHT * turns.scores.forward_LH[:, :, None], micro_batches, axis=2)
    item_LHM = turns.group_LH[:, :, None] * micro_batches + np.arange(micro_batches)
    ops_LHM = np.zeros(backward_LHM.shape, dtype=np.int8)
    for worker in np.flatnonzero(runs_W):
        mine = turns.placement.owner_LH == worker
        items = items_of(forward_LHM[mine].ravel(), backward_LHM[mine].ravel(), item_LHM[mine].ravel(),
                         int(fulls_W[worker]), int(runs_W[worker]), train_together=True)  # fmt: skip
        ops_LHM[mine] = strategy.assign(items)[0].reshape(-1, micro_batches)
    turns.note(ops_LHM)
    return ops_LHM


def _rotated(request: SelectionRequest, placement: Placement, ratios: Ratios) -> Iterator[OpTable]:
    """The word F…O…S… for every unit, shifted by one from unit to unit and from table to table."""
    word_M = np.repeat([int(Op.FULL), int(Op.FORWARD), int(Op.SKIP)], ratios)
    units = request.units(placement)
    for table in range(sum(ratios)):
        ops_LHM = np.zeros((*placement.owner_LH.shape, len(word_M)), dtype=np.int8)
        for index, unit in enumerate(units):
            ops_LHM[unit.block, list(unit.heads)] = np.roll(word_M, index + table + request.window)
        yield feed(ops_LHM, units)


def _redrawn(request: SelectionRequest, placement: Placement, shares: Shares, ratios: Ratios) -> Iterator[OpTable]:
    """Every unit draws which micro-batches it runs FULL and which it sits out; it runs the others FORWARD."""
    full, _, skip = ratios
    heads, micro_batches = placement.owner_LH.size, sum(ratios)
    units = request.units(placement)
    heads_U = np.array([len(unit.heads) for unit in units])
    worker_U = np.array([unit.worker for unit in units])
    owned_W = placement.heads_owned
    fulls_W = shares.fulls_W / np.maximum(owned_W, 1) * (micro_batches - shares.skips_W)
    draw = Draw(micro_batches, request.key, TOGETHER if request.coherent else 0.0)
    rng = draw.rng()
    resting, training = (Dealer(units, draw, rng, apart=request.coherent) for _ in range(2))
    most_U = np.full(len(units), micro_batches - 1)
    skips = counts_over_cycle(shares.skips_W[worker_U], heads_U, most_U, skip * heads, PERIOD)
    carried_U = np.zeros(len(units))
    for rests in skips:
        rests_UM = resting.deal(rests.count_U, np.ones((len(units), micro_batches), dtype=np.bool_))
        room_U = micro_batches - rests.count_U - (np.arange(len(units)) == rests.odd)
        [fulls] = counts_over_cycle(carried_U + fulls_W[worker_U], heads_U, room_U, full * heads, 1)
        carried_U = carried_U + fulls_W[worker_U] - fulls.count_U
        ops_LHM = np.full((*placement.owner_LH.shape, micro_batches), int(Op.FORWARD), dtype=np.int8)
        place(ops_LHM, units, rests_UM, Op.SKIP)
        place(ops_LHM, units, training.deal(fulls.count_U, ~rests_UM), Op.FULL)
        _rest_of(ops_LHM, units, rests.odd, rests.part, Op.SKIP)
        yield feed(settle(ops_LHM, full * heads, rng.random(placement.owner_LH.shape)), units)


def _rest_of(ops_LHM: OpTable, units: Sequence[Unit], odd: int, part: int, op: Op) -> None:
    """Part of one unit sits out one more micro-batch, to make the total exact."""
    if part:
        heads = list(units[odd].heads[-part:])
        runs = np.flatnonzero(ops_LHM[units[odd].block, heads[0]] != Op.SKIP)
        ops_LHM[units[odd].block, heads, runs[0]] = int(op)


def _rounded(share_W: FloatArray, total: int, most_W: IntArray) -> IntArray:
    """Whole numbers near the shares that sum to `total`, each at most `most_W`."""
    count_W = np.clip(np.floor(share_W + 1e-6), 0, most_W).astype(np.int64)
    while (missing := total - int(count_W.sum())) != 0:
        able = count_W < most_W if missing > 0 else count_W > 0
        rest_W = np.where(able, (share_W - count_W) * np.sign(missing), -np.inf)
        count_W[int(np.argmax(rest_W))] += int(np.sign(missing))
    return count_W
