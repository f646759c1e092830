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
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import SwiGLU, SwiGLUPacked
from torch.nn.utils import parametrize

from scheduler.domain import Op, Placement, uniform_ops
from scheduler.errors import UserError
from tests.workers.engine import costs_for, gathered_gradients, images_and_labels, run_step, tiny_vit
from tests.workers.judge import masked_loss
from tests.workers.test_session import run_job, spec_of
from workers.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter, attach, merged
from workers.method import Lora
from workers.model import build_model
from workers.partition import cut_of, head_slices, model_shape
from workers.scoring import score
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


@settings(max_examples=12, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", sorted(BUILDS))
def test_gradients_under_any_ops_are_those_of_masked_heads_whose_matrices_have_the_adapters_in_them(name, data):
    lora = Lora(rank=2, alpha=3.0, targets=data.draw(st.sampled_from(TARGETS)))
    plain, model = with_adapters(lora, **BUILDS[name])
    shape, workers = model_shape(model), data.draw(st.integers(1, 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    grid = (shape.num_blocks, shape.num_heads)
    ops, batches = rng.integers(0, 3, (*grid, 3)).astype(np.int8), images_and_labels(plain, 3, 2)
    fill = data.draw(st.sampled_from(["zero", "rescale"]))
    _, ran = run_step(
        model, Placement.make(rng.integers(0, workers, grid), workers), ops, batches,
        costs=costs_for(model, workers, 3, 2), embed_grad=False, skip_fill=fill,
    )  # fmt: skip
    judge, adapters = merging(plain, model, lora)
    loss = masked_loss(judge, batches, ops, embed_grad=False, skip_fill=fill)
    loss.backward()
    assert ran[0][0].loss == pytest.approx(loss.item(), rel=1e-10)
    found = gathered_gradients(model, [shard for _, shard in ran])
    for key, param in adapters.items():
        wanted = torch.zeros_like(param) if param.grad is None else param.grad
        torch.testing.assert_close(found[key], wanted, **CLOSE, msg=key)


def _rows(path, grad, block, head, cut):
    return head_slices({f"{path}.lora_b": grad}, block, head, cut).values()


def columns_of(path, cut):
    """(begin, end) of every head's columns of a matrix that is cut so; of others all columns at once."""
    name = {"proj": "proj_w", "fc2": "fc2_w"}.get(path.rpartition(".")[2])
    if name is None:
        return [(None, None)]
    return [(cut.begin(name, h), cut.begin(name, h) + cut.width(name, h)) for h in range(cut.shape.num_heads)]


def merging(plain, model, lora):
    """(the plain model, each of whose targets is W + s·B·A of leaves; these leaves by name)."""
    judge, adapters = copy.deepcopy(plain).requires_grad_(False), {}
    for key, param in model.named_parameters():
        if key.endswith(("lora_a", "lora_b")):
            adapters[key] = param.detach().clone().requires_grad_()
    for key, down in adapters.items():
        if key.endswith("lora_a"):
            layer = judge.get_submodule(key.removesuffix(".lora_a"))
            parametrize.register_parametrization(layer, "weight", Added([(adapters[key[:-1] + "b"], down)], lora.scale))
    return judge, adapters


class Added(torch.nn.Module):
    """W + s·B·A, for pairs (B, A) of neighbouring columns."""

    def __init__(self, pairs, scale):
        super().__init__()
        self.pairs, self.scale = pairs, scale

    def forward(self, weight):
        columns = [up @ down for up, down in self.pairs]
        return weight + self.scale * torch.cat(columns, 1)


@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("name", sorted(BUILDS))
def test_the_gradient_score_is_what_heads_add_to_the_gradients_of_new_adapters(name, targets):
    """A head alone, through adapters of its own rows or columns only, gets the gradient of B that it is said to add."""
    lora = Lora(rank=2, alpha=2.0, targets=targets)
    plain = tiny_vit(**BUILDS[name])
    model = copy.deepcopy(plain)
    attach(model, lora, seed=3)
    batches = images_and_labels(plain, 2, 3)
    added, _, samples = score(model, batches, "gradient")
    cut, scale = cut_of(model), lora.scale
    ups, judge = {}, copy.deepcopy(plain).requires_grad_(False)
    for key, down in model.named_parameters():
        if key.endswith("lora_a"):
            path = key.removesuffix(".lora_a")
            layer, bounds = judge.get_submodule(path), columns_of(path, cut)
            # Of a matrix cut by columns every head gets a B of its own, else one is for all, by rows.
            ups[path] = [torch.zeros(layer.out_features, 2).double().requires_grad_() for _ in bounds]
            each = [(up, down.detach()[:, begin:end]) for up, (begin, end) in zip(ups[path], bounds, strict=True)]
            parametrize.register_parametrization(layer, "weight", Added(each, scale))
    expected = torch.zeros_like(added)
    for images, labels in batches:
        loss, squares = F.cross_entropy(judge(images), labels), torch.zeros_like(added)
        for path, leaves in ups.items():
            grads, block = torch.autograd.grad(loss, leaves, retain_graph=True), int(path.split(".")[1])
            for head in range(cut.shape.num_heads):
                mine = [grads[head]] if len(grads) > 1 else _rows(path, grads[0], block, head, cut)
                squares[block, head] += sum(grad.square().sum() for grad in mine)
        expected += squares.sqrt() / scale
    assert samples == 2
    torch.testing.assert_close(added, expected, rtol=1e-9, atol=1e-12)


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
