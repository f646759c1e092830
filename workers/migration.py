"""Migration: between two windows heads move to other workers, with their weights and AdamW's state; training goes on.

    old placement, new placement ─► moves: who sends what to whom ─► one blob per pair ─► shard, optimiser rebuilt

Only what a worker lacks is sent: heads from their old owner; trunk units that it newly holds (a block's norms, layer
scales and biases; the embedding) from the lowest rank that holds them, as replicas are equal bit for bit; the
classifier from its worker. What stays is not copied, but for the weights of a block whose heads change: they lie in one
bank. What left is freed. No process restarts and no other worker than those concerned sends a byte.

Tensors travel as safetensors: NAME the weights, NAME|exp_avg, NAME|exp_avg_sq and NAME|step AdamW's state, which a
parameter that never had a gradient does not have.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from scheduler.domain import Placement
from scheduler.program import EMBED_UNIT, MessageKey
from workers.optimiser import Adam, State
from workers.shard import Shard
from workers.transport import Parcel, Transport, all_gather

CLASSIFIER = "classifier"


@dataclass(frozen=True)
class Move:
    """What goes from a worker to another: a "head", a trunk "unit" (block -1: the embedding), the "classifier"."""

    src: int
    dst: int
    kind: str
    block: int = 0
    head: int = 0


@dataclass(frozen=True)
class Migrated:
    """What a migration took on this worker; `sent_bytes` per destination, `moved_heads` of the whole group."""

    moved_heads: int
    sent_bytes: tuple[int, ...]
    seconds: float


def moves(old: Placement, new: Placement) -> tuple[Move, ...]:
    """What has to be sent so that every worker has what the new placement gives it, in a fixed order."""
    changed = np.argwhere(old.owner_LH != new.owner_LH)
    out = [
        Move(int(old.owner_LH[block, head]), int(new.owner_LH[block, head]), "head", int(block), int(head))
        for block, head in changed
    ]
    for block in range(len(old.owner_LH)):
        held = old.holders(block)
        out += [Move(min(held), worker, "unit", block) for worker in new.holders(block) if worker not in held]
    out += [Move(min(old.embedders), worker, "unit", EMBED_UNIT) for worker in sorted(new.embedders - old.embedders)]
    if old.classifier != new.classifier:
        out.append(Move(old.classifier, new.classifier, CLASSIFIER))
    return tuple(out)


def migrate(shard: Shard, adam: Adam, transport: Transport, placement: Placement) -> Migrated:
    """Change this worker's shard and optimiser to `placement`, in place; collective, between two steps."""
    begin = time.perf_counter()
    planned = moves(shard.placement, placement)
    blobs = _exchange([move for move in planned if transport.rank in (move.src, move.dst)], shard, adam, transport)
    arrived: dict[str, Tensor] = {}
    state: State = {}
    for name, tensor in blobs.items():
        param, _, entry = name.partition("|")
        if entry:
            state.setdefault(param, {})[entry] = tensor
        else:
            arrived[param] = tensor
    shard.rebuild(placement, arrived)
    adam.rebuild(shard, state)
    moved_heads = sum(move.kind == "head" for move in planned)
    return Migrated(moved_heads, tuple(transport.sent_bytes), time.perf_counter() - begin)


def _exchange(mine: list[Move], shard: Shard, adam: Adam, transport: Transport) -> dict[str, Tensor]:
    """Send and receive one blob per pair of workers; the tensors that arrived, on the shard's device."""
    rank = transport.rank
    blobs = {
        dst: _pack([move for move in mine if move.src == rank and move.dst == dst], shard, adam)
        for dst in sorted({move.dst for move in mine if move.src == rank})
    }
    sizes_W = torch.zeros(transport.size, dtype=torch.int64, device=shard.device)
    for dst, blob in blobs.items():
        sizes_W[dst] = len(blob)
    sizes_WW = torch.stack(all_gather(transport, sizes_W)).tolist()
    sources = [src for src in range(transport.size) if sizes_WW[src][rank]]
    transport.open({src: [Parcel(_key(src, rank), (sizes_WW[src][rank],), torch.uint8)] for src in sources})
    for dst, blob in blobs.items():
        transport.send(dst, _key(rank, dst), blob.to(shard.device))
    found: dict[str, Tensor] = {}
    for src in sources:
        content = transport.recv(src, _key(src, rank)).cpu().numpy().tobytes()
        found |= {name: tensor.to(shard.device) for name, tensor in safetensors.torch.load(content).items()}
    transport.close()
    return found


def _pack(moved: list[Move], shard: Shard, adam: Adam) -> Tensor:
    tensors: dict[str, Tensor] = {}
    for move in moved:
        for name, param in _parameters(move, shard):
            tensors[name] = param.detach()
            tensors |= {f"{name}|{entry}": value for entry, value in adam.state_of(name).items()}
    blob = safetensors.torch.save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
    return torch.frombuffer(bytearray(blob), dtype=torch.uint8)


def _parameters(move: Move, shard: Shard) -> list[tuple[str, torch.nn.Parameter]]:
    if move.kind == "head":
        return list(shard.blocks[move.block].head_parameters(move.head))
    return shard.unit(move.block) if move.kind == "unit" else shard.classifier()


def _key(src: int, dst: int) -> MessageKey:
    return ("migration", 0, "", 0, src, dst)
