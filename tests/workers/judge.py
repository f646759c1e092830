"""The judge of the engine: a plain timm model with masks, one process, no cleverness.

Op semantics as in the engine's README; shapes: B images, N tokens, D width, H heads, K head width.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

from scheduler.domain import Op


def masked_forward(model, images, ops_LH, *, skip_fill="zero", means=None, embed_grad=True):
    """Logits under one micro-batch's ops; gradients follow by autograd."""
    with torch.set_grad_enabled(embed_grad):
        x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    for index, block in enumerate(model.blocks):
        ops_H = ops_LH[index]
        if (ops_H == Op.SKIP).all():
            continue
        for part, heads_of, norm, scale in (
            ("attn", attn_heads, block.norm1, block.ls1),
            ("mlp", mlp_heads, block.norm2, block.ls2),
        ):
            outs, bias = heads_of(block, norm(x))
            total = torch.zeros_like(x)
            for head, out in enumerate(outs):
                if ops_H[head] == Op.FULL:
                    total = total + out
                elif ops_H[head] == Op.FORWARD:
                    total = total + out.detach()
            if skip_fill == "rescale":
                total = total * (len(ops_H) / (ops_H != Op.SKIP).sum())
            if skip_fill == "mean":
                total = total + means[index, part][torch.as_tensor(ops_H == Op.SKIP)].sum(0)
            branch = scale(total if bias is None else total + bias)
            x = x + (branch if (ops_H == Op.FULL).any() else branch.detach())
    return model.forward_head(model.norm(x))


def attn_heads(block, y):
    """Each head's contribution to the attention sub-layer, and the output bias."""
    attn = block.attn
    b, n, _ = y.shape
    q, k, v = attn.qkv(y).reshape(b, n, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    out_BHNK = F.scaled_dot_product_attention(q, k, v)
    columns = attn.proj.weight.split(attn.head_dim, dim=1)
    return [out_BHNK[:, h] @ columns[h].T for h in range(attn.num_heads)], attn.proj.bias


def mlp_heads(block, y):
    """Each head's share of the MLP, and the output bias."""
    hidden = block.mlp.act(block.mlp.fc1(y))
    bounds = [hidden.shape[-1] * i // block.attn.num_heads for i in range(block.attn.num_heads + 1)]
    shares = [slice(a, b) for a, b in pairwise(bounds)]
    return [hidden[..., s] @ block.mlp.fc2.weight[:, s].T for s in shares], block.mlp.fc2.bias


def masked_loss(model, batches, ops_LHM, label_smoothing=0.0, **options):
    """Mean over the micro-batches that some head runs for; `batches` is a list of (images, labels)."""
    losses = []
    for m, (images, labels) in enumerate(batches):
        ops_LH = np.asarray(ops_LHM)[:, :, m]
        if (ops_LH == Op.SKIP).all():
            continue
        logits = masked_forward(model, images, ops_LH, **options)
        losses.append(F.cross_entropy(logits, labels, label_smoothing=label_smoothing))
    return torch.stack(losses).mean() if losses else 0.0 * next(model.parameters()).sum()
