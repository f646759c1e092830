"""What the workers tell each other besides steps: small JSON values, and their parts of the model.

Named tensors travel as safetensors, values as JSON, nothing as pickles. The model comes block by block, so that rank 0
holds it once, beside its own part, and never a second time as messages.
"""

from __future__ import annotations

import json
import re
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from scheduler.program import MessageKey
from workers.shard import Shard, join
from workers.transport import Parcel, Transport, all_gather

_OF_BLOCK = re.compile(r"b(?:locks\.)?(\d+)\.")  # b03.h1.qkv_w, blocks.3.norm1.weight


def gather_state(shard: Shard, transport: Transport, template: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """The whole model's plain timm state dict at rank 0, None elsewhere; collective.

    `template` has the names, shapes and types, as meta tensors.
    """
    state = None if transport.rank else {name: torch.empty(t.shape, dtype=t.dtype) for name, t in template.items()}
    own = shard.spoken_for()
    for block in (None, *range(shard.shape.num_blocks)):
        _gather_part({name: t for name, t in own.items() if _block_of(name) == block}, shard, transport, state)
    return state


def _gather_part(own: dict[str, Tensor], shard: Shard, transport: Transport, state: dict[str, Tensor] | None) -> None:
    """Join every worker's part of one block, or of the ends, into rank 0's `state`."""
    blob = safetensors.torch.save({name: t.cpu().contiguous() for name, t in own.items()})
    sizes = all_gather(transport, torch.tensor([len(blob)], device=shard.device))
    payload = torch.frombuffer(bytearray(blob), dtype=torch.uint8).to(shard.device)
    if state is None:
        transport.open({})
        transport.send(0, _key(transport.rank), payload)
        transport.close()
        return
    peers = range(1, transport.size)
    transport.open({src: [Parcel(_key(src), (int(sizes[src]),), torch.uint8)] for src in peers})
    for blob_of in [payload, *(transport.recv(src, _key(src)) for src in peers)]:
        join(safetensors.torch.load(blob_of.cpu().numpy().tobytes()), state, shard.cut)
    transport.close()


def _block_of(name: str) -> int | None:
    """The block that a parameter belongs to; None for the ends."""
    found = _OF_BLOCK.match(name)
    return None if found is None else int(found[1])


def gather_json(transport: Transport, value: Any, device: torch.device | str = "cpu") -> list[Any]:
    """Every worker's value, in rank order; collective."""
    text = json.dumps(value).encode()
    sizes = [int(size) for size in all_gather(transport, torch.tensor([len(text)], device=device))]
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
    padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    everyone = all_gather(transport, padded)
    return [json.loads(bytes(t[:size].tolist())) for t, size in zip(everyone, sizes, strict=True)]


def _key(src: int) -> MessageKey:
    return ("state", 0, "", 0, src, 0)
