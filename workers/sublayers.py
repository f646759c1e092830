"""The arithmetic of a sub-layer for some of a block's heads, or for a bound block as timm runs it.

Shapes: B images, N tokens, D width, K head width, k heads run together, F their MLP rows, R relative positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models import eva
from torch import Tensor, nn

from workers.anatomy import Half
from workers.gates import Watch
from workers.partition import Cut

Weights = Mapping[str, Tensor]  # by the names of the slices, those of the heads that run one after the other
SubLayer = Callable[[Tensor, Weights, Tensor | None, Watch | None], Tensor]


def sub_layer(block: Any, half: Half, cut: Cut, rope: Tensor | None) -> SubLayer:
    """Σ over the heads in `weights` of their output, plus `bias`: B, N, D.

    A call (y_BND, weights, bias, watch) shows `watch`, where there is one, the heads' outputs side by side before the
    projection, B, N, k·K; of an MLP its hidden units, B, N, F; of a bound block what it adds. Nothing of `block` is
    used but modules without parameters of heads, and buffers.
    """
    if cut.whole:
        return _Whole(block, half, rope)
    return _Attention(block.attn, cut.shape.head_dim, rope) if half.part == "attn" else _Mlp(block.mlp)


class _Attention:
    def __init__(self, attn: Any, head_dim: int, rope: Tensor | None) -> None:
        self.attn, self.head_dim, self.rope = attn, head_dim, rope
        self.q_norm, self.k_norm = getattr(attn, "q_norm", None), getattr(attn, "k_norm", None)
        self.num_prefix, self.rotates_half = getattr(attn, "num_prefix_tokens", 0), getattr(attn, "rotate_half", False)
        self.positions_NN: Tensor | None = getattr(attn, "relative_position_index", None)

    def __call__(self, y_BND: Tensor, weights: Weights, bias: Tensor | None, watch: Watch | None) -> Tensor:
        batch, tokens, _ = y_BND.shape
        qkv = _plus(F.linear(y_BND, weights["qkv_w"], self._bias(weights)), self.attn.qkv, y_BND, weights.get("qkv_up"))
        qkv = qkv.view(batch, tokens, -1, 3, self.head_dim)
        q_BkNK, k_BkNK, v_BkNK = qkv.permute(3, 0, 2, 1, 4).unbind(0)
        if self.q_norm is not None and self.k_norm is not None:
            q_BkNK, k_BkNK = self.q_norm(q_BkNK), self.k_norm(k_BkNK)
        if self.rope is not None:
            q_BkNK, k_BkNK = (self._turned(x_BkNK, self.rope).type_as(v_BkNK) for x_BkNK in (q_BkNK, k_BkNK))
        out_BkNK = F.scaled_dot_product_attention(q_BkNK, k_BkNK, v_BkNK, attn_mask=self._mask(weights, v_BkNK))
        out_BNF = out_BkNK.transpose(1, 2).reshape(batch, tokens, -1)
        if watch is not None:
            watch(out_BNF)
        added_BND = F.linear(out_BNF, weights["proj_w"].T, bias)
        return _plus_shared(added_BND, self.attn.proj, out_BNF, weights.get("proj_down"))

    def _bias(self, weights: Weights) -> Tensor | None:
        """Of models that keep them apart, each head's q, k and v biases; one that is missing is 0."""
        apart = {name: weights[f"{name}_b"] for name in "qkv" if f"{name}_b" in weights}
        if not apart:
            return weights.get("qkv_b")
        none = torch.zeros_like(next(iter(apart.values())))
        return torch.stack([apart.get(name, none).view(-1, self.head_dim) for name in "qkv"], 1).flatten()

    def _turned(self, x_BkNK: Tensor, rope: Tensor) -> Tensor:
        prefix, patches = x_BkNK[:, :, : self.num_prefix], x_BkNK[:, :, self.num_prefix :]
        return torch.cat([prefix, apply_rot_embed_cat(patches, rope, half=self.rotates_half)], 2)

    def _mask(self, weights: Weights, like: Tensor) -> Tensor | None:
        if self.positions_NN is None:
            return None
        return weights["table"][:, self.positions_NN][None].to(like.dtype)


class _Mlp:
    def __init__(self, mlp: Any) -> None:
        self.mlp, self.act = mlp, mlp.act
        self.layers = {"fc1": getattr(mlp, "fc1_x", None) or mlp.fc1, "gate": getattr(mlp, "fc1_g", None) or mlp.fc1}

    def __call__(self, y_BND: Tensor, weights: Weights, bias: Tensor | None, watch: Watch | None) -> Tensor:
        hidden_BNF = self._into("fc1", y_BND, weights)
        if "gate_w" in weights:
            hidden_BNF = self.act(self._into("gate", y_BND, weights)) * hidden_BNF
        else:
            hidden_BNF = self.act(hidden_BNF)
        if watch is not None:
            watch(hidden_BNF)
        added_BND = F.linear(hidden_BNF, weights["fc2_w"].T, bias)
        return _plus_shared(added_BND, self.mlp.fc2, hidden_BNF, weights.get("fc2_down"))

    def _into(self, name: str, y_BND: Tensor, weights: Weights) -> Tensor:
        hidden_BNF = F.linear(y_BND, weights[f"{name}_w"], weights.get(f"{name}_b"))
        return _plus(hidden_BNF, self.layers[name], y_BND, weights.get(f"{name}_up"))


class _Whole:
    """Sub-layer and norm behind it as timm runs them, with the weights in the place of their parameters."""

    def __init__(self, block: nn.Module, half: Half, rope: Tensor | None) -> None:
        self.half, self.module = half, block.get_submodule(half.part)
        self.after = block.get_submodule(half.after) if half.after else None
        rotates = half.part == "attn" and isinstance(block, eva.EvaBlock | eva.EvaBlockPostNorm)
        self.options = {"rope": rope} if rotates else {}

    def __call__(self, y_BND: Tensor, weights: Weights, bias: Tensor | None, watch: Watch | None) -> Tensor:
        own = _under(f"{self.half.part}.", weights)
        out_BND = torch.func.functional_call(self.module, own, (y_BND,), self.options)
        if self.after is not None:
            out_BND = torch.func.functional_call(self.after, _under(f"{self.half.after}.", weights), (out_BND,))
        if watch is not None:
            watch(out_BND)
            out_BND = out_BND.clone()  # what is returned is added to in place
        return out_BND if bias is None else out_BND + bias


def _under(prefix: str, weights: Weights) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def _plus(plain: Tensor, layer: Any, y_BND: Tensor, up: Tensor | None) -> Tensor:
    """With an adapter whose A all heads share: y·Aᵀ·Bᵀ of the heads' own rows of B."""
    if up is None:
        return plain
    return _added(plain, F.linear(y_BND, layer.lora_a) * layer.lora_scale, up)


def _plus_shared(plain: Tensor, layer: Any, inner_BNF: Tensor, down: Tensor | None) -> Tensor:
    """With an adapter whose B all heads share: the heads' own columns of A, then Bᵀ."""
    if down is None:
        return plain
    return _added(plain, (inner_BNF @ down) * layer.lora_scale, layer.lora_b)


def _added(plain: Tensor, low_BNr: Tensor, up: Tensor) -> Tensor:
    """plain + low·upᵀ in one product, so that what is wide is passed over once."""
    return torch.addmm(plain.flatten(0, 1), low_BNr.flatten(0, 1), up.T).view_as(plain)
