"""Scores: merged by samples, normalised, and safe for what workers may send."""

from __future__ import annotations

import numpy as np
import pytest

from scheduler.errors import UserError
from scheduler.scores import KINDS, make_scores, merge, normalise

FISHER = np.array([[1.0, 3.0], [0.0, 4.0]])
MAGNITUDE = np.array([[2.0, 2.0], [1.0, 3.0]])


def test_merging_weighs_workers_by_their_samples() -> None:
    merged = merge([(FISHER, 1), (3 * FISHER, 3)])
    assert merged.tolist() == FISHER.tolist()


def test_merging_nothing_gives_zero() -> None:
    assert merge([(np.zeros((2, 2)), 0)]).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("worth", [np.zeros((2, 3)), np.full((2, 3), np.nan), np.full((2, 3), 7.0)])
def test_heads_that_nothing_tells_apart_are_all_worth_one(worth: np.ndarray) -> None:
    assert normalise(worth).tolist() == np.ones((2, 3)).tolist()


def test_fisher_ranks_backward_and_magnitude_ranks_forward() -> None:
    scores = make_scores("fisher", FISHER, MAGNITUDE, seed=0)
    assert scores.backward_LH.tolist() == (FISHER / 2).tolist()
    assert scores.forward_LH.tolist() == (MAGNITUDE / 2).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_mean_one_and_follows_its_seed(kind: str) -> None:
    first, again = (make_scores(kind, FISHER, MAGNITUDE, seed=3) for _ in range(2))
    for ours, theirs in ((first.backward_LH, again.backward_LH), (first.forward_LH, again.forward_LH)):
        assert ours.mean() == pytest.approx(1.0)
        assert ours.tolist() == theirs.tolist()


def test_an_unknown_score_is_named() -> None:
    with pytest.raises(UserError, match="'taylor' is not a score"):
        make_scores("taylor", FISHER, MAGNITUDE, seed=0)
