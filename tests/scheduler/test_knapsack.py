"""The held knapsack equals brute force on tiny instances, shares FULL heads evenly, and is the same every time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.domain import Placement
from scheduler.knapsack import SUM_MESSAGES, hold, shares

PLACEMENTS = [
    Placement(np.array([[0, 0, 1, 1]] * 2), 2, 1),
    Placement(np.array([[0, 0, 0, 0], [1, 1, 1, 1]]), 2, 1),
    Placement(np.array([[0, 1, 1, 1], [1, 1, 0, 2]]), 3, 2),
    Placement(np.array([[0, 1, 0], [1, 0, 1], [0, 0, 1]]), 2, 0),
]


def messages(full_LH: np.ndarray, placement: Placement) -> int:
    """What the charge counts, written out."""
    total, above = 0, {placement.classifier}
    for block in reversed(range(len(full_LH))):
        trains = {int(w) for w in placement.owner_LH[block][full_LH[block]]}
        total += SUM_MESSAGES * max(0, len(trains) - 1) + len(trains - above)
        above = trains or above
    return total


def brute_force(worth_LH: np.ndarray, placement: Placement, total: int, price: float) -> float:
    best = -np.inf
    limits = shares(placement, total)
    for chosen in itertools.combinations(range(worth_LH.size), total):
        full = np.zeros(worth_LH.size, dtype=bool)
        full[list(chosen)] = True
        counts = np.bincount(placement.owner_LH.ravel()[full], minlength=placement.num_workers)
        if all(least <= n <= most for n, (least, most) in zip(counts, limits, strict=True)):
            full_LH = full.reshape(worth_LH.shape)
            best = max(best, float(worth_LH[full_LH].sum()) - price * messages(full_LH, placement))
    return best


@settings(max_examples=40, deadline=None)
@given(
    placement=st.sampled_from(PLACEMENTS),
    part=st.floats(0.1, 1.0),
    price=st.sampled_from([0.0, 0.1, 1.0, 20.0]),
    seed=st.integers(0, 10_000),
)
def test_it_equals_brute_force(placement: Placement, part: float, price: float, seed: int) -> None:
    worth = np.random.default_rng(seed).exponential(size=placement.owner_LH.shape).round(4)
    total = max(1, int(part * worth.size))
    held = hold(worth, placement, total, price)
    assert held.status == "OPTIMAL"
    assert held.objective == pytest.approx(brute_force(worth, placement, total, price), abs=1e-6)
    assert held.bound == pytest.approx(held.objective, abs=1e-6)
    assert held.full_LH.sum() == total


@given(total=st.integers(0, 8), placement=st.sampled_from(PLACEMENTS[:3]))
def test_shares_are_rounded_parts_of_what_a_worker_owns(total: int, placement: Placement) -> None:
    limits = shares(placement, total)
    assert sum(least for least, _ in limits) <= total <= sum(most for _, most in limits)
    assert all(most - least <= 1 for least, most in limits)


def test_a_price_gathers_full_heads_on_one_worker_per_block() -> None:
    placement = Placement(np.tile([0, 0, 0, 1, 1, 1], (6, 1)), 2, 1)
    worth = np.random.default_rng(1).exponential(size=(6, 6))
    free, dear = hold(worth, placement, 18, 0.0), hold(worth, placement, 18, 50.0)
    assert messages(dear.full_LH, placement) < messages(free.full_LH, placement)
    assert all(len(set(placement.owner_LH[b][dear.full_LH[b]])) == 1 for b in range(6))


def test_equal_worths_give_the_same_heads_every_time() -> None:
    placement = PLACEMENTS[0]
    first, again = (hold(np.ones((2, 4)), placement, 4, 0.5).full_LH for _ in range(2))
    assert (first == again).all()


def test_more_heads_than_there_are_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="9 heads"):
        hold(np.ones((2, 4)), PLACEMENTS[0], 9)
