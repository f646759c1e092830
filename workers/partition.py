"""Cuts the state dict of a timm vision transformer into head slices and joins them again, bit for bit.

A head's slices, every one with the head's own rows first so that several heads are a concatenation (D width, K head
width, F the head's share of the MLP's hidden width, R relative positions):

    qkv_w [3K, D], qkv_b [3K]        its rows of attn.qkv, in the order q, k, v
    q_b, k_b, v_b [K]                biases of models that keep them apart
    table [1, R]                     its column of BEiT's relative position biases, transposed
    proj_w [K, D]                    its columns of attn.proj, transposed
    fc1_w [F, D], fc1_b [F]          its rows of mlp.fc1
    gate_w [F, D], gate_b [F]        of a gated MLP: its rows of the half that is activated
    fc2_w [F, D]                     its columns of mlp.fc2, transposed
    qkv_up, fc1_up, gate_up          with LoRA of rank r: its rows of B, as many as of the matrix [3K or F, r]
    proj_down [K, r], fc2_down [F, r]  its columns of A, transposed

All else is trunk. A hidden width that H does not divide is shared out as evenly as whole rows allow. A block that is
`bound` is one head, and its slices are the parameters of its sub-layers under timm's names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from timm.layers.mlp import GluMlp, SwiGLU
from torch import Tensor, nn

from scheduler.domain import ModelShape
from workers.anatomy import Half, Model, bound, halves, is_classifier


class Piece(NamedTuple):
    """Where a slice comes from: a parameter of the block; head 0's first row, or column where `axis` is 1."""

    key: str
    begin: int = 0
    axis: int = 0


Pieces = dict[str, tuple[Piece, ...]]


@dataclass(frozen=True)
class Cut:
    """How the blocks of a model are cut: `pieces[part][slice]` together are the rows of that slice."""

    shape: ModelShape
    pieces: Mapping[str, Pieces]
    whole: bool
    frozen: frozenset[str] = frozenset()  # slices that do not train

    @property
    def slices(self) -> Pieces:
        """Those of both parts."""
        return {**self.pieces["attn"], **self.pieces["mlp"]}

    def width(self, name: str, head: int) -> int:
        """How many rows of each of its pieces are a head's; not asked of a bound block."""
        if name.startswith(("fc", "gate")):
            return self.shape.mlp_dims[head]
        return 1 if name == "table" else self.shape.head_dim

    def begin(self, name: str, head: int) -> int:
        return sum(self.width(name, before) for before in range(head))


def cut_of(model: Model) -> Cut:
    """The cut of a supported model."""
    blocks: Any = model.blocks
    block = blocks[-1]  # the one that trains where any does
    attn, mlp, is_whole = block.attn, block.mlp, bound(block) is not None
    num_heads = 1 if is_whole else attn.num_heads
    head_dim = attn.proj.in_features // num_heads
    mlp_dims = _shares(mlp.fc2.in_features, num_heads)
    if is_whole:
        pieces = {half.part: _whole_pieces(block, half) for half in halves(block)}
    else:
        pieces = {"attn": _attn_pieces(attn, attn.num_heads * head_dim), "mlp": _mlp_pieces(mlp)}
    own = dict(block.named_parameters())
    frozen = {n for of in pieces.values() for n, each in of.items() if not own[each[0].key].requires_grad}
    all_train = all(param.requires_grad for param in own.values())
    head_params = tuple(_of_head(own, pieces, head_dim, width, num_heads) for width in mlp_dims)
    around = {name: param for name, param in model.named_parameters() if not name.startswith("blocks.")}
    classifier = sum(param.numel() for name, param in around.items() if is_classifier(name))
    shape = ModelShape(
        num_blocks=len(blocks),
        num_heads=num_heads,
        dim=model.embed_dim,
        head_dim=head_dim,
        mlp_dims=mlp_dims,
        num_tokens=int(model.patch_embed.num_patches) + model.num_prefix_tokens,
        patch_dim=_patch_dim(model),
        num_classes=model.num_classes,
        head_params=head_params,
        embed_params=sum(param.numel() for param in around.values()) - classifier,
        norm_params=sum(param.numel() for param in own.values()) - sum(head_params),
        classifier_params=classifier,
        mlp_matrices=3 if isinstance(mlp, GluMlp | SwiGLU) else 2,
        num_frozen=_num_frozen(blocks),
    )
    if not all_train:
        shape = replace(shape, **_trained(own, pieces, frozen, shape))
    return Cut(shape, pieces, is_whole, frozenset(frozen))


def model_shape(model: Model) -> ModelShape:
    """The sizes that the planner needs to know of a supported model."""
    return cut_of(model).shape


def head_slices(state: Mapping[str, Tensor], block: int, head: int, cut: Cut) -> dict[str, Tensor]:
    """The slices of one head as contiguous copies, of those tensors that `state` has."""
    found = {}
    for name, pieces in cut.slices.items():
        if f"blocks.{block}.{pieces[0].key}" in state:
            found[name] = torch.cat([_view(state, block, name, piece, head, cut) for piece in pieces])
    return found


def write_head(state: Mapping[str, Tensor], block: int, head: int, slices: Mapping[str, Tensor], cut: Cut) -> None:
    """Write one head's slices back to their places in `state`; inverse of `head_slices`."""
    for name, value in slices.items():
        views = [_view(state, block, name, piece, head, cut) for piece in cut.slices[name]]
        for view, part in zip(views, value.split([len(view) for view in views]), strict=True):
            view.copy_(part)


def _view(state: Mapping[str, Tensor], block: int, name: str, piece: Piece, head: int, cut: Cut) -> Tensor:
    """The part of a timm tensor that belongs to a head, rows first."""
    source = state[f"blocks.{block}.{piece.key}"]
    if cut.whole:
        return source
    begin = piece.begin + cut.begin(name, head)
    return (source.T if piece.axis else source)[begin : begin + cut.width(name, head)]


def _attn_pieces(attn: Any, inner: int) -> Pieces:
    """Of an attention whose heads are `inner` wide, all together."""
    pieces: Pieces = {}
    if attn.qkv is not None:
        pieces["qkv_w"] = tuple(Piece("attn.qkv.weight", i * inner) for i in range(3))
        if attn.qkv.bias is not None:
            pieces["qkv_b"] = tuple(Piece("attn.qkv.bias", i * inner) for i in range(3))
        apart = {name: f"{name}_bias" for name in "qv" if getattr(attn, f"{name}_bias", None) is not None}
    else:
        pieces["qkv_w"] = tuple(Piece(f"attn.{name}_proj.weight") for name in "qkv")
        apart = {name: f"{name}_proj.bias" for name in "qkv" if getattr(attn, f"{name}_proj").bias is not None}
    pieces |= {f"{name}_b": (Piece(f"attn.{key}"),) for name, key in apart.items()}
    if getattr(attn, "relative_position_bias_table", None) is not None:
        pieces["table"] = (Piece("attn.relative_position_bias_table", axis=1),)
    pieces["proj_w"] = (Piece("attn.proj.weight", axis=1),)
    if attn.qkv is not None and hasattr(attn.qkv, "lora_b"):
        pieces["qkv_up"] = tuple(Piece("attn.qkv.lora_b", i * inner) for i in range(3))
    if hasattr(attn.proj, "lora_a"):
        pieces["proj_down"] = (Piece("attn.proj.lora_a", axis=1),)
    return pieces


def _mlp_pieces(mlp: Any) -> Pieces:
    hidden = mlp.fc2.in_features
    if isinstance(mlp, SwiGLU):
        sources = {"gate": ("mlp.fc1_g", 0), "fc1": ("mlp.fc1_x", 0)}
    elif isinstance(mlp, GluMlp):
        gate, other = (hidden, 0) if mlp.gate_last else (0, hidden)
        sources = {"gate": ("mlp.fc1", gate), "fc1": ("mlp.fc1", other)}
    else:
        sources = {"fc1": ("mlp.fc1", 0)}
    biased = mlp.fc1_g.bias is not None if isinstance(mlp, SwiGLU) else mlp.fc1.bias is not None
    pieces: Pieces = {}
    for name, (key, begin) in sources.items():
        pieces[f"{name}_w"] = (Piece(f"{key}.weight", begin),)
        if biased:
            pieces[f"{name}_b"] = (Piece(f"{key}.bias", begin),)
    pieces["fc2_w"] = (Piece("mlp.fc2.weight", axis=1),)
    for name, (key, begin) in sources.items():
        if hasattr(mlp.get_submodule(key.removeprefix("mlp.")), "lora_b"):
            pieces[f"{name}_up"] = (Piece(f"{key}.lora_b", begin),)
    if hasattr(mlp.fc2, "lora_a"):
        pieces["fc2_down"] = (Piece("mlp.fc2.lora_a", axis=1),)
    return pieces


def _whole_pieces(block: nn.Module, half: Half) -> Pieces:
    inside = [half.part, half.after] if half.after else [half.part]
    names = [f"{path}.{name}" for path in inside for name, _ in block.get_submodule(path).named_parameters()]
    return {name: (Piece(name),) for name in names}


def _of_head(
    params: Mapping[str, nn.Parameter], pieces: Mapping[str, Pieces], head_dim: int, mlp_dim: int, num_heads: int
) -> int:
    """Parameters of a head whose share of the MLP is `mlp_dim` wide."""
    if num_heads == 1:
        keys = {piece.key for of_part in pieces.values() for each in of_part.values() for piece in each}
        return sum(params[key].numel() for key in keys)
    widths = {"attn": head_dim, "mlp": mlp_dim}
    total = 0
    for part, of_part in pieces.items():
        for name, each in of_part.items():
            width = 1 if name == "table" else widths[part]
            total += sum(width * params[p.key].numel() // params[p.key].shape[p.axis] for p in each)
    return total


def _trained(
    own: Mapping[str, nn.Parameter], pieces: Mapping[str, Pieces], frozen: set[str], shape: ModelShape
) -> dict[str, Any]:
    """What of a block trains where some of it is frozen."""
    left = {part: {n: each for n, each in of.items() if n not in frozen} for part, of in pieces.items()}
    per_head = tuple(_of_head(own, left, shape.head_dim, width, shape.num_heads) for width in shape.mlp_dims)
    of_heads = {piece.key for of in pieces.values() for each in of.values() for piece in each}
    shared = sum(param.numel() for key, param in own.items() if key not in of_heads and param.requires_grad)
    base_frozen = any(name.endswith("_w") for name in frozen) or not any(per_head)
    return {
        "trained_head_params": per_head,
        "trained_norm_params": shared,
        "backward_weight": 1 if base_frozen else shape.backward_weight,
    }


def _num_frozen(blocks: Any) -> int:
    """How many of the first blocks have nothing that trains."""
    idle = [not any(param.requires_grad for param in block.parameters()) for block in blocks]
    return idle.index(False) if False in idle else len(idle)


def _patch_dim(model: Any) -> int:
    height, width = model.patch_embed.patch_size
    return int(model.patch_embed.proj.in_channels) * height * width


def _shares(total: int, parts: int) -> tuple[int, ...]:
    return tuple(total * (i + 1) // parts - total * i // parts for i in range(parts))
