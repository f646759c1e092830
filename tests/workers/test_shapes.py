"""The arithmetic of shapes, judged by counting really built models."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.errors import UserError
from workers import anatomy, bundled
from workers.anatomy import foreign_architecture
from workers.contract import MODEL_ARGS, JobSpec
from workers.model import build_model
from workers.partition import model_shape
from workers.shapes import POOLS, Measured, Sizes, read_entry, resized, shape_of
from workers.sizing import entry_of, sizes_of

TINY = "vit_tiny_patch16_224"
CASES: list[tuple[str, dict[str, Any], int | None]] = [
    ("d2ft_digits", {}, None),
    ("d2ft_digits", {"depth": 3, "num_heads": 4, "embed_dim": 64}, 32),
    (TINY, {}, None),
    (TINY, {"qkv_bias": False, "init_values": 1e-5, "depth": 2}, 96),
    (TINY, {"class_token": False, "global_pool": "avg", "depth": 1}, None),
    (TINY, {"patch_size": 14, "in_chans": 1, "depth": 1}, 100),
    (TINY, {"mlp_ratio": 2.7, "num_heads": 6, "depth": 1}, None),
    ("vit_small_patch32_384", {"depth": 2, "img_size": 70}, None),
    ("vit_small_patch14_dinov2", {"depth": 2}, 224),
    ("deit3_small_patch16_224", {"depth": 2}, 160),
    ("deit3_small_patch16_224", {"depth": 1, "class_token": False, "global_pool": "avg"}, None),
    ("vit_base_patch16_224", {"depth": 1, "global_pool": "avg"}, None),
    ("vit_medium_patch16_gap_240", {"depth": 1}, None),
    ("vit_so150m_patch16_reg4_gap_256", {}, None),
]


def sizes(model: str) -> Sizes:
    return sizes_of(bundled.TIMM_NAME, **bundled.MODEL_ARGS) if model == "d2ft_digits" else sizes_of(model)


@pytest.mark.parametrize(("model", "args", "img_size"), CASES)
def test_the_shape_is_that_of_the_built_model(model: str, args: dict[str, Any], img_size: int | None) -> None:
    spec = JobSpec(model=model, model_args=args, img_size=img_size)
    try:
        built = build_model(spec, num_classes=7, load=False)
    except UserError as error:
        assert error.code == "model_refused"
        return
    assert shape_of(resized(sizes(model), args, img_size), 7) == model_shape(built)


def test_every_supported_model_has_the_shape_that_the_catalogue_says() -> None:
    names = [name for name in timm.list_models() if foreign_architecture(name) is None]
    agreed = 0
    for name in names:
        entry = entry_of(name)
        if isinstance(entry, str):
            continue
        known = read_entry(entry)
        side = known.img_size + known.patch_size
        pools = known.pools if isinstance(known, Measured) else POOLS
        args: dict[str, Any] = {"depth": 1, "in_chans": 1, "global_pool": pools[agreed % len(pools)]}
        if args["global_pool"] == "token" and isinstance(known, Sizes) and not known.class_token:
            args.pop("global_pool")
        with torch.device("meta"):
            built = timm.create_model(name, pretrained=False, num_classes=3, img_size=side, **args)
        assert shape_of(resized(known, args, side), 3) == model_shape(built), (name, args)
        agreed += 1
    assert agreed > 220


def test_of_a_measured_model_little_can_be_changed() -> None:
    known = read_entry(entry_of("eva02_tiny_patch14_224"))  # type: ignore[arg-type]
    assert isinstance(known, Measured) and read_entry(known.to_dict()) == known
    with pytest.raises(UserError, match="only img_size, in_chans, depth, global_pool can be changed") as refused:
        resized(known, {"embed_dim": 96})
    assert refused.value.param == "model_args.embed_dim"
    with pytest.raises(UserError, match="is avg or token or avgmax or max, not 'map'") as refused:
        resized(known, {"global_pool": "map"})
    assert refused.value.param == "model_args.global_pool"
    with pytest.raises(UserError, match="smaller than a patch"):
        resized(known, {}, 8)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 8),
    st.integers(1, 3),
    st.integers(4, 40),
    st.integers(2, 16),
    st.floats(0.5, 5),
    st.booleans(),
    st.booleans(),
    st.integers(0, 3),
    st.sampled_from(POOLS),
)
def test_any_arguments_count_as_the_built_model_does(
    heads: int,
    width: int,
    depth: int,
    side: int,
    patch: int,
    ratio: float,
    bias: bool,
    token: bool,
    registers: int,
    pool: str,
) -> None:
    args: dict[str, Any] = {
        "num_heads": heads,
        "embed_dim": 4 * heads * width,
        "depth": depth,
        "patch_size": min(side, patch),
        "mlp_ratio": ratio,
        "qkv_bias": bias,
        "qk_norm": not bias,
        "class_token": token,
        "reg_tokens": registers,
        "global_pool": "avg" if pool == "token" and not token else pool,
    }
    with torch.device("meta"):
        built = timm.create_model(TINY, pretrained=False, num_classes=3, img_size=side, **args)
    assert shape_of(resized(sizes(TINY), args, side), 3) == model_shape(built)


@pytest.mark.parametrize(
    ("args", "img_size", "param"),
    [
        ({"num_heads": 5}, None, "model_args.num_heads"),
        ({"depth": 0}, None, "model_args.depth"),
        ({"depth": 1 << 40}, None, "model_args.depth"),
        ({"embed_dim": 96.5}, None, "model_args.embed_dim"),
        ({"embed_dim": True}, None, "model_args.embed_dim"),
        ({"patch_size": "sixteen"}, None, "model_args.patch_size"),
        ({"mlp_ratio": 0.001}, None, "model_args.mlp_ratio"),
        ({"mlp_ratio": "4"}, None, "model_args.mlp_ratio"),
        ({"qkv_bias": 1}, None, "model_args.qkv_bias"),
        ({"global_pool": "median"}, None, "model_args.global_pool"),
        ({"class_token": False}, None, "model_args.class_token"),
        ({"reg_tokens": -1}, None, "model_args.reg_tokens"),
        ({}, 8, "img_size"),
        ({"img_size": 8}, None, "img_size"),
    ],
)
def test_sizes_that_cannot_be_built_are_refused_by_field(
    args: dict[str, Any], img_size: int | None, param: str
) -> None:
    with pytest.raises(UserError) as refused:
        resized(sizes(TINY), args, img_size)
    assert refused.value.code == "bad_model_args" and refused.value.param == param and refused.value.remedy


def test_every_argument_of_a_job_is_one_of_the_sizes() -> None:
    assert set(MODEL_ARGS) <= set(Sizes.__dataclass_fields__)
    assert set(POOLS) == anatomy.POOLS


def test_sizes_survive_their_file() -> None:
    assert Sizes.from_dict(sizes(TINY).to_dict()) == sizes(TINY)
    with pytest.raises(KeyError):
        Sizes.from_dict({"img_size": 224})


REFUSED: list[tuple[str, dict[str, Any], int | None]] = [
    ("eva02_tiny_patch14_224", {"embed_dim": 96}, None),
    ("eva02_tiny_patch14_224", {"global_pool": "map"}, None),
    ("eva02_tiny_patch14_224", {}, 8),
    ("beit_base_patch16_224", {"global_pool": "max"}, None),
    ("vit_xsmall_patch16_clip_224", {"mlp_ratio": 2.0}, None),
    (TINY, {"num_heads": 5}, None),
    (TINY, {"qkv_bias": 1}, None),
    ("d2ft_digits", {"depth": 0}, None),
]


@pytest.mark.parametrize(("model", "args", "img_size"), REFUSED)
def test_a_job_refuses_the_argument_that_a_plan_refuses(model: str, args: dict[str, Any], img_size: int | None) -> None:
    with pytest.raises(UserError) as by_job:
        build_model(JobSpec(model=model, model_args=args, img_size=img_size), 3, load=False)
    entry = sizes(model) if model == "d2ft_digits" else read_entry(entry_of(model))  # type: ignore[arg-type]
    with pytest.raises(UserError) as by_plan:
        resized(entry, args, img_size)
    assert by_job.value.to_dict() == by_plan.value.to_dict()


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_a_measured_model_pools_as_it_is_asked_to(pool: str) -> None:
    args: dict[str, Any] = {"depth": 1, "global_pool": pool}
    for name in ("eva02_tiny_patch14_224", "beit_base_patch16_224"):
        built = build_model(JobSpec(model=name, model_args=args), 3, load=False)
        assert built.global_pool == pool
        assert shape_of(resized(read_entry(entry_of(name)), args), 3) == model_shape(built)  # type: ignore[arg-type]
