"""What a head is worth, before training: the empirical Fisher information of a gate on it, and its weights' size.

A gate c = 1 multiplies the head's attention output and its slice of the MLP. For image i, ∂loss_i/∂c is the inner
product of those outputs with their gradients; its square, summed over images, is the Fisher information of the gate.
Only activations need gradients, so that a pass costs two thirds of a training pass and no memory for weight gradients.
Each worker scores other images on the whole model; the scheduler adds the sums up.

Shapes: L blocks, H heads, B images, N tokens, K head width, F hidden width of the MLP.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from scheduler.domain import ModelShape
from workers.partition import head_slices, model_shape


def fisher_sums(model: VisionTransformer, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, int]:
    """(Σ over images of (∂loss/∂gate)² [L, H] in float64, number of images); leaves the model as it was."""
    shape = model_shape(model)
    example = next(model.parameters())
    total_LH = torch.zeros(shape.num_blocks, shape.num_heads, dtype=torch.float64)
    count = 0
    frozen = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(False)
    try:
        for images_BCHW, labels_B in batches:
            sizes = (shape.num_blocks, len(labels_B), shape.num_heads)
            gates_LBH = torch.ones(sizes, dtype=example.dtype, device=example.device, requires_grad=True)
            with ExitStack() as stack:
                for block, gates_BH in zip(model.blocks, gates_LBH, strict=True):
                    stack.callback(_gate_attention(block, gates_BH, shape).remove)
                    stack.callback(_gate_mlp(block, gates_BH, shape).remove)
                loss = F.cross_entropy(
                    model(images_BCHW.to(example.device)), labels_B.to(example.device), reduction="sum"
                )
            (slope_LBH,) = torch.autograd.grad(loss, gates_LBH)
            total_LH += slope_LBH.double().square().sum(1).cpu()
            count += len(labels_B)
    finally:
        for param, requires_grad in frozen.items():
            param.requires_grad_(requires_grad)
    return total_LH, count


@torch.no_grad()
def weight_magnitudes(model: VisionTransformer) -> Tensor:
    """Root of the mean square of each head's weights, [L, H] in float64."""
    shape, state = model_shape(model), model.state_dict()
    return torch.tensor(
        [[_rms(head_slices(state, b, h, shape)) for h in range(shape.num_heads)] for b in range(shape.num_blocks)],
        dtype=torch.float64,
    )


def _gate_attention(block: Any, gates_BH: Tensor, shape: ModelShape) -> torch.utils.hooks.RemovableHandle:
    def gate(_: nn.Module, args: tuple[Tensor]) -> Tensor:
        heads_BNHK = args[0].unflatten(2, (shape.num_heads, -1))
        return (heads_BNHK * gates_BH[:, None, :, None]).flatten(2)

    return block.attn.proj.register_forward_pre_hook(gate)


def _gate_mlp(block: Any, gates_BH: Tensor, shape: ModelShape) -> torch.utils.hooks.RemovableHandle:
    widths = torch.tensor(shape.mlp_dims, device=gates_BH.device)

    def gate(_: nn.Module, args: tuple[Tensor]) -> Tensor:
        return args[0] * gates_BH.repeat_interleave(widths, dim=1)[:, None]

    return block.mlp.fc2.register_forward_pre_hook(gate)


def _rms(slices: dict[str, Tensor]) -> float:
    squares = sum(float(value.double().square().sum()) for value in slices.values())
    return float((squares / sum(value.numel() for value in slices.values())) ** 0.5)
