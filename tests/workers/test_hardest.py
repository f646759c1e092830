"""Images sorted by what they lost last: unseen ones first, the same images in every step, learned where they ran."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from workers.hardest import HardestFirst
from workers.order import MicroBatches

NUM_TRAIN, BATCH, NUM = 40, 4, 5


def loss_of(indices):
    """A loss that only the image decides, and different for all."""
    return (np.asarray(indices) * 7 % NUM_TRAIN).astype(float)


@given(ran=st.integers(1, NUM), seed=st.integers(0, 1000))
def test_steps_hold_their_images_hardest_first(ran, seed):
    plain = MicroBatches(NUM_TRAIN, BATCH, NUM, seed)
    order, seen = HardestFirst(plain), set()
    for step in range(4 * plain.steps_per_epoch):
        micro_batches = order.indices(step)
        flat = np.concatenate(micro_batches)
        assert sorted(flat) == sorted(np.concatenate(plain.indices(step)))
        unseen = [index not in seen for index in flat]
        assert unseen == sorted(unseen, reverse=True)
        known = loss_of(flat[sum(unseen) :])
        assert (np.diff(known) < 0).all()
        assert all((a == b).all() for a, b in zip(order.indices(step), micro_batches, strict=True))
        order.learn(step, np.stack([loss_of(indices) for indices in micro_batches]), range(ran))
        seen |= set(flat[: ran * BATCH].tolist())


def test_an_image_that_sits_out_is_first_in_the_next_epoch():
    order = HardestFirst(MicroBatches(20, BATCH, NUM, seed=1))
    first = np.concatenate(order.indices(0))
    order.learn(0, np.ones((NUM, BATCH)), range(3))
    assert set(first[12:]) == set(np.concatenate(order.indices(1))[:8])


def test_what_a_micro_batch_that_sat_out_lost_is_not_believed():
    order = HardestFirst(MicroBatches(NUM_TRAIN, BATCH, NUM, seed=0))
    order.indices(0)
    order.learn(0, np.zeros((NUM, BATCH)), ())
    assert np.isinf(order.loss_N).all()
