"""Training a part of a model: gradients are the judge's on what trains, and the rest stays bit for bit."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import SwiGLU

from scheduler.domain import Op, Placement, uniform_ops
from scheduler.errors import UserError
from tests.workers.engine import costs_for, gathered_gradients, images_and_labels, run_step, tiny_vit
from tests.workers.judge import masked_loss
from tests.workers.test_session import run_job, spec_of
from workers.freezing import choose_trained
from workers.method import Method
from workers.model import build_model
from workers.partition import model_shape
from workers.shapes import trained

WAYS = {
    "trunk": {"freeze": {"trunk": True}},
    "first block": {"freeze": {"blocks": 1}},
    "trunk and two blocks": {"freeze": {"trunk": True, "blocks": 2}},
    "classifier alone": {"head_only": True},
    "adapters above a block": {"lora": {"rank": 2}, "freeze": {"blocks": 1}},
}
BUILDS = {
    "plain": {},
    "layer scale, queries normed": {"init_values": 0.5, "qk_norm": True},
    "gated": {"mlp_layer": SwiGLU},
    "bound": {"scale_attn_norm": True},
}
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def chosen(way, **args):
    """(model of which a part trains, its method)."""
    model, method = tiny_vit(**args), Method.model_validate(WAYS[way])
    choose_trained(model, method, seed=0)
    return model, method


@settings(max_examples=15, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("build", sorted(BUILDS))
@pytest.mark.parametrize("way", sorted(set(WAYS) - {"adapters above a block"}))
def test_what_trains_gets_the_judges_gradients_and_the_rest_none(way, build, data):
    model, _ = chosen(way, **BUILDS[build])
    shape, workers = model_shape(model), data.draw(st.integers(1, 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    grid = (shape.num_blocks, shape.num_heads)
    ops = rng.choice([0, 1, 2], size=(*grid, 3), p=[0.2, 0.2, 0.6]).astype(np.int8)
    ops[: shape.num_frozen] = np.minimum(ops[: shape.num_frozen], int(Op.FORWARD))
    batches = images_and_labels(model, 3, 2)
    _, ran = run_step(
        model, Placement.make(rng.integers(0, workers, grid), workers), ops, batches,
        costs=costs_for(model, workers, 3, 2), embed_grad=False,
    )  # fmt: skip
    judge = copy.deepcopy(model)
    loss = masked_loss(judge, batches, ops, embed_grad=False)
    loss.backward()
    assert ran[0][0].loss == pytest.approx(loss.item(), rel=1e-10)
    found = gathered_gradients(model, [shard for _, shard in ran])
    for name, param in judge.named_parameters():
        wanted = torch.zeros_like(param) if param.grad is None else param.grad
        torch.testing.assert_close(found[name], wanted, **CLOSE, msg=name)
        assert param.requires_grad or not found[name].any()


@pytest.mark.parametrize("build", ["plain", "layer scale, queries normed"])
@pytest.mark.parametrize("way", sorted(WAYS))
def test_the_shape_by_arithmetic_is_that_of_the_model(way, build):
    model, method = chosen(way, **BUILDS[build])
    assert trained(model_shape(tiny_vit(**BUILDS[build])), method) == model_shape(model)


def test_a_frozen_trunk_sends_no_gradients():
    for way, sends in (("trunk", False), ("first block", True)):
        model, _ = chosen(way)
        placement = Placement.make(np.arange(12).reshape(3, 4) % 2, 2)
        ops = uniform_ops(model_shape(model), 2, Op.FULL)
        programs, _ = run_step(
            model, placement, ops, images_and_labels(model, 2, 2), costs=costs_for(model, 2, 2, 2), embed_grad=False
        )
        assert any(i.units for i in programs[0].sends()) == sends


def test_no_block_left_is_refused_by_field():
    with pytest.raises(UserError, match="Freezing 3 blocks leaves none of the model's 3") as refused:
        choose_trained(tiny_vit(), Method.model_validate({"freeze": {"blocks": 3}}), 0)
    assert refused.value.param == "method.freeze.blocks" and "at most 2" in refused.value.remedy
    with pytest.raises(UserError, match="leaves none"):
        trained(model_shape(tiny_vit()), Method.model_validate({"freeze": {"blocks": 3}}))


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        pytest.param(
            {"freeze": {"trunk": True}},
            ("blocks.0.attn.qkv", "blocks.5.mlp.fc2.weight", "head.", "norm."),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"freeze": {"blocks": 4}, "ratios": {"full": 3, "skip": 2}},
            ("blocks.4.", "blocks.5.", "head.", "norm."),
            marks=pytest.mark.slow,
        ),
        ({"freeze": {"blocks": 4}, "budgets": {"compute": 0.8}, "strategy": "hull"}, ("blocks.5.", "head.")),
        ({"head_only": True, "ratios": {"full": 3, "skip": 2}}, ("head.",)),
    ],
    ids=["trunk", "hardest", "heads", "classifier"],
)
def test_a_job_changes_what_trains_alone_and_learns(tmp_path, method, changes):
    spec = spec_of(method=method, optimiser={"learning_rate": 3e-3})
    ledger, _ = run_job(spec, tmp_path)
    rows = {row["name"]: row for row in ledger["rows"]}
    for name in ("compute fraction", "bytes fraction"):
        assert rows[name]["measured"] == pytest.approx(rows[name]["predicted"], abs=1e-9)
    assert ledger["accuracy"]["after"] > ledger["accuracy"]["before"]
    found = safetensors.torch.load_file(tmp_path / "result" / "model.safetensors")
    base = build_model(spec, 10)
    choose_trained(base, spec.method, spec.seed)
    changed = {key for key, param in base.named_parameters() if not torch.equal(found[key], param.detach())}
    may = {key for key, param in base.named_parameters() if param.requires_grad}
    assert changed <= may and all(any(key.startswith(start) for key in changed) for start in changes)
