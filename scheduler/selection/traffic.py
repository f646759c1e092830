"""Counts the bytes of a step ten times as fast as `transfers.step_bytes`, so that a search can try many selections.

It follows the rules of `transfers` (lazy residual, swap or gather, roots that rotate) but builds no instructions and
keeps no track of links. A test holds the two equal, and what a search accepts is measured by `step_bytes` again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scheduler.cost import residual_bytes, tally_bytes, trunk_bytes
from scheduler.domain import SUBLAYERS, IntArray, ModelShape, Op, OpTable, Placement, StepShape
from scheduler.program import EMBED_UNIT

Workers = list[int]


class Traffic:
    """The counter for one placement."""

    def __init__(self, placement: Placement, shape: ModelShape, step: StepShape, embed_grad: bool) -> None:
        workers = np.arange(placement.num_workers)
        self.owns_LWH = (placement.owner_LH[:, None, :] == workers[None, :, None]).astype(np.int64)
        self.embedders = sorted(placement.embedders)
        self.classifier = placement.classifier
        self.embed_grad = embed_grad
        self.residual_bytes = residual_bytes(shape, step)
        self.tally_bytes = len(workers) * (len(workers) - 1) * tally_bytes(step)
        embed, norms = (trunk_bytes(shape, step, [unit]) for unit in (EMBED_UNIT, 0))
        self.embed_bytes = 2 * (len(self.embedders) - 1) * embed * embed_grad
        self.norm_bytes_L = 2 * (self.owns_LWH.any(axis=2).sum(axis=1) - 1) * norms

    def step_bytes(self, ops_LHM: OpTable) -> int:
        """Bytes of one step over all links."""
        runs_LWM = self.owns_LWH @ (ops_LHM > Op.SKIP) > 0
        trains_LWM = self.owns_LWH @ (ops_LHM == Op.FULL) > 0
        running: IntArray = np.flatnonzero(runs_LWM.any(axis=(0, 1)))  # the others sit out
        sent = sum(self.messages(runs_LWM[:, :, m], trains_LWM[:, :, m], m) for m in running.tolist())
        norms = int(self.norm_bytes_L[trains_LWM.any(axis=(1, 2))].sum())
        return sent * self.residual_bytes + norms + self.embed_bytes * bool(len(running)) + self.tally_bytes

    def messages(self, runs_LW: np.ndarray, trains_LW: np.ndarray, mb: int) -> int:
        """Messages of x, its gradient and their parts for one micro-batch."""
        blocks = np.flatnonzero(runs_LW.any(axis=1))
        runs = [np.flatnonzero(runs_LW[b]).tolist() for b in blocks for _ in SUBLAYERS]
        trains = [np.flatnonzero(trains_LW[b]).tolist() for b in blocks for _ in SUBLAYERS]
        first = runs[0] if runs else [self.classifier]
        start = [w for w in first if w in self.embedders] or [_pick(self.embedders, mb)]
        up = _walk(start, runs, trains, [self.classifier], mb)
        trained = [workers for workers in trains if workers][::-1]
        if not self.embed_grad:
            return up + _walk([self.classifier], trained, trained, None, mb)
        near = [w for w in start if trained and w in trained[-1]]
        return up + _walk([self.classifier], trained, trained, [_pick(near or start, mb)], mb)


def _walk(
    holders: Workers, members: Sequence[Workers], preferred: Sequence[Workers], end: Workers | None, mb: int
) -> int:
    """Messages on the way through sub-layers to `end`; with None, the last one's sum is not needed."""
    sent = 0
    for index, here in enumerate(members):
        sent += sum(w not in holders for w in here)
        holders = here
        last = index + 1 == len(members)
        if last and end is None:
            return sent
        after = end if last else members[index + 1]
        if len(here) == 2 and set(here) <= set(after or ()):
            sent += 2
        else:
            holders = [_root(here, preferred[index], after or [], mb)]
            sent += len(here) - 1
    return sent + sum(w not in holders for w in end or [])


def _root(here: Workers, preferred: Workers, after: Workers, mb: int) -> int:
    going_on = [w for w in preferred if w in after] or preferred or [w for w in here if w in after]
    return _pick(going_on or here, mb)


def _pick(workers: Workers, mb: int) -> int:
    return workers[mb % len(workers)]
