"""Models: resolving, building, refusing and loading weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from scheduler.errors import UserError
from workers import bundled
from workers.anatomy import bound, refusal
from workers.contract import DIGITS_MODEL, JobSpec
from workers.model import ModelInput, build_model, model_input, resolve
from workers.partition import model_shape

TINY: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
NAME = "vit_tiny_patch16_224"


def spec(**fields: Any) -> JobSpec:
    return JobSpec(model=NAME, model_args={**TINY, **fields.pop("model_args", {})}, **fields)


def state(**model_args: Any) -> dict[str, Tensor]:
    return build_model(spec(seed=9, model_args=model_args), 3).state_dict()


def saved(path: Path, tensors: dict[str, Tensor]) -> str:
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, path)
    return str(path)


def refused(job: JobSpec, num_classes: int = 3) -> UserError:
    with pytest.raises(UserError) as caught:
        build_model(job, num_classes)
    assert caught.value.remedy
    return caught.value


def test_the_bundled_model_brings_its_arguments_and_weights_unless_overridden() -> None:
    resolved = resolve(JobSpec())
    assert (resolved.timm_name, resolved.model_args, resolved.weights) == (
        bundled.TIMM_NAME,
        bundled.MODEL_ARGS,
        bundled.WEIGHTS,
    )
    other = resolve(JobSpec(model_args={"global_pool": "avg"}, img_size=56, weights="/w.safetensors"))
    assert (other.model_args["global_pool"], other.model_args["img_size"]) == ("avg", 56)
    assert other.weights == Path("/w.safetensors")
    assert resolve(spec(img_size=8)) == (NAME, {**TINY, "img_size": 8}, None)


def test_a_seed_decides_every_bit_and_the_callers_generator_does_not_move() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first, second = build_model(spec(seed=4), 5), build_model(spec(seed=4), 5)
    assert torch.equal(torch.rand(3), expected)
    other = build_model(spec(seed=5), 5).state_dict()
    for key, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[key])
    assert not torch.equal(first.head.weight, other["head.weight"])


def test_a_new_classifier_starts_narrow_and_unbiased() -> None:
    head = build_model(spec(model_args={"embed_dim": 192}), 50).head
    assert head.bias.abs().max() == 0
    assert head.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_an_unknown_name_is_refused_with_near_ones() -> None:
    error = refused(JobSpec(model="vit_smal_patch16_224"))
    assert (error.code, error.param) == ("unknown_model", "model")
    assert error.remedy is not None and "vit_small_patch16_224" in error.remedy
    for name in ("hf-hub:timm/vit_tiny_patch16_224", "local-dir:/tmp", "../../etc"):
        assert refused(JobSpec(model=name)).code == "unknown_model"


def test_a_pretrained_tag_is_allowed() -> None:
    job = JobSpec(model=f"{NAME}.augreg_in21k_ft_in1k", model_args=TINY)
    assert isinstance(build_model(job, 3), VisionTransformer)


@pytest.mark.parametrize(
    "args", [{"num_heads": 3}, {"patch_size": 0}, {"init_values": "much"}, {"num_heads": 0}, {"global_pool": "none"}]
)
def test_arguments_that_timm_cannot_build_are_refused(args: dict[str, Any]) -> None:
    error = refused(spec(model_args=args))
    assert (error.code, error.param) == ("bad_model_args", f"model_args.{next(iter(args))}")


SUPPORTED: list[dict[str, Any]] = [
    {},
    {"global_pool": "avg"},
    {"global_pool": "avg", "class_token": False},
    {"init_values": 1e-5},
    {"qkv_bias": False},
    {"proj_bias": False},
    {"in_chans": 1},
    {"mlp_ratio": 1.7},
    {"no_embed_class": True},
    {"final_norm": False},
    {"global_pool": "avg", "fc_norm": False},
    {"act_layer": "gelu_tanh"},
    {"reg_tokens": 4},
    {"qk_norm": True},
    {"pre_norm": True},
    {"global_pool": "map"},
    {"global_pool": "max"},
    {"global_pool": "avg", "pool_include_prefix": True},
    {"dynamic_img_size": True},
    {"pos_embed": "none"},
    {"embed_norm_layer": "layernorm"},
    {"norm_layer": "rmsnorm"},
    {"mlp_layer": timm.layers.SwiGLU},
    {"mlp_layer": timm.layers.SwiGLUPacked},
]
BOUND: dict[str, dict[str, Any]] = {
    "a norm inside the attention": {"scale_attn_norm": True},
    "a norm inside the MLP": {"scale_mlp_norm": True},
    "norms behind the sub-layers": {"block_fn": timm.models.vision_transformer.ResPostBlock},
    "attention DiffAttention": {"attn_layer": "diff"},
}
REFUSED: dict[str, dict[str, Any]] = {
    "image that is not square": {"img_size": (16, 32)},
    "patch that is not square": {"patch_size": (4, 8)},
    "patch drop": {"patch_drop_rate": 0.1},
    "dropout": {"attn_drop_rate": 0.1},
    "drop path": {"drop_path_rate": 0.1},
    "no classifier": {"num_classes": 0},
    "no blocks": {"depth": 0},
    "dynamic image padding": {"dynamic_img_pad": True},
    "block ParallelScalingBlock": {"block_fn": timm.models.vision_transformer.ParallelScalingBlock},
    "MLP GatedMlp": {"mlp_layer": timm.layers.GatedMlp},
    "MLP narrower than the number of heads": {"mlp_ratio": 0.07},
}


@pytest.mark.parametrize("args", SUPPORTED, ids=str)
def test_many_arguments_are_supported(args: dict[str, Any]) -> None:
    assert refusal(timm.create_model(NAME, **{**TINY, "num_classes": 3, **args})) is None


@pytest.mark.parametrize("reason", REFUSED)
def test_each_unsupported_feature_is_named(reason: str) -> None:
    assert refusal(timm.create_model(NAME, **{**TINY, "num_classes": 3, **REFUSED[reason]})) == reason


@pytest.mark.parametrize("reason", BOUND)
def test_what_looks_at_all_heads_binds_a_block(reason: str) -> None:
    model = timm.create_model(NAME, **{**TINY, "num_classes": 3, **BOUND[reason]})
    assert refusal(model) is None and bound(model.blocks[0]) == reason and model_shape(model).num_heads == 1
    assert bound(timm.create_model(NAME, **TINY, num_classes=3).blocks[0]) is None


def test_blocks_that_are_not_alike_are_named() -> None:
    model = timm.create_model(NAME, **TINY, num_classes=3)
    model.blocks[1].attn.gate = torch.nn.Linear(16, 16)
    assert refusal(model) == "blocks that are not alike"


@pytest.mark.parametrize("name", ["resnet18", "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224"])
def test_other_architectures_are_refused_by_name(name: str) -> None:
    error = refused(JobSpec(model=name, model_args={"depth": 1} if "deit" in name else {}))
    assert (error.code, error.param) == ("model_refused", "model")
    assert "is not a plain vision transformer" in error.message


def test_model_input_follows_the_model() -> None:
    model = build_model(JobSpec(model="vit_small_patch14_dinov2", model_args={"depth": 1}, img_size=42), 3)
    assert model_input(model) == ModelInput(42, 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic")
    grey = model_input(build_model(JobSpec(), 10, load=False))
    assert grey == ModelInput(28, 1, (0.5,), (0.5,), "bicubic")


def test_weights_are_loaded_bit_for_bit_with_a_classifier_that_fits(tmp_path: Path) -> None:
    given = state()
    model = build_model(spec(weights=saved(tmp_path / "w.safetensors", given)), 3)
    assert all(torch.equal(tensor, given[key]) for key, tensor in model.state_dict().items())


def test_a_classifier_for_other_classes_is_dropped_and_starts_afresh(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.safetensors", state())
    model = build_model(spec(weights=path, seed=2), 7)
    fresh = build_model(spec(seed=2), 7)
    assert torch.equal(model.head.weight, fresh.head.weight)
    assert model.head.bias.abs().max() == 0


def test_a_backbone_without_classifier_is_loaded(tmp_path: Path) -> None:
    given = {key: tensor for key, tensor in state().items() if not key.startswith("head.")}
    model = build_model(spec(weights=saved(tmp_path / "w.safetensors", given)), 4)
    assert torch.equal(model.cls_token, given["cls_token"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    given = {key: tensor.to(dtype) for key, tensor in state().items()}
    model = build_model(spec(weights=saved(tmp_path / "w.safetensors", given)), 3)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert torch.equal(model.pos_embed, given["pos_embed"].float())


def test_position_table_and_patches_of_another_size_are_resampled(tmp_path: Path) -> None:
    given = state(img_size=48, patch_size=8)
    model = build_model(spec(weights=saved(tmp_path / "w.safetensors", given)), 3)
    assert model.pos_embed.shape == (1, 17, 16)
    assert torch.equal(model.pos_embed[:, 0], given["pos_embed"][:, 0])
    assert torch.equal(model.blocks[1].mlp.fc1.weight, given["blocks.1.mlp.fc1.weight"])
    own_grid = state(img_size=32)  # 8 × 8 and 4 × 4: the mean of a smooth table stays
    own_grid["pos_embed"] = torch.ones_like(own_grid["pos_embed"])
    model = build_model(spec(weights=saved(tmp_path / "w2.safetensors", own_grid)), 3)
    torch.testing.assert_close(model.pos_embed, torch.ones_like(model.pos_embed))


def test_the_final_norm_moves_with_the_pooling(tmp_path: Path) -> None:
    for given_pool, pool, key in (("token", "avg", "fc_norm"), ("avg", "token", "norm")):
        given = state(global_pool=given_pool)
        name = "norm.weight" if given_pool == "token" else "fc_norm.weight"
        given[name] = torch.arange(16.0)
        job = spec(weights=saved(tmp_path / f"{pool}.safetensors", given), model_args={"global_pool": pool})
        assert build_model(job, 3).get_submodule(key).weight.tolist() == list(range(16))


def test_weights_of_another_model_are_refused_with_both_shapes(tmp_path: Path) -> None:
    error = refused(spec(weights=saved(tmp_path / "w.safetensors", state(embed_dim=32, img_size=32))))
    assert (error.code, error.param) == ("weights_mismatch", "weights")
    assert "cls_token is 1×1×32, the model's 1×1×16" in error.message
    assert "pos_embed is 1×65×32, the model's 1×17×16" in error.message
    assert "more" in error.message


@pytest.mark.parametrize(
    ("given_args", "own_args", "told"),
    [
        ({"depth": 3}, {}, "blocks.2.attn.proj.bias 16 is not in the model"),
        ({}, {"depth": 3}, "blocks.2.norm1.weight 16 is missing"),
        ({}, {"class_token": False, "global_pool": "avg"}, "cls_token 1×1×16 is not in the model"),
        ({"class_token": False, "global_pool": "avg"}, {}, "cls_token 1×1×16 is missing"),
        ({"in_chans": 3}, {"in_chans": 1}, "patch_embed.proj.weight is 16×3×4×4, the model's 16×1×4×4"),
        ({}, {"init_values": 0.1}, "blocks.0.ls1.gamma 16 is missing"),
    ],
)
def test_missing_and_unexpected_weights_are_named(
    tmp_path: Path, given_args: dict[str, Any], own_args: dict[str, Any], told: str
) -> None:
    error = refused(spec(weights=saved(tmp_path / "w.safetensors", state(**given_args)), model_args=own_args))
    assert error.code == "weights_mismatch"
    assert told in error.message


ODD: dict[str, dict[str, Tensor]] = {
    "scalar table": {"pos_embed": torch.tensor(1.0)},
    "flat table": {"pos_embed": torch.ones(17)},
    "empty table": {"pos_embed": torch.ones(1, 0, 16)},
    "table of no square": {"pos_embed": torch.ones(1, 8, 16)},
    "scalar patch": {"patch_embed.proj.weight": torch.tensor(1.0)},
    "a key of CLIP": {"visual.class_embedding": torch.ones(1)},
}


@pytest.mark.parametrize("name", ODD)
def test_odd_tensors_are_refused_not_crashed_on(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path / "w.safetensors", {**state(), **ODD[name]})
    assert refused(spec(weights=path)).code == "weights_mismatch"


def test_an_empty_file_of_weights_is_refused_and_an_odd_classifier_dropped(tmp_path: Path) -> None:
    assert refused(spec(weights=saved(tmp_path / "w.safetensors", {}))).code == "weights_mismatch"
    odd = saved(tmp_path / "odd.safetensors", {**state(), "head.weight": torch.tensor(1.0)})
    assert build_model(spec(weights=odd), 3).head.bias.abs().max() == 0


def test_what_is_not_safetensors_is_never_opened_as_anything_else(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "w.pt")
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    whole = Path(saved(tmp_path / "whole.safetensors", state())).read_bytes()
    (tmp_path / "torn.safetensors").write_bytes(whole[: len(whole) // 2])
    for name in ("w.pt", "text.safetensors", "empty.safetensors", "torn.safetensors"):
        error = refused(spec(weights=str(tmp_path / name)))
        assert (error.code, error.param) == ("weights_not_safetensors", "weights")
    for name in ("none.safetensors", "."):
        assert refused(spec(weights=str(tmp_path / name))).code == "weights_not_found"


def test_the_digits_model_loads_its_own_weights_and_a_fresh_classifier() -> None:
    model = build_model(JobSpec(), 10)
    given = load_file(bundled.WEIGHTS)
    assert torch.equal(model.pos_embed, given["pos_embed"])
    assert torch.equal(model.head.weight, build_model(JobSpec(), 10, load=False).head.weight)
    assert JobSpec().model == DIGITS_MODEL
