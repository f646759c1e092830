"""Scores: what one op of a head is worth, from sums that the workers measured.

| score | worth of FULL over FORWARD (`backward_LH`) | worth of FORWARD over SKIP (`forward_LH`) |
|---|---|---|
| fisher | empirical Fisher of a gate on the head: mean over images of (∂loss/∂gate)² | size of its weights |
| gradient | norm of the gradient of its weights, mean over micro-batches | size of its weights |
| taylor | what losing it changes, to first order: mean over images of abs(∂loss/∂gate) | the same |
| weight | size of its weights: root of their mean square | the same |
| activation | norm of what it adds to the residual stream, mean over images and tokens | the same |
| random | drawn from the seed | drawn from the seed |

fisher and gradient say how much there is to learn and nothing of what a head contributes, so that its weights speak for
its forward pass; the other measures are of the contribution itself. Taylor: Molchanov et al. 2017, Michel et al. 2019.

Worths are normalised to mean 1 over the heads, so that those of the two kinds add up. Single images are normalised too
before they are averaged into a micro-batch: a hard image raises all heads alike, by factors of thousands, and would
otherwise be the only one that counts.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from scheduler.domain import FloatArray, Scores
from scheduler.errors import UserError

KINDS = ("fisher", "gradient", "taylor", "weight", "activation", "random")
BY_SAMPLE = ("fisher", "taylor")  # made of slopes of single images, which every backward pass of a FULL head yields
FRESH = 0.5  # share of the newest measurement in a moving average


def make_scores(
    kind: str,
    backward_LH: npt.ArrayLike,
    forward_LH: npt.ArrayLike,
    seed: int,
    worth_TLHM: npt.ArrayLike | None = None,
) -> Scores:
    """Scores of the named kind from merged means; `worth_TLHM` counts for the kinds in `BY_SAMPLE` alone.

    Raises UserError for a kind that is not in `KINDS`.
    """
    if kind not in KINDS:
        raise UserError(
            f"'{kind}' is not a score.",
            code="unknown_score",
            param="method.score",
            remedy=f"Use one of {', '.join(KINDS)}.",
        )
    forward = normalise(forward_LH)
    if kind == "random":
        drawn_2LH = np.random.default_rng(seed).random((2, *forward.shape))
        return Scores(normalise(drawn_2LH[0]), normalise(drawn_2LH[1]))
    by_sample = None if worth_TLHM is None or kind not in BY_SAMPLE else normalise(worth_TLHM, (1, 2))
    return Scores(normalise(backward_LH), forward, by_sample)


def worth_of(slopes: npt.ArrayLike, kind: str) -> FloatArray:
    """The worth that slopes ∂loss/∂gate of single images stand for, under a kind in `BY_SAMPLE`."""
    values = np.asarray(slopes, dtype=np.float64)
    with np.errstate(over="ignore"):
        return np.square(values) if kind == "fisher" else np.abs(values)


def merge(partials: Iterable[tuple[npt.ArrayLike, npt.ArrayLike]]) -> FloatArray:
    """Mean per sample from (sums [L, H], samples) of several workers; NaN where no worker saw a sample.

    `samples` is a number, or one for each head: of its FULL heads alone, say, and of those that it owns.
    """
    pairs = [(np.asarray(sums, dtype=np.float64), np.asarray(samples)) for sums, samples in partials]
    summed: FloatArray = np.sum([sums for sums, _ in pairs], axis=0)
    counts = np.sum([np.broadcast_to(samples, sums.shape) for sums, samples in pairs], axis=0)
    return np.divide(summed, counts, out=np.full_like(summed, np.nan), where=counts > 0)


def refresh(
    worth: npt.ArrayLike, fresh: npt.ArrayLike, rate: npt.ArrayLike = FRESH, axes: tuple[int, ...] = (-2, -1)
) -> FloatArray:
    """Moving average of a worth; where `fresh` is unknown (None or not finite), the old worth stays.

    `fresh` is first scaled to the old level of the heads that it knows: a falling loss shrinks the worth of all heads
    that are measured, and the others would come to look worthy by comparison. `axes` are those of the heads.
    """
    old, new = _finite(worth), np.asarray(fresh, dtype=np.float64)
    known = np.isfinite(new)
    new = _finite(new)
    level = new.sum(axes, keepdims=True)
    old_level = np.where(known, old, 0.0).sum(axes, keepdims=True)
    scale = np.divide(old_level, level, out=np.zeros_like(level), where=level > 0)
    return np.where(known & (level > 0), old + np.asarray(rate) * (new * scale - old), old)


def normalise(worth: npt.ArrayLike, axes: tuple[int, ...] = (0, 1)) -> FloatArray:
    """Scale to mean 1 over `axes`, those of the heads: for every micro-batch [T, L, H, M] or image [N, L, H], (1, 2).

    What is unknown or not finite counts as zero, and all-zero becomes all-one: no head is better known than another.
    """
    finite = _finite(worth)
    top = finite.max(axes, keepdims=True, initial=0.0)
    scaled = np.divide(finite, top, out=np.ones_like(finite), where=top > 0)  # sums of very large worths are finite too
    return scaled / scaled.mean(axes, keepdims=True)


def _finite(worth: npt.ArrayLike) -> FloatArray:
    values = np.asarray(worth, dtype=np.float64)
    return np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0).clip(min=0.0)
