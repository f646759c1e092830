"""Which heads go to whom, once every worker's counts are known: worth first, then as few moves as the counts allow."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from ortools.graph.python import linear_sum_assignment

from scheduler.domain import BoolArray, IntArray, Placement, Scores
from scheduler.placement.instance import Row


def arrange(rows: Sequence[Row], full_LH: BoolArray, current: Placement) -> list[Row]:
    """Exchange the rows of blocks in one run that have as many FULL heads: those where most heads can stay."""
    out = list(rows)
    places: dict[tuple[int, int], list[int]] = {}
    run = -1
    for _, group in itertools.groupby(range(len(rows)), key=lambda block: rows[block].team):
        run += 1
        for block in group:
            places.setdefault((run, rows[block].num_full), []).append(block)
    for blocks in places.values():
        solver = linear_sum_assignment.SimpleLinearSumAssignment()
        for i, block in enumerate(blocks):
            for j, other in enumerate(blocks):
                stays = _stays(rows[other], full_LH[block], current.owner_LH[block])
                solver.add_arc_with_cost(i, j, -(stays * len(blocks) + (i == j)))
        solver.solve()
        for i, block in enumerate(blocks):
            out[block] = rows[blocks[solver.right_mate(i)]]
    return out


def assign_heads(
    rows: Sequence[Row],
    full_LH: BoolArray,
    scores: Scores | None = None,
    current: Placement | None = None,
) -> IntArray:
    """Owners [L, H] from rows: FULL heads to FULL places, the others to FORWARD places.

    With `current`, every head that can stays where it is; the rest take turns by worth, so that each member of a block
    gets its part of the worthy heads.
    """
    owner_LH = np.full(full_LH.shape, -1, dtype=np.int64)
    for block, row in enumerate(rows):
        worth_H = np.zeros(full_LH.shape[1]) if scores is None else scores.backward_LH[block]
        order = np.argsort(-worth_H, kind="stable")
        for chosen_H, counts_W in ((full_LH[block], row.full_W), (~full_LH[block], row.only_W)):
            left = list(counts_W)
            heads = [int(h) for h in order if chosen_H[h]]
            if current is not None:
                for head in heads:
                    owner = int(current.owner_LH[block, head])
                    if owner < len(left) and left[owner]:
                        owner_LH[block, head] = owner
                        left[owner] -= 1
            homeless = [h for h in heads if owner_LH[block, h] < 0]
            owner_LH[block, homeless] = _turns(left, block)
    return owner_LH


def _stays(row: Row, full_H: BoolArray, owners_H: IntArray) -> int:
    """Heads that keep their owner if this block gets this row."""
    total = 0
    for chosen_H, counts_W in ((full_H, row.full_W), (~full_H, row.only_W)):
        have_W = np.bincount(owners_H[chosen_H], minlength=len(counts_W))[: len(counts_W)]
        total += int(np.minimum(have_W, counts_W).sum())
    return total


def _turns(counts_W: Sequence[int], first: int) -> list[int]:
    """Workers in the order in which they take a head: who has most of its count to go; `first` breaks ties."""
    members = [w for w, n in enumerate(counts_W) if n]
    left = {w: counts_W[w] for w in members}
    out: list[int] = []
    for _ in range(sum(counts_W)):
        best = max(members, key=lambda w: (left[w] / counts_W[w], (members.index(w) + first) % len(members)))
        left[best] -= 1
        out.append(best)
    return out
