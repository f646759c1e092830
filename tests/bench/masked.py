"""A plain timm vision transformer whose heads run, train and let gradients through as factors say; no engine in it.

Factors are [L, H], one for each of three things a head does: `run` scales what it adds, `weights` the gradient of its
weights, `path` the gradient that goes through it to what lies below. FULL is (1, 1, 1), FORWARD (1, 0, 0), SKIP all 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Factors(NamedTuple):
    """[L, H] each."""

    run: Tensor
    weights: Tensor
    path: Tensor

    @classmethod
    def of(cls, run_LH, weights_LH, path_LH, device):
        return cls(*(torch.as_tensor(f, dtype=torch.float32, device=device) for f in (run_LH, weights_LH, path_LH)))


def features_of(model, images_BCHW, factors=None):
    """What goes into `model.forward_head`; without factors every head is FULL."""
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images_BCHW))))
    for index, block in enumerate(model.blocks):
        if factors is None:
            x = block(x)
            continue
        run_H, weights_H, path_H = (f[index] for f in factors)
        x = x + block.ls1(_attention(block.attn, block.norm1(x), run_H, weights_H, path_H))
        x = x + block.ls2(_mlp(block.mlp, block.norm2(x), run_H, weights_H, path_H))
    return model.norm(x)


def _attention(attn, y, run_H, weights_H, path_H):
    b, n, _ = y.shape
    dim = attn.head_dim
    of_weight, of_input = (v.repeat_interleave(dim).repeat(3) for v in (weights_H, path_H))
    qkv = _Rows.apply(y, attn.qkv.weight, attn.qkv.bias, of_weight, of_input)
    q, k, v = qkv.reshape(b, n, 3, attn.num_heads, dim).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(attn.q_norm(q), attn.k_norm(k), v).transpose(1, 2).flatten(2)
    out = out * run_H.repeat_interleave(dim).to(out.dtype)
    return _Columns.apply(out, attn.proj.weight, weights_H.repeat_interleave(dim)) + attn.proj.bias


def _mlp(mlp, y, run_H, weights_H, path_H):
    width = mlp.fc1.out_features // len(run_H)
    run, of_weight, of_input = (v.repeat_interleave(width) for v in (run_H, weights_H, path_H))
    hidden = mlp.act(_Rows.apply(y, mlp.fc1.weight, mlp.fc1.bias, of_weight, of_input))
    return _Columns.apply(hidden * run.to(hidden.dtype), mlp.fc2.weight, of_weight) + mlp.fc2.bias


class _Rows(torch.autograd.Function):
    """y Wᵀ + b, whose gradients to W and b are scaled row by row, and to y by other factors."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda", cast_inputs=torch.bfloat16)
    def forward(ctx, y, weight, bias, of_weight, of_input):
        ctx.save_for_backward(y, weight, of_weight, of_input)
        return F.linear(y, weight, bias)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cuda")
    def backward(ctx, grad):
        y, weight, of_weight, of_input = ctx.saved_tensors
        scaled = grad * of_weight
        return (grad * of_input) @ weight, scaled.flatten(0, 1).T @ y.flatten(0, 1), scaled.sum((0, 1)), None, None


class _Columns(torch.autograd.Function):
    """z Wᵀ, whose gradient to W is scaled column by column."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda", cast_inputs=torch.bfloat16)
    def forward(ctx, z, weight, of_weight):
        ctx.save_for_backward(z, weight, of_weight)
        return F.linear(z, weight)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cuda")
    def backward(ctx, grad):
        z, weight, of_weight = ctx.saved_tensors
        return grad @ weight, grad.flatten(0, 1).T @ (z * of_weight).flatten(0, 1), None
