"""Scores: merged by samples, normalised, refreshed, and safe for what workers may send."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from scheduler.errors import UserError
from scheduler.scores import BY_SAMPLE, KINDS, make_scores, merge, normalise, refresh, worth_of

BACKWARD = np.array([[1.0, 3.0], [0.0, 4.0]])
FORWARD = np.array([[2.0, 2.0], [1.0, 3.0]])
ANYTHING = st.floats(allow_nan=True, allow_infinity=True)


def test_merging_weighs_workers_by_their_samples() -> None:
    merged = merge([(BACKWARD, 1), (3 * BACKWARD, 3)])
    assert merged.tolist() == BACKWARD.tolist()


def test_merging_counts_samples_head_by_head() -> None:
    merged = merge([([[6.0, 0.0]], [[3, 0]]), ([[0.0, 8.0]], [[0, 4]])])
    assert merged.tolist() == [[2.0, 2.0]]


def test_what_no_worker_saw_is_unknown() -> None:
    assert np.isnan(merge([(np.zeros((2, 2)), 0)])).all()
    assert np.isnan(merge([([[1.0, 0.0]], [[1, 0]])])).tolist() == [[False, True]]


@pytest.mark.parametrize("worth", [np.zeros((2, 3)), np.full((2, 3), np.nan), np.full((2, 3), 7.0), [[None] * 3] * 2])
def test_heads_that_nothing_tells_apart_are_all_worth_one(worth) -> None:
    assert normalise(worth).tolist() == np.ones((2, 3)).tolist()


@given(worth=arrays(np.float64, (2, 3), elements=ANYTHING))
def test_normalised_worths_are_finite_with_mean_one_whatever_comes(worth: np.ndarray) -> None:
    found = normalise(worth)
    assert np.isfinite(found).all() and (found >= 0).all()
    assert found.mean() == pytest.approx(1.0)


@given(worth=arrays(np.float64, (2, 3, 4, 5), elements=ANYTHING))
def test_every_micro_batch_has_mean_one(worth: np.ndarray) -> None:
    found = make_scores("fisher", np.ones((3, 4)), np.ones((3, 4)), 0, worth).backward_TLHM
    assert found is not None
    np.testing.assert_allclose(found.mean(axis=(1, 2)), 1.0)


def test_backward_and_forward_worth_keep_their_places() -> None:
    scores = make_scores("fisher", BACKWARD, FORWARD, seed=0)
    assert scores.backward_LH.tolist() == (BACKWARD / 2).tolist()
    assert scores.forward_LH.tolist() == (FORWARD / 2).tolist()
    assert scores.backward_TLHM is None


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_mean_one_and_follows_its_seed(kind: str) -> None:
    first, again = (make_scores(kind, BACKWARD, FORWARD, seed=3) for _ in range(2))
    for ours, theirs in ((first.backward_LH, again.backward_LH), (first.forward_LH, again.forward_LH)):
        assert ours.mean() == pytest.approx(1.0)
        assert ours.tolist() == theirs.tolist()


def test_random_looks_at_nothing_but_its_seed() -> None:
    one, other, third = (make_scores("random", b, FORWARD, s) for b, s in ((BACKWARD, 1), (FORWARD, 1), (BACKWARD, 2)))
    assert one.backward_LH.tolist() == other.backward_LH.tolist() != third.backward_LH.tolist()
    assert one.backward_LH.tolist() != one.forward_LH.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_only_scores_of_single_images_know_micro_batches(kind: str) -> None:
    scores = make_scores(kind, BACKWARD, FORWARD, 0, np.ones((1, 2, 2, 3)))
    assert (scores.backward_TLHM is not None) == (kind in BY_SAMPLE)


def test_fisher_squares_slopes_and_taylor_takes_their_size() -> None:
    assert worth_of([-3.0, 2.0], "fisher").tolist() == [9.0, 4.0]
    assert worth_of([-3.0, 2.0], "taylor").tolist() == [3.0, 2.0]


def test_a_refresh_leaves_what_it_does_not_know() -> None:
    fresh = [[None, 6.0], [float("nan"), 1.0]]
    found = refresh(BACKWARD, fresh, rate=0.5)
    assert found[:, 0].tolist() == BACKWARD[:, 0].tolist()
    assert found[:, 1].tolist() == [4.5, 2.5]  # 6 and 1 on the old level of 3 and 4 are 6 and 1


@given(factor=st.floats(1e-6, 1e6), rate=st.floats(0, 1))
def test_a_refresh_does_not_care_how_far_the_loss_has_fallen(factor: float, rate: float) -> None:
    fresh = np.array([[2.0, 5.0], [np.nan, 1.0]])
    np.testing.assert_allclose(refresh(BACKWARD, factor * fresh, rate), refresh(BACKWARD, fresh, rate))
    assert refresh(BACKWARD, fresh, rate).sum() == pytest.approx(BACKWARD.sum())


@pytest.mark.parametrize("fresh", [np.full((2, 2), np.nan), np.zeros((2, 2)), np.full((2, 2), np.inf)])
def test_a_refresh_that_knows_nothing_changes_nothing(fresh: np.ndarray) -> None:
    assert refresh(BACKWARD, fresh).tolist() == BACKWARD.tolist()


def test_an_unknown_score_is_named() -> None:
    with pytest.raises(UserError, match="'magnitude' is not a score"):
        make_scores("magnitude", BACKWARD, FORWARD, seed=0)
