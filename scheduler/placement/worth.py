"""How many FULL heads each block may have: what a choice loses against the worthiest heads overall.

The worth of the k best heads of a block is concave in k. With τ the worth at which the overall choice stops, a block
with k FULL heads loses (best − k*·τ) − (worth of its k best − k·τ) ≥ 0; as the number of FULL heads is fixed, these
losses add up to what a whole choice loses.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scheduler.domain import IntArray, StaticPart
from scheduler.placement.instance import Instance

SCALE = 10_000  # of the mean worth: losses become integers


@dataclass(frozen=True, eq=False)
class Losses:
    """`loss_LK[l, k]` of k FULL heads in block l; together they may lose `slack`. `best_L` loses nothing."""

    loss_LK: IntArray
    slack: int
    best_L: tuple[int, ...]

    def choices(self, block: int) -> list[int]:
        """Numbers of FULL heads that this block could have, were all others at their best."""
        return [int(k) for k in np.flatnonzero(self.loss_LK[block] <= self.slack)]


def losses_of(instance: Instance) -> Losses | None:
    """None without a static part."""
    static = instance.static
    if static is None:
        return None
    worth_LH = -np.sort(-np.asarray(static.worth_LH, dtype=np.float64), axis=1)
    flat = -np.sort(-worth_LH.ravel())
    stop = flat[min(static.num_full, flat.size - 1)]
    gains_LK = np.concatenate([np.zeros((len(worth_LH), 1)), np.cumsum(worth_LH - stop, axis=1)], axis=1)
    unit = max(float(np.abs(worth_LH).mean()), 1e-12) / SCALE
    loss_LK = np.rint((gains_LK.max(axis=1, keepdims=True) - gains_LK) / unit).astype(np.int64)
    best = float(flat[: static.num_full].sum())
    return Losses(
        loss_LK,
        int(max(static.tolerance * best, 0.0) / unit) + len(worth_LH),
        tuple(map(int, worthiest(static).sum(axis=1))),
    )


def full_heads(static: StaticPart, full_L: IntArray) -> np.ndarray:
    """Marks [L, H] of the worthiest heads of every block, as many as `full_L` says."""
    worth_LH = np.asarray(static.worth_LH)
    rank_LH = np.argsort(np.argsort(-worth_LH, axis=1, kind="stable"), axis=1, kind="stable")
    return np.asarray(rank_LH < full_L[:, None])


def worthiest(static: StaticPart) -> np.ndarray:
    """Marks [L, H] of the heads worth most of all."""
    worth = np.asarray(static.worth_LH)
    marks = np.zeros(worth.size, dtype=np.bool_)
    marks[np.argsort(-worth.ravel(), kind="stable")[: static.num_full]] = True
    return marks.reshape(worth.shape)
