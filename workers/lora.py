"""Low-rank adapters on the matrices of the blocks, cut with the heads: LoRA (arXiv 2106.09685).

A target W [O, I] is frozen, and W + (α/r)·B·A takes its place; A [r, I] is drawn, B [O, r] starts at 0. Both are
parameters of timm's own linear layer, so that they are cut, moved, saved and joined like all others:

    | target | of a head | shared by the heads of a block |
    | qkv, fc1 (with its gate) | its rows of B | A |
    | proj, fc2 | its columns of A | B |

What else trains is the classifier. The result is the plain model with the adapters merged into it, and beside it the
adapter in PEFT's layout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from scheduler.errors import UserError
from workers.anatomy import Model, bound
from workers.method import Lora
from workers.shapes import check_rank

DOWN, UP = "lora_a", "lora_b"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# The linear layers of a block that are meant by a target; of a gated MLP whose halves are apart, two.
_LAYERS = {
    "qkv": ("attn.qkv",),
    "proj": ("attn.proj",),
    "fc1": ("mlp.fc1", "mlp.fc1_g", "mlp.fc1_x"),
    "fc2": ("mlp.fc2",),
}


def attach(model: Model, lora: Lora, seed: int) -> None:
    """Freeze the model but for its classifier, and give its blocks adapters, drawn from `seed`; in place.

    Raises UserError (method.lora): "lora_refused" for blocks that cannot be cut, "lora_rank" for a rank that no
    target is wide enough for.
    """
    blocks: Any = model.blocks
    reason = bound(blocks[0]) or ("queries, keys and values apart" if blocks[0].attn.qkv is None else None)
    if reason is not None:
        raise UserError(
            f"Adapters cannot be cut with the heads of this model: {reason}.",
            code="lora_refused",
            param="method.lora",
            remedy="Leave method.lora away, or choose a model without that.",
        )
    for name, param in model.named_parameters():
        param.requires_grad_(name.startswith("head."))
    generator = torch.Generator().manual_seed(seed)
    for block in blocks:
        for layer in _targets(block, lora):
            check_rank(lora.rank, min(layer.in_features, layer.out_features))
            down = torch.empty(lora.rank, layer.in_features)
            # As PEFT and LoRA's authors draw it: Kaiming's bound with a = √5.
            down.uniform_(-1 / math.sqrt(layer.in_features), 1 / math.sqrt(layer.in_features), generator=generator)
            up = torch.zeros(layer.out_features, lora.rank)
            weight = layer.weight
            layer.register_parameter(DOWN, nn.Parameter(down.to(weight)))
            layer.register_parameter(UP, nn.Parameter(up.to(weight)))
            layer.lora_scale = lora.scale


def merged(state: Mapping[str, Tensor], lora: Lora) -> dict[str, Tensor]:
    """A plain timm state dict: every target with its adapter added, and no adapters."""
    plain = {key: value for key, value in state.items() if not key.endswith((f".{DOWN}", f".{UP}"))}
    for layer in _adapted(state):
        change = (state[f"{layer}.{UP}"].double() @ state[f"{layer}.{DOWN}"].double()) * lora.scale
        weight = plain[f"{layer}.weight"]
        plain[f"{layer}.weight"] = (weight.double() + change).to(weight.dtype)
    return plain


def adapter(state: Mapping[str, Tensor], lora: Lora) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(weights, configuration) as PEFT reads them, for the plain timm model that training began with."""
    names = {DOWN: "lora_A.weight", UP: "lora_B.weight"}
    weights = {
        f"base_model.model.{layer}.{theirs}": state[f"{layer}.{ours}"]
        for layer in _adapted(state)
        for ours, theirs in names.items()
    }
    weights |= {f"base_model.model.{key}": value for key, value in state.items() if key.startswith("head.")}
    suffixes = sorted({layer.partition(".")[2].partition(".")[2] for layer in _adapted(state)})
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        # An expression: `proj` alone would be the patch embedding, too.
        "target_modules": r"blocks\.\d+\.(" + "|".join(suffixes).replace(".", r"\.") + ")",
        "modules_to_save": ["head"],
        "base_model_name_or_path": None,
    }
    return weights, config


def _targets(block: nn.Module, lora: Lora) -> list[Any]:
    layers = dict(block.named_modules())
    return [layers[name] for target in lora.targets for name in _LAYERS[target] if name in layers]


def _adapted(state: Mapping[str, Tensor]) -> list[str]:
    return [key.removesuffix(f".{DOWN}") for key in state if key.endswith(f".{DOWN}")]
