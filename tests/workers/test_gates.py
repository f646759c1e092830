"""Gates recorded in training against scoring, and against autograd on the masked timm model, image by image."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.compiler import compile_step
from scheduler.domain import Op, Placement, StepShape, uniform_ops
from scheduler.scores import merge
from tests.workers.engine import costs_for, gathered_gradients, images_and_labels, on_threads, run_step, tiny_vit
from tests.workers.judge import heads_of
from tests.workers.test_engine import MODELS, cases
from workers.executor import Executor
from workers.gates import EVERY, MOST, Gates
from workers.partition import model_shape
from workers.scoring import score
from workers.shard import Shard
from workers.steps import Batch, StepPrograms

EXACT = {"rtol": 1e-9, "atol": 1e-12}
FIRST_DUE = next(filter(Gates(model_shape(tiny_vit()), StepShape(1, 1), "fisher").due, range(EVERY)))


def record(
    model, placement, tables, batches, kind="fisher", *, first_step=None, by_sample=False, autocast=None, **options
):
    """One step per table, without update: (what each worker recorded, reports of the last step, shards)."""
    size = len(batches[0][1])
    costs = costs_for(model, placement.num_workers, len(batches), size)
    first_step = FIRST_DUE if first_step is None else first_step

    def work(rank, transport):
        shard = Shard(model, placement, rank)
        executor = Executor(shard, transport, autocast=autocast)
        executor.gates = Gates(model_shape(model), StepShape(len(batches), size), kind, by_sample=by_sample)
        for index, ops_LHM in enumerate(tables):
            shard.clear()
            steps = StepPrograms(compile_step(placement, ops_LHM, costs, **options), rank, costs, shard.dtype)
            images, labels = ({m: pair[i] for m, pair in enumerate(batches)} for i in (0, 1))
            report = executor.run(steps, Batch(images, labels), step=first_step + index)
        return executor.gates.take(), report, shard

    return zip(*on_threads(placement.num_workers, work), strict=True)


def masked_slopes(model, batches, ops_LHM, skip_fill):
    """∂loss_i/∂gate of the FULL heads of every image: [M, B, L, H], NaN for heads that are not FULL."""
    shape = model_shape(model)
    size = len(batches[0][1])
    slopes_MBLH = np.full((len(batches), size, shape.num_blocks, shape.num_heads), np.nan)
    for m, (images, labels) in enumerate(batches):
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            gates = torch.ones(shape.num_blocks, shape.num_heads, dtype=torch.float64, requires_grad=True)
            logits = gated_forward(model, image[None], ops_LHM[:, :, m], gates, skip_fill)
            loss = F.cross_entropy(logits, label[None])
            (found,) = torch.autograd.grad(loss, gates, allow_unused=True)
            full = ops_LHM[:, :, m] == Op.FULL
            slopes_MBLH[m, index][full] = 0.0 if found is None else found.numpy()[full]
    return slopes_MBLH


def gated_forward(model, images, ops_LH, gates_LH, skip_fill):
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    for block, ops_H, gates_H in zip(model.blocks, ops_LH, gates_LH, strict=True):
        if (ops_H == Op.SKIP).all():
            continue
        for part, norm, scale in (("attn", block.norm1, block.ls1), ("mlp", block.norm2, block.ls2)):
            outs, bias = heads_of(getattr(block, part), part, len(ops_H), norm(x))
            total = torch.zeros_like(x)
            for op, gate, out in zip(ops_H, gates_H, outs, strict=True):
                total = total + (gate * out if op == Op.FULL else out.detach() if op == Op.FORWARD else 0)
            if skip_fill == "rescale":
                total = total * (len(ops_H) / (ops_H != Op.SKIP).sum())
            branch = scale(total if bias is None else total + bias)
            x = x + (branch if (ops_H == Op.FULL).any() else branch.detach())
    return model.forward_head(model.norm(x))


@pytest.mark.parametrize("kind", ["fisher", "taylor"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_an_all_full_step_records_what_scoring_finds_on_its_images(name, kind):
    model = MODELS[name]
    batches = images_and_labels(model, 2, 3)
    shape = model_shape(model)
    ops = uniform_ops(shape, 2, Op.FULL)
    recorded, _, _ = record(model, Placement.make([[2, 1, 1, 0][: shape.num_heads]] * 3, 3), [ops], batches, kind)
    expected, _, samples = score(model, batches, kind)
    found = merge((of.sums_LH, of.counts_LH) for of in recorded)
    assert samples == 6 and sum(of.counts_LH for of in recorded).tolist() == [[6] * shape.num_heads] * 3
    np.testing.assert_allclose(found, expected.numpy() / 6, **EXACT)


@settings(max_examples=30, deadline=None)
@given(case=cases(), skip_fill=st.sampled_from(["zero", "rescale"]), embed_grad=st.booleans())
def test_full_heads_are_recorded_under_any_ops_and_no_others(case, skip_fill, embed_grad):
    model, placement, ops = case
    batches = images_and_labels(model, ops.shape[2], 2)
    recorded, _, _ = record(
        model, placement, [ops], batches, by_sample=True, skip_fill=skip_fill, embed_grad=embed_grad
    )
    expected = masked_slopes(model, batches, ops, skip_fill).reshape(-1, *ops.shape[:2])
    for rank, of in enumerate(recorded):
        mine = np.where(placement.owner_LH == rank, expected, np.nan)
        np.testing.assert_allclose(of.slopes_SLH, mine, rtol=1e-5, atol=1e-7)  # kept in single precision
        np.testing.assert_allclose(of.sums_LH, np.nansum(mine**2, axis=0), **EXACT)
        assert (of.counts_LH == np.isfinite(mine).sum(0)).all()
    unknown = np.isnan(merge((of.sums_LH, of.counts_LH) for of in recorded))
    assert (unknown == ~(ops == Op.FULL).any(axis=2)).all()


def test_means_are_over_the_images_for_which_a_head_was_full():
    model = tiny_vit()
    batches = images_and_labels(model, 2, 3)
    ops = uniform_ops(model_shape(model), 2, Op.FULL)
    ops[1, 2, 0], ops[0, 0, :] = Op.SKIP, Op.FORWARD
    [recorded], _, _ = record(model, Placement.make([[0] * 4] * 3, 1), [ops], batches)
    assert recorded.counts_LH[1, 2] == 3 and recorded.counts_LH[0, 0] == 0 and recorded.counts_LH[2, 3] == 6
    slopes = masked_slopes(model, batches, ops, "zero")[1, :, 1, 2]
    assert merge([(recorded.sums_LH, recorded.counts_LH)])[1, 2] == pytest.approx(np.mean(slopes**2), rel=1e-9)


def test_recording_changes_neither_loss_nor_gradients():
    model, placement = tiny_vit(), Placement.make([[0, 1, 1, 0]] * 3, 2)
    batches = images_and_labels(model, 2, 3)
    ops = np.random.default_rng(1).integers(0, 3, (3, 4, 2)).astype(np.int8)
    recorded, reports, shards = record(model, placement, [ops], batches)
    assert any(of.counts_LH.any() for of in recorded)
    _, plain = run_step(model, placement, ops, batches, costs=costs_for(model, 2, 2, 3))
    assert reports[0].loss == plain[0][0].loss and reports[0].grad_norm == plain[0][0].grad_norm
    theirs = gathered_gradients(model, [shard for _, shard in plain])
    for name, grad in gathered_gradients(model, shards).items():
        assert torch.equal(grad, theirs[name]), name


def test_slopes_under_autocast_are_those_of_single_precision_but_for_rounding():
    model = tiny_vit().float()
    batches, ops = images_and_labels(model, 2, 16), uniform_ops(model_shape(model), 2, Op.FULL)
    placement = Placement.make([[0] * 4] * 3, 1)
    [single], _, _ = record(model, placement, [ops], batches, by_sample=True)
    [half], _, _ = record(model, placement, [ops], batches, by_sample=True, autocast=torch.bfloat16)
    assert np.corrcoef(single.slopes_SLH.ravel(), half.slopes_SLH.ravel())[0, 1] > 0.999
    np.testing.assert_allclose(half.sums_LH, single.sums_LH, rtol=0.1)


def test_steps_that_are_not_due_are_not_recorded():
    model = tiny_vit()
    batches, ops = images_and_labels(model, 1, 2), uniform_ops(model_shape(model), 1, Op.FULL)
    gates = Gates(model_shape(model), StepShape(1, 2), "fisher")
    first = next(step for step in range(100) if not (gates.due(step) or gates.due(step + 1)))
    [recorded], _, _ = record(
        model, Placement.make([[0] * 4] * 3, 1), [ops, ops], batches, first_step=first, by_sample=True
    )
    assert not recorded.counts_LH.any() and recorded.steps == () and recorded.slopes_SLH.shape == (0, 3, 4)


def test_what_was_taken_is_forgotten():
    gates = Gates(model_shape(tiny_vit()), StepShape(1, 1), "fisher", by_sample=True)
    gates.watch(0, "attn", 0, (1, 2))(torch.ones(1, 3, 8, requires_grad=True).mul(2))  # no backward: nothing to record
    gates.close(0, 1)
    first, second = gates.take(), gates.take()
    assert first.steps == (0,) and np.isnan(first.slopes_SLH).all() and not first.counts_LH.any()
    assert second.steps == () and len(second.slopes_SLH) == 0


def test_slopes_that_overflow_are_unknown_and_spoil_nothing():
    gates = Gates(model_shape(tiny_vit()), StepShape(1, 1), "fisher")
    out = torch.ones(1, 3, 8, dtype=torch.float64, requires_grad=True) * 1
    gates.watch(0, "attn", 0, (1, 2))(out)
    (out * torch.tensor([torch.inf] * 4 + [1.0] * 4, dtype=torch.float64)).sum().backward()
    gates.close(0, 1)
    recorded = gates.take()
    assert recorded.counts_LH[0].tolist() == [0, 0, 1, 0] and recorded.sums_LH[0].tolist() == [0, 0, 144, 0]


@pytest.mark.parametrize("window", [1, 100, 10_000])
def test_recorded_steps_are_few_and_fall_in_step_with_no_cycle(window):
    gates = Gates(model_shape(tiny_vit()), StepShape(1, 1), "fisher", window=window)
    due = np.flatnonzero([gates.due(step) for step in range(20_000)])
    assert (due // gates.every).tolist() == list(range(len(due)))  # one of every so many
    assert gates.every >= EVERY and window / gates.every <= MOST
    for cycle in range(1, 16):
        assert len(set(due[:100] % cycle)) == cycle


def test_no_activation_outlives_the_step():
    model = tiny_vit()
    gates = Gates(model_shape(model), StepShape(1, 2), "fisher")
    gc.disable()
    try:
        out = torch.ones(2, 3, 8, requires_grad=True) * 1
        alive = weakref.ref(out)
        gates.watch(0, "attn", 0, (1, 2))(out)
        out.sum().backward()
        del out
        assert alive() is None
    finally:
        gc.enable()


def test_a_step_is_timed_by_instruction_unless_told_not_to():
    model, placement = tiny_vit(), Placement.make([[0] * 4] * 3, 1)
    batches, ops = images_and_labels(model, 1, 2), uniform_ops(model_shape(model), 1, Op.FULL)
    costs = costs_for(model, 1, 1, 2)

    def work(rank, transport):
        executor = Executor(Shard(model, placement, rank), transport)
        steps = StepPrograms(compile_step(placement, ops, costs), rank, costs, torch.float64)
        batch = Batch({0: batches[0][0]}, {0: batches[0][1]})
        return executor.run(steps, batch), executor.run(steps, batch, timed=False)

    [(timed, untimed)] = on_threads(1, work)
    assert untimed.timings_us == {} and untimed.kind_s.keys() == timed.kind_s.keys()
    assert len(timed.timings_us["fwd", "attn", 4, 0]) == len(timed.timings_us["bwd", "mlp", 4, 0]) == 3
    assert sum(map(sum, timed.timings_us.values())) == pytest.approx(1e6 * sum(timed.kind_s.values()))
