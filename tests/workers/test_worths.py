"""Worth tables: normalised image by image, by dataset index, the same for every worker, in memory or not."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.domain import Op, Placement, uniform_ops
from scheduler.errors import SystemFault
from scheduler.scores import make_scores, normalise
from tests.workers.engine import images_and_labels, on_threads, tiny_vit
from tests.workers.test_gates import record
from workers.gates import Recorded
from workers.order import MicroBatches
from workers.partition import model_shape
from workers.scoring import gate_slopes
from workers.worths import GroupWorths, WorthTable, gather_slopes

GRID = (3, 4)
ORDER = MicroBatches(num_train=24, micro_batch_size=3, num_micro_batches=2, seed=0)


def slopes_of(num, seed=0):
    return np.random.default_rng(seed).normal(size=(num, *GRID))


def table_of(num_train=24, kind="fisher", **options):
    return WorthTable(num_train, GRID, kind, "/nowhere", **options)


@pytest.mark.parametrize("kind", ["fisher", "taylor"])
def test_a_micro_batch_is_worth_the_mean_of_its_images_each_with_mean_one(kind):
    table, slopes = table_of(kind=kind), slopes_of(24)
    table.learn(np.arange(24), slopes)
    worth_NLH = slopes**2 if kind == "fisher" else abs(slopes)
    worth_NLH /= worth_NLH.mean((1, 2), keepdims=True)
    found = table.coming(ORDER, 2, 5)
    assert found.shape == (5, *GRID, 2) and found.dtype == np.float32
    for t in range(5):
        for m, indices in enumerate(ORDER.indices(2 + t)):
            np.testing.assert_allclose(found[t, ..., m], worth_NLH[indices].mean(0), rtol=1e-5)


def test_one_hard_image_does_not_win_everything():
    table, slopes = table_of(3), np.full((3, *GRID), 0.01)
    slopes[0] *= 1000  # a million times the Fisher of the others,
    slopes[0, 0, 0] *= 3  # most of it in the head 0 of block 0;
    slopes[1:, 2, 1] *= 3  # for the others head 1 of block 2 is the worthy one
    table.learn(np.arange(3), slopes)
    [worth_LHM] = table.coming(MicroBatches(3, 3, 1, 0), 0, 1)
    assert np.unravel_index(worth_LHM.argmax(), worth_LHM.shape) == (2, 1, 0)


def test_a_shuffle_does_not_matter():
    table = table_of()
    table.learn(np.arange(12), slopes_of(12))
    one = MicroBatches(24, 1, 1, seed=7)
    singly = {int(one.indices(step)[0][0]): table.coming(one, step, 1)[0, ..., 0] for step in range(24)}
    assert len(singly) == 24
    for step in (0, 5, 11):  # of epochs 0, 1 and 2
        for m, indices in enumerate(ORDER.indices(step)):
            expected = np.mean([singly[int(index)] for index in indices], axis=0)
            np.testing.assert_allclose(table.coming(ORDER, step, 1)[0, ..., m], expected, rtol=1e-5)


def _step_of(order, index):
    return next(step for step in range(order.num_train) if order.indices(step)[0][0] == index)


def test_an_unknown_image_is_worth_the_mean_of_the_known_ones():
    table = table_of(3)
    assert (table.coming(MicroBatches(3, 1, 1, 0), 0, 3) == 1).all()
    table.learn(np.array([0, 2]), slopes_of(2))
    order = MicroBatches(3, 1, 1, 0)
    unknown = table.coming(order, _step_of(order, 1), 1)[0, ..., 0]
    known = [table.coming(order, _step_of(order, index), 1)[0, ..., 0] for index in (0, 2)]
    np.testing.assert_allclose(unknown, np.mean(known, axis=0), rtol=1e-5)
    assert table.num_known == 2


def test_an_image_seen_again_moves_half_way():
    table, first, second = table_of(1), slopes_of(1, 1), slopes_of(1, 2)
    table.learn(np.array([0]), first)
    table.learn(np.array([0]), 1e-3 * second)  # the loss has fallen
    expected = (normalise(first[0] ** 2) + normalise(second[0] ** 2)) / 2
    np.testing.assert_allclose(table.coming(MicroBatches(1, 1, 1, 0), 0, 1)[0, ..., 0], expected, rtol=1e-5)
    np.testing.assert_allclose(table.mean, expected, rtol=1e-5)


def test_slopes_of_some_heads_leave_the_worth_of_the_others():
    table = table_of(1)
    table.learn(np.array([0]), slopes_of(1))
    before, fresh = table.mean.copy(), np.full((1, *GRID), np.nan)
    fresh[0, 1, :2] = [1.0, 2.0]
    table.learn(np.array([0]), fresh)
    changed = ~np.isclose(table.mean, before, rtol=1e-6)
    assert np.argwhere(changed).tolist() == [[1, 0], [1, 1]]
    pair = before[1, :2].sum()
    np.testing.assert_allclose(table.mean[1, :2], before[1, :2] / 2 + np.array([1, 4]) / 5 * pair / 2, rtol=1e-5)


def test_an_image_twice_in_a_batch_counts_once_with_its_last_slopes():
    table, once = table_of(2), table_of(2)
    slopes = slopes_of(3)
    table.learn(np.array([0, 1, 0]), slopes)
    once.learn(np.array([1, 0]), slopes[1:])
    np.testing.assert_allclose(table.mean, once.mean)
    assert table.num_known == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0, 1e200])
def test_an_image_whose_slopes_tell_nothing_stays_unknown(bad):
    table = table_of(2)
    table.learn(np.array([0]), np.full((1, *GRID), bad))
    assert table.num_known == 0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**32), st.integers(1, 8), st.floats(0, 1)), max_size=5), st.booleans())
def test_every_micro_batch_has_mean_one_whatever_was_learnt(tmp_path_factory, lessons, mapped):
    limit = 0 if mapped else 10**6
    table = WorthTable(24, GRID, "fisher", tmp_path_factory.getbasetemp(), limit)
    for seed, num, gone in lessons:
        rng = np.random.default_rng(seed)
        slopes = rng.normal(size=(num, *GRID)) * 10.0 ** rng.integers(-30, 30, (num, 1, 1))
        slopes[rng.random(slopes.shape) < gone] = np.nan
        table.learn(rng.integers(0, 24, num), slopes)
    found = table.coming(ORDER, 0, 6)
    assert np.isfinite(found).all() and (found >= 0).all()
    np.testing.assert_allclose(found.mean((1, 2)), 1.0, rtol=1e-3 if mapped else 1e-5)
    scores = make_scores("fisher", np.ones(GRID), np.ones(GRID), 0, found.tolist())
    np.testing.assert_allclose(scores.backward_TLHM, found, rtol=1e-3 if mapped else 1e-5)


def test_a_large_table_lies_on_disk_and_says_the_same(tmp_path):
    small, large = table_of(), WorthTable(24, GRID, "fisher", tmp_path, limit_bytes=1000)
    assert small.in_memory and not large.in_memory and isinstance(large._rows_NLH, np.memmap)
    for seed in range(3):
        for table in (small, large):
            table.learn(np.arange(seed, 20), slopes_of(20 - seed, seed))
    np.testing.assert_allclose(large.coming(ORDER, 0, 4), small.coming(ORDER, 0, 4), rtol=2e-3, atol=1e-6)
    assert not list(tmp_path.iterdir())  # nothing to clean up


def test_a_full_disk_is_an_error_and_no_crash(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SystemFault, match="No space left"):
        WorthTable(24, GRID, "fisher", tmp_path, limit_bytes=0)


def test_slopes_of_all_workers_lie_over_one_another_at_rank_0():
    whole = slopes_of(5).astype(np.float32)
    owner = np.random.default_rng(0).integers(0, 4, whole.shape)  # worker 3's are never sent

    def work(rank, transport):
        return gather_slopes(transport, np.where(owner == rank, whole, np.float32(np.nan)))

    merged, *others = on_threads(3, work)
    assert others == [None, None]
    np.testing.assert_array_equal(merged, np.where(owner < 3, whole, np.nan))


def test_workers_that_scored_different_images_hear_the_same_worths(tmp_path):
    model = tiny_vit()
    scored_order = MicroBatches(6, 1, 1, seed=1)
    batches = [range(rank, 5, 3) for rank in range(3)]
    pairs = images_and_labels(model, 6, 1)
    slopes = {i: next(gate_slopes(model, [pairs[i]])).numpy() for i in range(6)}
    train_order = MicroBatches(6, 2, 1, seed=0)

    def work(rank, transport):
        worths = GroupWorths(transport, 6, GRID, "fisher", tmp_path)
        worths.learn_scored(scored_order, batches, [slopes[int(scored_order.indices(b)[0][0])] for b in batches[rank]])
        return worths.coming(train_order, 0, 3), worths.table and worths.table.num_known

    found = on_threads(3, work)
    assert [known for _, known in found] == [5, None, None]
    alone = table_of(6)
    seen = [int(scored_order.indices(b)[0][0]) for b in range(5)]
    alone.learn(np.array(seen), np.concatenate([slopes[i] for i in seen]))
    for worth_TLHM, _ in found:
        np.testing.assert_allclose(worth_TLHM, alone.coming(train_order, 0, 3), rtol=1e-5)


def test_what_training_records_on_all_workers_reaches_the_table(tmp_path):
    model, order = tiny_vit(), MicroBatches(6, 3, 2, seed=0)
    batches, ops = images_and_labels(model, 2, 3), uniform_ops(model_shape(model), 2, Op.FULL)
    ops[0, 1] = Op.FORWARD
    recorded, _, _ = record(model, Placement.make([[0, 1, 1, 2]] * 3, 3), [ops], batches, by_sample=True)
    again = [dataclasses.replace(of, steps=()) for of in recorded]

    def work(rank, transport):
        worths = GroupWorths(transport, 6, GRID, "fisher", tmp_path)
        worths.learn_recorded(order, recorded[rank])
        worths.learn_recorded(order, again[rank])  # a window without a recorded step
        return worths.coming(order, 0, 1)

    first, *others = on_threads(3, work)
    assert all(np.array_equal(first, other) for other in others)
    assert all(isinstance(of, Recorded) and len(of.slopes_SLH) == 6 for of in recorded)
    merged = np.nanmax(np.stack([np.where(np.isnan(of.slopes_SLH), -np.inf, of.slopes_SLH) for of in recorded]), axis=0)
    alone = table_of(6)
    indices = np.concatenate(order.indices(recorded[0].steps[0]))
    alone.learn(indices, np.where(np.isinf(merged), np.nan, merged))
    np.testing.assert_allclose(first, alone.coming(order, 0, 1), rtol=1e-5)
    assert (first[0, 0, 1] == pytest.approx(1.0, rel=1e-5)) and first[0, 0, 0].tolist() != [1.0, 1.0]
