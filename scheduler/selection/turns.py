"""Turns: what heads are worth from table to table where nothing is held still, so that all of them get their turn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scheduler.domain import FloatArray, IntArray, Op, OpTable, Placement, Scores
from scheduler.selection.assign import Items
from scheduler.selection.words import PERIOD, SelectionRequest, Unit

MUST = 8.0  # times the greatest worth: what an item counts that has to be trained now


class Turns:
    """Worth by table: every unit is due at least once in `PERIOD` tables, the others go by worth.

    Where micro-batches have no worth of their own, a unit is worth more the longer it waits and a bit more or less by
    chance for each micro-batch: so heads take turns in proportion to their worth.
    """

    def __init__(self, request: SelectionRequest, placement: Placement, scores: Scores, units: Sequence[Unit]) -> None:
        self.request, self.placement, self.scores, self.units = request, placement, scores, units
        self.known = scores.backward_TLHM is not None
        self.group_LH = group_numbers(request, placement)
        self.waited_U = np.zeros(len(units))
        self.owed = set(range(len(units)))
        self.unit_LH = np.zeros(placement.owner_LH.shape, dtype=np.int64)
        for index, unit in enumerate(units):
            self.unit_LH[unit.block, list(unit.heads)] = index

    def backward(self, table: int, micro_batches: int) -> FloatArray:
        """[L, H, M] worth of training."""
        if self.scores.backward_TLHM is not None:
            return self.scores.backward_TLHM[table]
        rng = np.random.default_rng((*self.request.key, 2, table))
        chance_UM = 0.5 + rng.random((len(self.units), micro_batches))
        waiting_LH = self.scores.backward_LH * (1 + self.waited_U[self.unit_LH])
        result: FloatArray = waiting_LH[:, :, None] * chance_UM[self.unit_LH]
        return result

    def due(self, table: int, backward_LHM: FloatArray) -> FloatArray:
        """A worth beyond all others for the best micro-batch of units that must be trained in this table."""
        if table % PERIOD == 0:
            self.owed = set(range(len(self.units)))
        due_LHM = np.zeros_like(backward_LHM)
        quota = -(-len(self.owed) // (PERIOD - table % PERIOD))
        worth = {u: float(backward_LHM[self.units[u].block, list(self.units[u].heads)].sum()) for u in self.owed}
        for index in sorted(self.owed, key=lambda u: (-worth[u], u))[:quota]:
            unit = self.units[index]
            best = int(np.argmax(backward_LHM[unit.block, list(unit.heads)].sum(axis=0)))
            due_LHM[unit.block, list(unit.heads), best] = MUST * float(backward_LHM.max())
        return due_LHM

    def note(self, ops_LHM: OpTable) -> None:
        """Remember who was trained."""
        trained = np.unique(self.unit_LH[(ops_LHM == Op.FULL).any(axis=2)])
        self.waited_U += 1
        self.waited_U[trained] = 0
        self.owed -= set(trained.tolist())


def group_numbers(request: SelectionRequest, placement: Placement) -> IntArray:
    """[L, H] number of the unit that a head belongs to."""
    blocks, heads = placement.owner_LH.shape
    if not request.coherent:
        return np.arange(blocks * heads).reshape(blocks, heads)
    group_LH: IntArray = np.arange(blocks)[:, None] * placement.num_workers + placement.owner_LH
    return group_LH


def items_of(
    forward_I: FloatArray,
    backward_I: FloatArray,
    group_I: IntArray,
    num_full: int,
    num_run: int,
    train_together: bool = False,
) -> Items:
    """Groups are numbered from 0; those that train together count with their mean worth."""
    group_I = np.unique(group_I, return_inverse=True)[1].ravel().astype(np.int64)
    if train_together:
        size = np.bincount(group_I)
        forward_I, backward_I = ((np.bincount(group_I, w) / size)[group_I] for w in (forward_I, backward_I))
    return Items(forward_I, backward_I, group_I, num_full, num_run, train_together)
