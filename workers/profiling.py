"""What a worker finds out about itself before training: µs per head on the job's own shapes, links, free memory.

Curves are measured for a few head counts and interpolated. Every figure is a mean over a stretch of time, the median of
three, in which all workers compute: those that share a core take turns of some ms, which single short runs do not show.
Runs go over one block after another, since a step does not find in the cache what its last sub-layer left there. It is
a first guess: live timings replace it.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scheduler.cost import residual_bytes
from scheduler.domain import SUBLAYERS, DeviceProfile, LinkProfile, ModelShape, Placement, StepShape
from scheduler.program import MessageKey
from workers.anatomy import Model
from workers.facts import device_facts, device_id, device_name
from workers.lean import update
from workers.memory import room
from workers.partition import model_shape
from workers.shard import BlockShard, Shard
from workers.transport import Parcel, Transport, all_gather

REPEATS = 5  # echoes of a message
SLOTS = 6  # residual streams that sums take turns on
STRETCH_S = 0.04  # ten turns of a shared core
STRETCHES = 3
BURST = 4  # messages that every transport takes without waiting for their reader
PROFILED_BYTES = 128 << 20  # of blocks that runs take turns on: more than a cache holds
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed tensors' pages instead of returning them to the kernel; False where there is no glibc.

    Activations of some MB are allocated and freed thousands of times a step. With glibc's defaults each one is mapped
    afresh, and its page faults cost more than the arithmetic of a residual sum.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return False
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30))


def profile_device(
    model: Model,
    step: StepShape,
    transport: Transport,
    *,
    node: str = "local",
    labels: dict[str, str] | None = None,
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
    sharers: int = 1,
    limit_bytes: int | None = None,
) -> DeviceProfile:
    """Profile this worker; every worker of the group must call it at the same time, since links are measured pairwise.

    `sharers` is the number of workers that share this machine's (or GPU's) memory, `limit_bytes` the most that this one
    may take of it in all. Of the model some blocks are copied, not all: a worker may not hold it twice.
    """
    shape = model_shape(model)
    shard = Shard(model, _some_blocks(shape), 0, device)
    stopwatch = _Stopwatch(shard, step, autocast)
    _together(transport, shard.device)
    curves = {part: stopwatch.curves(part) for part in SUBLAYERS}
    end_us, update_us = stopwatch.step_end_us()
    message_bytes = residual_bytes(shape, step)
    send_us, recv_us = measure_handling(transport, shard.dtype, shard.device, message_bytes)
    embed_us, classify_us, sum_us = stopwatch.embed_us(), stopwatch.classify_us(), stopwatch.sum_us()
    links = measure_links(transport, shard.dtype, shard.device, message_bytes, send_us + recv_us)
    trunk_us, samples, where = stopwatch.trunk_us(), stopwatch.samples, shard.device
    del stopwatch, shard
    _together(transport, where)  # nobody holds copies any more
    model_bytes = sum(param.nbytes for param in model.parameters())
    has = room(model_bytes, where, sharers, limit_bytes)
    facts = device_facts(where)
    return DeviceProfile(
        rank=transport.rank,
        node=node,
        device=device_name(facts),
        attn_forward_us=curves["attn"][0],
        attn_backward_us=curves["attn"][1],
        mlp_forward_us=curves["mlp"][0],
        mlp_backward_us=curves["mlp"][1],
        embed_us=embed_us,
        classify_us=classify_us,
        sum_us=sum_us,
        update_us=update_us,
        free_bytes=has.free_bytes,
        links=links,
        labels=labels or {},
        measured_at=time.time(),
        send_us=send_us,
        recv_us=recv_us,
        trunk_us=trunk_us,
        end_us=end_us,
        device_id=device_id(facts),
        facts=facts,
        samples=samples,
        base_bytes=has.base_bytes,
        limit_bytes=limit_bytes or 0,
    )


def measure_links(
    transport: Transport,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    message_bytes: int = 1 << 20,
    handled_us: int = 0,
) -> tuple[LinkProfile | None, ...]:
    """Latency and width of the link to every peer, from echoes of a small and a large message; collective.

    The large one has the size that a step sends, as small and large ones may travel by other ways. `handled_us` of its
    time keep the workers busy at either end, and are no part of the link's.
    """
    small, large = _messages(dtype, device, message_bytes)
    out: list[LinkProfile | None] = [None] * transport.size
    for peer in _peers_in_turn(transport):
        latency_s = _echo_s(transport, peer, small)
        large_s = _echo_s(transport, peer, large)
        wire_s = max(large_s - latency_s - handled_us / 1e6, large_s / 50, 1e-7)
        rate = int(large.nbytes / wire_s)
        out[peer] = LinkProfile(max(1, round(latency_s * 1e6)), max(1, rate))
    return tuple(out)


def measure_handling(
    transport: Transport, dtype: torch.dtype, device: torch.device | str, message_bytes: int
) -> tuple[int, int]:
    """µs that handing a large message to the transport, and taking an arrived one out, keep this worker busy.

    Collective; (0, 0) for one worker.
    """
    small, large = _messages(dtype, device, message_bytes)
    sent_s, read_s = [], []
    for peer in _peers_in_turn(transport):
        _echo_s(transport, peer, small)  # both are here now
        sent, read = _burst_s(transport, peer, large, _echo_s(transport, peer, large))
        sent_s.append(sent)
        read_s.append(read)
    if not sent_s:
        return 0, 0
    return max(1, round(statistics.median(sent_s) * 1e6)), max(1, round(statistics.median(read_s) * 1e6))


class _Stopwatch:
    """Times the pieces of a step on synthetic activations of the job's shapes; `samples` counts runs of sub-layers."""

    def __init__(self, shard: Shard, step: StepShape, autocast: torch.dtype | None) -> None:
        self.shard, self.autocast, self.recompute, self.samples = shard, autocast, step.recompute, 0
        self.blocks: list[BlockShard] = list(shard.blocks.values())
        generator = torch.Generator().manual_seed(0)
        shape = (step.micro_batch_size, shard.shape.num_tokens, shard.shape.dim)
        self.x_BND = torch.randn(shape, generator=generator, dtype=shard.dtype).to(shard.device)
        self.batch = step.micro_batch_size

    def curves(self, part: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(forward, backward) µs for 0 … H heads run together."""
        num_heads = self.shard.shape.num_heads
        counts = sorted({1, 2, (num_heads + 1) // 2, num_heads} & set(range(1, num_heads + 1)))
        measured = [self._forward_backward_us(part, tuple(range(count))) for count in counts]
        forward, backward = zip(*measured, strict=True)
        return _interpolate(counts, forward, num_heads), _interpolate(counts, backward, num_heads)

    def embed_us(self) -> int:
        stem = self.shard._ends.patch_embed
        sizes = (self.batch, stem.proj.in_channels, *stem.img_size)
        images = torch.zeros(sizes, dtype=self.shard.dtype, device=self.shard.device)

        def run(_: int) -> None:
            x_BND = self.shard.embed(images)
            if x_BND.requires_grad:
                x_BND.backward(self.x_BND)

        return self._typical_us(run)

    def classify_us(self) -> int:
        labels_B = torch.zeros(self.batch, dtype=torch.long, device=self.shard.device)

        def run(_: int) -> None:
            logits_BC = self.shard.classify(self.x_BND.detach().requires_grad_())
            F.cross_entropy(logits_BC, labels_B).backward()
            (logits_BC.argmax(1) == labels_B).sum()

        return self._typical_us(run)

    def sum_us(self) -> int:
        """One part added: half of what two take, each from memory that the last runs have not touched."""
        parts = torch.zeros((SLOTS, 3, *self.x_BND.shape), dtype=self.shard.dtype, device=self.shard.device)
        gamma = self.x_BND[0, 0]

        def run(repeat: int) -> Tensor:
            x, one, other = parts[repeat % SLOTS]
            return torch.addcmul(x, one + other, gamma)

        return max(1, self._typical_us(run) // 2)

    @torch.no_grad()
    def trunk_us(self) -> int:
        """Packing the gradients of one block's trunk and taking them apart again."""
        of_blocks = [[p for _, p in block.trunk.parameters() if p.requires_grad] for block in self.blocks]
        params, count = [p for of_block in of_blocks for p in of_block], sum(map(bool, of_blocks))
        if not params:
            return 1
        sizes = [p.numel() for p in params]

        def run(_: int) -> None:
            flat = torch.cat([p.flatten() for p in params])
            for part, param in zip(flat.split(sizes), params, strict=True):
                part.view_as(param)

        return max(1, self._typical_us(run) // count)

    def step_end_us(self) -> tuple[int, int]:
        """(µs of a step's end, µs more for each head trained): gradient norms and the update."""
        few, many = 1, min(2, len(self.blocks)) * self.shard.shape.num_heads
        low = self._update_us(few)
        slope = (self._update_us(many) - low) / (many - few) if many > few else low / 2
        return max(1, round(low - slope)), max(1, round(slope))

    def _update_us(self, num_heads: int) -> int:
        heads = [head for block in self.blocks for head in block.params.values()]
        trained = [p for head in heads[:num_heads] for p in head.values() if p.requires_grad]
        if not trained:
            return 1
        params = [p.detach().requires_grad_() for p in trained]  # a rate of 0 leaves them as they are
        grads = [torch.zeros_like(p) for p in params]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimiser = torch.optim.AdamW(params, lr=0.0, fused=True)

        def run(_: int) -> None:
            torch.stack(torch._foreach_norm(grads)).double().square().sum().item()
            update(optimiser)

        return self._typical_us(run)

    def _forward_backward_us(self, part: str, heads: tuple[int, ...]) -> tuple[int, int]:
        def run(repeat: int) -> tuple[float, float]:
            block = self.blocks[repeat % len(self.blocks)]
            leaf = self.x_BND.detach().clone().requires_grad_()

            def forward() -> Tensor:
                with torch.autocast(self.shard.device.type, dtype=self.autocast, enabled=self.autocast is not None):
                    return block.run(part, block.norms[part](leaf), block.trainable(part, heads, self.autocast))

            begin = self._now()
            out = forward()
            middle = self._now()
            if self.recompute:
                out = forward()
            torch.autograd.backward(out, torch.ones_like(out))
            return middle - begin, self._now() - middle

        forward_us, backward_us = self._means_us(run)
        self.samples += 2 * STRETCHES
        return forward_us, backward_us

    def _typical_us(self, run: Callable[[int], object]) -> int:
        """What runs 1, 2, … take; run 0 warms up."""

        def timed(repeat: int) -> tuple[float]:
            begin = self._now()
            run(repeat)
            return (self._now() - begin,)

        return self._means_us(timed)[0]

    def _means_us(self, run: Callable[[int], tuple[float, ...]]) -> list[int]:
        """Mean µs of each of the seconds that `run` returns, over stretches of time; the median of these means."""
        run(0)
        means, repeat = [], 0
        for _ in range(STRETCHES):
            begin = time.perf_counter()
            found: list[tuple[float, ...]] = []
            while len(found) < 2 or time.perf_counter() - begin < STRETCH_S:
                repeat += 1
                found.append(run(repeat))
            means.append([statistics.fmean(column) for column in zip(*found, strict=True)])
        self.shard.clear()
        return [max(1, round(1e6 * statistics.median(column))) for column in zip(*means, strict=True)]

    def _now(self) -> float:
        if self.shard.device.type == "cuda":
            torch.cuda.synchronize(self.shard.device)
        return time.perf_counter()


def _interpolate(counts: list[int], values: tuple[int, ...], num_heads: int) -> tuple[int, ...]:
    """Values for 0 … num_heads: linear between measured counts, never falling."""
    curve = np.interp(range(num_heads + 1), counts, np.maximum.accumulate(values))
    return (0, *(max(1, round(v)) for v in curve[1:]))


def _echo_s(transport: Transport, peer: int, message: torch.Tensor) -> float:
    """Half the median time of a round trip."""
    leader = transport.rank < peer
    out: list[MessageKey] = [("echo", i, "", message.numel(), transport.rank, peer) for i in range(REPEATS)]
    back: list[MessageKey] = [("echo", i, "", message.numel(), peer, transport.rank) for i in range(REPEATS)]
    transport.open({peer: [Parcel(key, tuple(message.shape), message.dtype) for key in back]})
    seconds = []
    for sent, received in zip(out, back, strict=True):
        begin = time.perf_counter()
        if leader:
            transport.send(peer, sent, message)
        transport.recv(peer, received)
        if not leader:
            transport.send(peer, sent, message)
        seconds.append(time.perf_counter() - begin)
    transport.close()
    # The first round trip waits for the peer to arrive; the follower's time is the leader's but for that.
    return statistics.median(seconds[1:]) / 2


def _burst_s(transport: Transport, peer: int, message: torch.Tensor, way_s: float) -> tuple[float, float]:
    """Seconds to send one of several messages, and to read one that has arrived; each is under way for `way_s`."""
    own, other = [
        [("burst", i, "", message.numel(), src, dst) for i in range(BURST)]
        for src, dst in ((transport.rank, peer), (peer, transport.rank))
    ]
    transport.open({peer: [Parcel(key, tuple(message.shape), message.dtype) for key in other]})
    sent_s, read_s = [], []
    for key in own:
        sent_s.append(_seconds(partial(transport.send, peer, key, message)))
    # A transport may take a message long before it is sent, so how long sending took says nothing of its arrival.
    time.sleep(2 * (sum(sent_s) + BURST * way_s))
    for key in other:
        read_s.append(_seconds(partial(transport.recv, peer, key)))
    transport.close()
    # A late message shows as waiting: only the quickest ones had surely arrived.
    return statistics.median(sent_s), min(read_s)


def _seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _messages(dtype: torch.dtype, device: torch.device | str, message_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
    small = torch.zeros(1, dtype=dtype, device=device)
    return small, torch.zeros(max(2, message_bytes // small.element_size()), dtype=dtype, device=device)


def _peers_in_turn(transport: Transport) -> Iterator[int]:
    """This worker's peers, in an order of pairs that is the same on all workers."""
    for first in range(transport.size):
        for second in range(first + 1, transport.size):
            if transport.rank in (first, second):
                yield second if transport.rank == first else first


def _some_blocks(shape: ModelShape) -> Placement:
    """The first block and the last, of so many bytes that no cache holds them, for worker 0; others are nobody's here.

    The last ones are those that train where not all do.
    """
    block_bytes = 4 * (sum(shape.head_params) + shape.norm_params)
    count = min(shape.num_blocks, max(2, -(-PROFILED_BYTES // block_bytes)))
    owner_LH = np.ones((shape.num_blocks, shape.num_heads), dtype=np.int64)
    owner_LH[0] = owner_LH[1 - count :] = 0
    return Placement(owner_LH, 2, 0)


def _together(transport: Transport, device: torch.device) -> None:
    """Go on when all workers are here."""
    all_gather(transport, torch.zeros(1, device=device))
