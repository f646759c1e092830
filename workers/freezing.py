"""What of a model trains: everything, adapters instead, or less.

It is said by `requires_grad` on timm's own parameters, from where `partition.cut_of` reads it: the shape that the
planner gets, the slices that keep gradients, and what workers send each other all follow from that.
"""

from __future__ import annotations

from typing import Any

from workers.anatomy import Model, is_classifier
from workers.lora import attach
from workers.method import Method
from workers.partition import cut_of
from workers.shapes import check_frozen_blocks


def choose_trained(model: Model, method: Method, seed: int) -> None:
    """Freeze what `method` does not train, in place; adapters are drawn from `seed`.

    Raises UserError: "freeze_blocks" (method.freeze.blocks) where no block is left, and those of `lora.attach`.
    """
    if method.lora is not None:
        attach(model, method.lora, seed)
    for name, param in model.named_parameters():
        if method.head_only and not name.startswith("head."):
            param.requires_grad_(False)
    if method.freeze is None:
        return
    blocks: Any = model.blocks
    check_frozen_blocks(method.freeze.blocks, len(blocks))
    of_heads = {piece.key for pieces in cut_of(model).slices.values() for piece in pieces}
    for index, block in enumerate(blocks):
        for name, param in block.named_parameters():
            if index < method.freeze.blocks or (method.freeze.trunk and name not in of_heads):
                param.requires_grad_(False)
    for name, param in model.named_parameters():
        if not name.startswith("blocks.") and not is_classifier(name):
            param.requires_grad_(False)
