"""Cuts the state dict of a timm VisionTransformer into head slices and joins them again, bit for bit.

A head's slices, every one with the head's own rows first so that several heads are a concatenation (D width, K head
width, F the head's share of the MLP's hidden width):

    qkv_w [3K, D], qkv_b [3K]   its rows of attn.qkv, in the order q, k, v
    proj_w [K, D]               its columns of attn.proj, transposed
    fc1_w [F, D], fc1_b [F]     its rows of mlp.fc1
    fc2_w [F, D]                its columns of mlp.fc2, transposed

All else is trunk. A hidden width that H does not divide is shared out as evenly as whole rows allow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from scheduler.domain import ModelShape

ATTN_SLICES = ("qkv_w", "qkv_b", "proj_w")
MLP_SLICES = ("fc1_w", "fc1_b", "fc2_w")
SLICES = ATTN_SLICES + MLP_SLICES

_SOURCES = {
    "qkv_w": "attn.qkv.weight",
    "qkv_b": "attn.qkv.bias",
    "proj_w": "attn.proj.weight",
    "fc1_w": "mlp.fc1.weight",
    "fc1_b": "mlp.fc1.bias",
    "fc2_w": "mlp.fc2.weight",
}


def model_shape(model: VisionTransformer) -> ModelShape:
    """The sizes that the planner needs to know of a supported model."""
    block: Any = model.blocks[0]
    num_heads, head_dim, dim = block.attn.num_heads, block.attn.head_dim, model.embed_dim
    mlp_dims = _shares(block.mlp.fc1.out_features, num_heads)
    per_width = 2 * dim + (block.mlp.fc1.bias is not None)
    attn = 4 * head_dim * dim + (3 * head_dim if block.attn.qkv.bias is not None else 0)
    embed = [model.patch_embed, *([] if isinstance(model.norm_pre, torch.nn.Identity) else [model.norm_pre])]
    extra = [p for p in (model.cls_token, model.reg_token, model.pos_embed) if p is not None]
    block_params, head_params = _count(block), tuple(attn + width * per_width for width in mlp_dims)
    height, width = model.patch_embed.patch_size
    return ModelShape(
        num_blocks=len(model.blocks),
        num_heads=num_heads,
        dim=dim,
        head_dim=head_dim,
        mlp_dims=mlp_dims,
        num_tokens=model.patch_embed.num_patches + model.num_prefix_tokens,
        patch_dim=model.in_chans * height * width,
        num_classes=model.num_classes,
        head_params=head_params,
        embed_params=sum(map(_count, embed)) + sum(p.numel() for p in extra),
        norm_params=block_params - sum(head_params),
        classifier_params=_count(model.norm) + _count(model.fc_norm) + _count(model.head),
    )


def head_slices(state: Mapping[str, Tensor], block: int, head: int, shape: ModelShape) -> dict[str, Tensor]:
    """The slices of one head as contiguous copies; a bias that the model lacks is left out."""
    out = {}
    for name in SLICES:
        source = state.get(f"blocks.{block}.{_SOURCES[name]}")
        if source is not None:
            out[name] = _view(name, source, head, shape).flatten(0, -2 if name.endswith("w") else -1).clone()
    return out


def write_head(
    state: Mapping[str, Tensor], block: int, head: int, slices: Mapping[str, Tensor], shape: ModelShape
) -> None:
    """Write one head's slices back to their places in `state`; inverse of `head_slices`."""
    for name, value in slices.items():
        target = _view(name, state[f"blocks.{block}.{_SOURCES[name]}"], head, shape)
        target.copy_(value.reshape(target.shape))


def slice_rows(name: str, heads: Sequence[int], shape: ModelShape) -> list[int]:
    """How many rows of slice `name` each of the heads takes."""
    if name.startswith("fc"):
        return [shape.mlp_dims[h] for h in heads]
    return [shape.head_dim * (3 if name.startswith("qkv") else 1)] * len(heads)


def _view(name: str, source: Tensor, head: int, shape: ModelShape) -> Tensor:
    """The part of a timm tensor that belongs to a head, rows first."""
    if name.startswith("qkv"):
        return source.view(3, shape.num_heads, shape.head_dim, *source.shape[1:])[:, head]
    width = shape.head_dim if name == "proj_w" else shape.mlp_dims[head]
    begin = head * shape.head_dim if name == "proj_w" else sum(shape.mlp_dims[:head])
    rows = source.T if name in ("proj_w", "fc2_w") else source
    return rows[begin : begin + width]


def _shares(total: int, parts: int) -> tuple[int, ...]:
    return tuple(total * (i + 1) // parts - total * i // parts for i in range(parts))


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
