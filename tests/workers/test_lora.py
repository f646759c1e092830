"""Adapters cut with the heads: PEFT on the plain timm model is the judge of gradients, and the reader of the export."""

from __future__ import annotations

import copy
import json

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from timm.layers import SwiGLU, SwiGLUPacked

from scheduler.domain import Op, Placement, uniform_ops
from scheduler.errors import UserError
from tests.workers.engine import costs_for, gathered_gradients, images_and_labels, run_step, tiny_vit
from tests.workers.test_session import run_job, spec_of
from workers.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter, attach, merged
from workers.method import Lora
from workers.model import build_model
from workers.partition import model_shape
from workers.shapes import adapted

BUILDS = {
    "plain": {},
    "layer scale, average pooling": {"init_values": 0.5, "global_pool": "avg"},
    "uneven slices": {"mlp_ratio": 1.64},
    "gated": {"mlp_layer": SwiGLU},
    "gated, packed": {"mlp_layer": SwiGLUPacked},
}
TARGETS = [("qkv", "proj", "fc1", "fc2"), ("qkv",), ("fc2", "proj")]
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def with_adapters(lora, **args):
    """(plain model, the same with adapters that are no longer zero)."""
    plain = tiny_vit(**args)
    model = copy.deepcopy(plain)
    attach(model, lora, seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith("lora_b"):
                param.copy_(torch.randn(param.shape, generator=generator, dtype=param.dtype))
    return plain, model


def by_peft(plain, model, lora, folder):
    """What PEFT makes of the plain model and the exported adapter."""
    weights, config = adapter(model.state_dict(), lora)
    safetensors.torch.save_file({key: value.contiguous() for key, value in weights.items()}, folder / ADAPTER_WEIGHTS)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config))
    return peft.PeftModel.from_pretrained(copy.deepcopy(plain), folder, is_trainable=True).double()


@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("name", sorted(BUILDS))
def test_gradients_are_those_of_peft(tmp_path, name, targets):
    lora = Lora(rank=3, alpha=6.0, targets=targets)
    plain, model = with_adapters(lora, **BUILDS[name])
    judge = by_peft(plain, model, lora, tmp_path)
    batches = images_and_labels(plain, 2, 3)
    loss = torch.stack([F.cross_entropy(judge(images), labels) for images, labels in batches]).mean()
    loss.backward()
    shape = model_shape(model)
    owners = np.random.default_rng(1).integers(0, 3, (shape.num_blocks, shape.num_heads))
    _, ran = run_step(
        model, Placement.make(owners, 3), uniform_ops(shape, 2, Op.FULL), batches, costs=costs_for(model, 3, 2, 3),
        embed_grad=False,
    )  # fmt: skip
    assert ran[0][0].loss == pytest.approx(loss.item(), rel=1e-10)
    found = gathered_gradients(model, [shard for _, shard in ran])
    wanted = {key: param.grad for key, param in judge.named_parameters() if param.requires_grad}
    assert len(wanted) == sum(param.requires_grad for param in model.parameters())
    for key, grad in wanted.items():
        ours = key.removeprefix("base_model.model.").replace(".modules_to_save.default", "").replace(".default", "")
        ours = ours.replace("lora_A.weight", "lora_a").replace("lora_B.weight", "lora_b")
        torch.testing.assert_close(found[ours], grad, **CLOSE, msg=key)
    assert all(not found[key].any() for key, param in model.named_parameters() if not param.requires_grad)


@pytest.mark.parametrize("name", sorted(BUILDS))
def test_peft_and_the_merged_model_have_equal_logits(tmp_path, name):
    lora = Lora(rank=2)
    plain, model = with_adapters(lora, **BUILDS[name])
    judge = by_peft(plain, model, lora, tmp_path).eval()
    whole = copy.deepcopy(plain)
    whole.load_state_dict(merged(model.state_dict(), lora))
    [(images, _)] = images_and_labels(plain, 1, 4)
    with torch.no_grad():
        expected = judge(images)
        torch.testing.assert_close(whole(images), expected, rtol=0, atol=1e-10)
        assert (plain(images) - expected).abs().max() > 1e-3


def test_a_new_adapter_changes_nothing_and_depends_on_the_seed_alone():
    drawn = []
    for seed in (1, 1, 2):
        model = tiny_vit()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        attach(model, Lora(), seed)
        drawn.append(model.blocks[0].attn.qkv.lora_a.detach())
        assert all(torch.equal(value, before[key]) for key, value in merged(model.state_dict(), Lora()).items())
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_what_cannot_have_adapters_is_refused_by_field():
    with pytest.raises(UserError, match="a norm inside the attention") as refused:
        attach(tiny_vit(scale_attn_norm=True), Lora(), 0)
    assert refused.value.param == "method.lora"
    with pytest.raises(UserError, match="A rank of 17 is more than the model's width of 16") as refused:
        attach(tiny_vit(), Lora(rank=17), 0)
    assert refused.value.param == "method.lora.rank"


@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("name", sorted(set(BUILDS) - {"gated"}))
def test_the_shape_with_adapters_is_that_of_the_model(name, targets):
    lora = Lora(rank=3, targets=targets)
    plain, model = with_adapters(lora, **BUILDS[name])
    assert adapted(model_shape(plain), lora) == model_shape(model)
    with pytest.raises(UserError, match="A rank of 17 is more"):
        adapted(model_shape(plain), Lora(rank=17))


@pytest.mark.parametrize(
    "method",
    [{}, pytest.param({"ratios": {"full": 3, "skip": 2}}, marks=pytest.mark.slow),
     {"budgets": {"compute": 0.6}, "strategy": "hull", "score": "gradient"}],
    ids=["all-full", "hardest", "heads"],
)  # fmt: skip
def test_a_job_with_adapters_trains_them_alone(tmp_path, method):
    spec = spec_of(method={**method, "lora": {"rank": 4}})
    ledger, _ = run_job(spec, tmp_path)
    rows = {row["name"]: row for row in ledger["rows"]}
    for name in ("compute fraction", "bytes fraction"):
        assert rows[name]["measured"] == pytest.approx(rows[name]["predicted"], abs=1e-9)
    assert ledger["accuracy"]["after"] > ledger["accuracy"]["before"]
    found = safetensors.torch.load_file(tmp_path / "result" / "model.safetensors")
    base = build_model(spec, 10).state_dict()
    assert found.keys() == base.keys()
    changed = {key for key, value in base.items() if not torch.equal(found[key], value)}
    matrices = ("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")
    assert changed <= {key for key in base if key.startswith("head.") or ("blocks" in key and key.endswith(matrices))}
    loaded = peft.PeftModel.from_pretrained(build_model(spec, 10).eval(), tmp_path / "result").eval()
    plain = build_model(spec, 10, load=False).eval()
    plain.load_state_dict(found)
    images = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), plain(images), rtol=0, atol=1e-5)
    change = found["blocks.0.mlp.fc1.weight"] - base["blocks.0.mlp.fc1.weight"]
    assert torch.linalg.matrix_rank(change, rtol=1e-3) <= 4
