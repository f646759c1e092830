"""The judge of the engine: a plain timm model with masks, one process, no cleverness.

Op semantics as in the engine's README; shapes: B images, N tokens, D width, H heads, K head width.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from timm.models import eva, vision_transformer

from scheduler.domain import Op


def masked_forward(model, images, ops_LH, *, skip_fill="zero", means=None, embed_grad=True):
    """Logits under one micro-batch's ops; gradients follow by autograd."""
    with torch.set_grad_enabled(embed_grad):
        x, options = embedded(model, images)
    for index, block in enumerate(model.blocks):
        ops_H = ops_LH[index]
        if (ops_H == Op.SKIP).all():
            continue
        for part, name, scale in (("attn", "norm1", scale_of(block, 1)), ("mlp", "norm2", scale_of(block, 2))):
            norm, after = getattr(block, name), None
            if type(block) in (vision_transformer.ResPostBlock, eva.EvaBlockPostNorm):
                norm, after = torch.nn.Identity(), norm
            own_options = options if part == "attn" else {}
            outs, bias = heads_of(getattr(block, part), part, len(ops_H), norm(x), own_options, after)
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
            branch = scale * (total if bias is None else total + bias)
            x = x + (branch if (ops_H == Op.FULL).any() else branch.detach())
    return model.forward_head(model.norm(x))


def embedded(model, images):
    """(residual stream before block 0, what timm gives every attention besides)."""
    seen = []
    first = model.blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0], kwargs)), with_kwargs=True
    )
    try:
        model(images)
    finally:
        first.remove()
    x, kwargs = seen[0]
    return x, {name: value for name, value in kwargs.items() if value is not None}


def scale_of(block, half):
    """γ of a half, whatever timm calls it."""
    found = getattr(block, f"gamma_{half}", None)
    found = getattr(getattr(block, f"ls{half}", None), "gamma", None) if found is None else found
    return 1.0 if found is None else found


def heads_of(module, part, num_heads, y, options=None, after=None):
    """Each head's contribution to a sub-layer, and the output bias: timm's own module up to its last matrix.

    One head is all that the half adds, bias and norm behind it included.
    """
    options = options or {}
    if num_heads == 1:
        out = module(y, **options)
        return [out if after is None else after(out)], None
    last = "proj" if part == "attn" else "fc2"
    linear = getattr(module, last)
    setattr(module, last, torch.nn.Identity())
    try:
        inner = module(y, **options)
    finally:
        setattr(module, last, linear)
    bounds = [inner.shape[-1] * i // num_heads for i in range(num_heads + 1)]
    return [inner[..., a:b] @ linear.weight[:, a:b].T for a, b in pairwise(bounds)], linear.bias


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
