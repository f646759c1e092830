"""The order of training images."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.order import MicroBatches

ORDER = st.builds(
    MicroBatches,
    num_train=st.integers(1, 400),
    micro_batch_size=st.integers(1, 9),
    num_micro_batches=st.integers(1, 6),
    seed=st.integers(0, 2**31 - 1),
)


@settings(max_examples=100, deadline=None)
@given(order=ORDER, step=st.integers(0, 2000))
def test_a_step_is_a_pure_function_of_its_number(order: MicroBatches, step: int) -> None:
    micro_batches = order.indices(step)
    assert [len(indices) for indices in micro_batches] == [order.micro_batch_size] * order.num_micro_batches
    flat = np.concatenate(micro_batches)
    assert flat.min() >= 0 and flat.max() < order.num_train
    other = MicroBatches(order.num_train, order.micro_batch_size, order.num_micro_batches, order.seed)
    other.indices(step + 3)
    assert np.array_equal(np.concatenate(other.indices(step)), flat)


@settings(max_examples=60, deadline=None)
@given(order=ORDER, epoch=st.integers(0, 30))
def test_an_epoch_sees_each_image_at_most_once_and_drops_less_than_a_step(order: MicroBatches, epoch: int) -> None:
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    seen = np.bincount(np.concatenate([i for step in steps for i in order.indices(step)]), minlength=order.num_train)
    size = order.micro_batch_size * order.num_micro_batches
    if order.num_train >= size:
        assert seen.max() == 1
        assert (seen == 0).sum() < size
    else:
        assert order.steps_per_epoch == 1
        assert seen.max() - seen.min() <= 1 and seen.min() >= 1


def test_epochs_and_seeds_differ_and_the_order_never_changes_between_versions() -> None:
    order = MicroBatches(800, 8, 5, seed=3)
    first, second = order.indices(0), order.indices(order.steps_per_epoch)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, MicroBatches(800, 8, 5, seed=4).indices(0))
    assert MicroBatches(10, 5, 2, seed=0).indices(0)[0].tolist() == [0, 2, 9, 1, 8]


def test_an_order_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to order"):
        MicroBatches(0, 8, 5, seed=0)
