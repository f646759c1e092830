"""What the workers tell each other besides steps: small JSON values, and their parts of the model.

Named tensors travel as safetensors, values as JSON, nothing as pickles.
"""

from __future__ import annotations

import json
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from scheduler.program import MessageKey
from workers.shard import Shard, join
from workers.transport import Parcel, Transport, all_gather


def gather_state(shard: Shard, transport: Transport, template: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """The whole model's plain timm state dict at rank 0, None elsewhere; collective.

    `template` has the names, shapes and types, as meta tensors.
    """
    blob = safetensors.torch.save({name: t.cpu().contiguous() for name, t in shard.spoken_for().items()})
    sizes = all_gather(transport, torch.tensor([len(blob)], device=shard.device))
    payload = torch.frombuffer(bytearray(blob), dtype=torch.uint8).to(shard.device)
    if transport.rank:
        transport.open({})
        transport.send(0, _key(transport.rank), payload)
        transport.close()
        return None
    peers = range(1, transport.size)
    transport.open({src: [Parcel(_key(src), (int(sizes[src]),), torch.uint8)] for src in peers})
    state = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in template.items()}
    for blob_of in [payload, *(transport.recv(src, _key(src)) for src in peers)]:
        join(safetensors.torch.load(blob_of.cpu().numpy().tobytes()), state, shard.cut)
    transport.close()
    return state


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
