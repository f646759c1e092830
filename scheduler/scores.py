"""Scores: what one op of a head is worth, from sums that the workers measured.

| score | worth of FULL over FORWARD (`backward_LH`) | worth of FORWARD over SKIP (`forward_LH`) |
|---|---|---|
| fisher | empirical Fisher of a gate on the head: mean over samples of (∂loss/∂gate)² | magnitude of its weights |
| magnitude | magnitude of its weights | magnitude of its weights |
| random | drawn from the seed | drawn from the seed |

Both are normalised to mean 1: a hard image raises the Fisher of all heads alike, and worths of the two kinds add up.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from scheduler.domain import Scores
from scheduler.errors import UserError

FloatArray = npt.NDArray[np.float64]
KINDS = ("fisher", "magnitude", "random")


def make_scores(kind: str, fisher_LH: npt.ArrayLike, magnitude_LH: npt.ArrayLike, seed: int) -> Scores:
    """Scores of the named kind; `fisher_LH` are merged means, `magnitude_LH` norms of weights.

    Raises UserError for a kind that is not in `KINDS`.
    """
    magnitude = normalise(magnitude_LH)
    if kind == "fisher":
        return Scores(normalise(fisher_LH), magnitude)
    if kind == "magnitude":
        return Scores(magnitude, magnitude)
    if kind == "random":
        drawn_2LH = np.random.default_rng(seed).random((2, *magnitude.shape))
        return Scores(normalise(drawn_2LH[0]), normalise(drawn_2LH[1]))
    raise UserError(
        f"'{kind}' is not a score.",
        code="unknown_score",
        param="method.score",
        remedy=f"Use one of {', '.join(KINDS)}.",
    )


def merge(partials: Iterable[tuple[npt.ArrayLike, int]]) -> FloatArray:
    """Mean per sample from (sums [L, H], number of samples) of several workers; zero where no worker saw a sample.

    Workers may report sums of their own heads alone (zeros elsewhere) when all saw the same samples: then give each
    the count of samples divided by the number of workers that share them.
    """
    pairs = [(np.asarray(sums, dtype=np.float64), count) for sums, count in partials]
    total = sum(count for _, count in pairs)
    summed: FloatArray = np.sum([sums for sums, _ in pairs], axis=0)
    return summed / total if total else np.zeros_like(summed)


def normalise(worth_LH: npt.ArrayLike) -> FloatArray:
    """Scale to mean 1; what is not finite counts as zero, and all-zero becomes all-one (no head is better known)."""
    worth = np.nan_to_num(np.asarray(worth_LH, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0).clip(min=0.0)
    mean = float(worth.mean()) if worth.size else 0.0
    return worth / mean if mean > 0 else np.ones_like(worth)
