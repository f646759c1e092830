"""The plain timm model is the judge of the engine: same loss, same gradients, for any ops on any placement."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import RmsNorm, SwiGLU

from scheduler.domain import Op, Placement, step_flops, uniform_ops
from scheduler.simulate import simulate
from tests.workers.engine import costs_for, gathered_gradients, images_and_labels, run_step, tiny_vit
from tests.workers.judge import masked_forward, masked_loss
from workers.partition import model_shape

BUILDS = {
    "class token": {},
    "average pool, no class token": {"class_token": False, "global_pool": "avg"},
    "average pool over a class token": {"global_pool": "avg"},
    "layer scale, no qkv bias": {"init_values": 0.5, "qkv_bias": False},
    "norms of queries and keys, registers": {"qk_norm": True, "reg_tokens": 2},
    "gated MLP, attention pooling": {"mlp_layer": SwiGLU, "global_pool": "map", "class_token": False},
    "norm before the blocks, norms of means": {"pre_norm": True, "norm_layer": RmsNorm},
    "one head, as a norm inside the attention asks": {"scale_attn_norm": True},
    "uneven MLP slices, 3 channels": {"mlp_ratio": 1.64, "in_chans": 3},
}
MODELS = {name: tiny_vit(**args) for name, args in BUILDS.items()}
TOLERANCE = 1e-9


@st.composite
def cases(draw):
    model = MODELS[draw(st.sampled_from(sorted(MODELS)))]
    num_workers = draw(st.integers(1, 4))
    num_micro_batches = draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = model_shape(model)
    grid = (shape.num_blocks, shape.num_heads)
    owners = rng.integers(0, num_workers, grid)
    if draw(st.booleans()):
        owners = np.repeat(rng.integers(0, num_workers, (shape.num_blocks, 1)), shape.num_heads, axis=1)
    weights = rng.dirichlet([0.7, 0.7, 0.7])
    ops = rng.choice(3, size=(*grid, num_micro_batches), p=weights).astype(np.int8)
    if draw(st.booleans()):
        ops[:, :, rng.random(num_micro_batches) < 0.4] = int(Op.SKIP)  # these sit out
    return model, Placement.make(owners, num_workers), ops


def assert_same_gradients(model, shards, reports, judge_loss):
    model.zero_grad()
    judge_loss.backward()
    assert abs(reports[0].loss - judge_loss.item()) < TOLERANCE
    found = gathered_gradients(model, shards)
    norm = 0.0
    for name, param in model.named_parameters():
        expected = torch.zeros_like(param) if param.grad is None else param.grad
        torch.testing.assert_close(found[name], expected, rtol=0, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
        norm += expected.square().sum().item()
    assert reports[0].grad_norm == pytest.approx(norm**0.5, abs=1e-8)


@settings(max_examples=60, deadline=None)
@given(case=cases(), embed_grad=st.booleans(), skip_fill=st.sampled_from(["zero", "rescale", "mean"]))
def test_loss_and_every_gradient_equal_the_masked_timm_model(case, embed_grad, skip_fill):
    model, placement, ops = case
    batches = images_and_labels(model, ops.shape[2], 2)
    shape = model_shape(model)
    means = {
        (block, part): torch.randn(
            shape.num_heads, shape.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(block)
        )
        for block in range(shape.num_blocks)
        for part in ("attn", "mlp")
    }
    costs = costs_for(model, placement.num_workers, ops.shape[2], 2)
    _, results = run_step(
        model, placement, ops, batches, costs=costs, means=means, embed_grad=embed_grad, skip_fill=skip_fill
    )
    loss = masked_loss(model, batches, ops, embed_grad=embed_grad, skip_fill=skip_fill, means=means)
    assert_same_gradients(model, [s for _, s in results], [r for r, _ in results], loss)


@settings(max_examples=30, deadline=None)
@given(case=cases())
def test_bytes_flops_and_reports_are_what_was_forecast(case):
    model, placement, ops = case
    costs = costs_for(model, placement.num_workers, ops.shape[2], 2)
    programs, results = run_step(model, placement, ops, images_and_labels(model, ops.shape[2], 2), costs=costs)
    forecast = simulate(programs, costs)
    reports = [report for report, _ in results]
    assert tuple(report.sent_bytes for report in reports) == forecast.link_bytes
    assert sum(report.flops for report in reports) == forecast.flops == step_flops(costs.shape, costs.step, ops)
    assert len({report.loss for report in reports}) == 1


@settings(max_examples=30, deadline=None)
@given(case=cases())
def test_every_worker_hears_every_image_s_loss(case):
    model, placement, ops = case
    batches = images_and_labels(model, ops.shape[2], 2)
    costs = costs_for(model, placement.num_workers, ops.shape[2], 2)
    _, results = run_step(model, placement, ops, batches, costs=costs)
    expected_MB = np.zeros((len(batches), 2))
    for m, (images, labels) in enumerate(batches):
        if ops[:, :, m].any():
            logits = masked_forward(model, images, ops[:, :, m])
            expected_MB[m] = torch.nn.functional.cross_entropy(logits, labels, reduction="none").detach().numpy()
    for report, _ in results:
        np.testing.assert_allclose(report.losses_MB, expected_MB, rtol=0, atol=TOLERANCE)
    ran_M = ops.any(axis=(0, 1))
    if ran_M.any():
        assert results[0][0].loss == pytest.approx(expected_MB[ran_M].mean(), abs=TOLERANCE)


def test_a_step_whose_micro_batches_all_sit_out_does_nothing():
    model = MODELS["class token"]
    ops = uniform_ops(model_shape(model), 2, Op.SKIP)
    placement, costs = Placement.make([[0, 1, 1, 0]] * 3, 2), costs_for(model, 2, 2, 2)
    programs, results = run_step(model, placement, ops, images_and_labels(model, 2, 2), costs=costs)
    assert all({i.cargo or i.kind for i in program.instructions} == {"tally", "step"} for program in programs)
    assert all(report.loss == report.grad_norm == report.flops == 0 for report, _ in results)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_all_full_equals_the_unmasked_timm_model(name):
    model = MODELS[name]
    batches = images_and_labels(model, 2, 3)
    placement = Placement.make([[0, 1, 1, 2]] * 3, 3)
    ops = uniform_ops(model_shape(model), 2, Op.FULL)
    _, results = run_step(model, placement, ops, batches, costs=costs_for(model, 3, 2, 3))
    loss = torch.stack([torch.nn.functional.cross_entropy(model(x), y) for x, y in batches]).mean()
    assert_same_gradients(model, [s for _, s in results], [r for r, _ in results], loss)
