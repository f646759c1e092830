"""How `shapes` counts a model of timm's: read from what timm would build, without memory for it.

A plan counts by the catalogue's entry of a model, and a job's model is checked by the same entry before it is built: so
what one refuses, the other does.
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any
from unittest import mock

import timm
import torch
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer

from workers.anatomy import refusal
from workers.partition import model_shape
from workers.shapes import Measured, Sizes, resized, shape_of

NUM_CLASSES = 2  # of the models that are built to be counted
PLAIN_POOLS = ("token", "avg", "avgmax", "max")  # those without parameters


def sizes_of(timm_name: str, **model_args: Any) -> Sizes:
    """The sizes of a model that works, read from the call by which timm would build it; nothing is built."""
    seen = _arguments(VisionTransformer, timm_name, **model_args)
    seen["img_size"], seen["patch_size"] = (_side(seen[name]) for name in ("img_size", "patch_size"))
    seen["init_values"] = float(seen["init_values"] or 0)
    return Sizes(**{field.name: seen[field.name] for field in fields(Sizes)})


def entry_of(name: str) -> dict[str, Any] | str:
    """What the catalogue says of a model whose module is known: how to count it, or why it cannot be run."""
    model = _built(name)
    reason = refusal(model)
    if reason is not None:
        return reason
    shape = model_shape(model)
    if isinstance(model, VisionTransformer):
        sizes = sizes_of(name)
        if shape_of(resized(sizes, {"depth": shape.num_blocks}), shape.num_classes) == shape:
            return sizes.to_dict()
    position = getattr(model, "pos_embed", None)
    measured = Measured(
        img_size=_side(model.patch_embed.img_size),
        patch_size=_side(model.patch_embed.patch_size),
        in_chans=shape.patch_dim // _side(model.patch_embed.patch_size) ** 2,
        pools=_pools(model),
        position_params=0 if position is None else shape.dim,
        has_tables=getattr(model.blocks[0].attn, "relative_position_bias_table", None) is not None,
        shape=replace(shape, num_blocks=_arguments(type(model), name)["depth"]),
    )
    return measured.to_dict()


def _pools(model: Any) -> tuple[str, ...]:
    """What the model may pool by without parameters of another shape, its own way first."""
    own = str(model.global_pool)
    known = ("token", "avg") if isinstance(model, Beit) else PLAIN_POOLS
    if own not in known:
        return (own,)
    tokens = () if model.cls_token is not None else ("token",)
    return (own, *(pool for pool in known if pool not in (own, *tokens)))


def _arguments(architecture: type, timm_name: str, **model_args: Any) -> dict[str, Any]:
    """What timm would build an architecture with."""
    signature, seen = inspect.signature(architecture.__init__), dict[str, Any]()  # type: ignore[misc]

    def note(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        seen.update(bound.arguments)
        raise _Noted

    with mock.patch.object(architecture, "__init__", note), suppress(_Noted):
        timm.create_model(timm_name, pretrained=False, **model_args)
    return seen


def _built(name: str, **model_args: Any) -> Any:
    """Without memory; of one block where timm can, since a model's are alike or refused."""
    with torch.device("meta"):
        try:
            return timm.create_model(name, pretrained=False, num_classes=NUM_CLASSES, depth=1, **model_args)
        except AssertionError:
            return timm.create_model(name, pretrained=False, num_classes=NUM_CLASSES, **model_args)


def _side(size: Any) -> int:
    return int(size if isinstance(size, int) else size[0])


class _Noted(Exception):
    """Ends the building of a model once its arguments are known."""
