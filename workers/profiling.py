"""What a worker finds out about itself before training: µs per head on the job's own shapes, links, free memory.

Curves are measured for a few head counts and interpolated; every figure is the median of several runs. All workers
profile at the same time, so that cores they share are shared in the profile too.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable

import numpy as np
import psutil
import torch
from timm.models.vision_transformer import VisionTransformer

from scheduler.domain import SUBLAYERS, DeviceProfile, LinkProfile, Placement, StepShape
from scheduler.program import MessageKey
from workers.partition import model_shape
from workers.shard import BlockShard, Shard
from workers.transport import Parcel, Transport

REPEATS = 5
LARGE_MESSAGE_BYTES = 1 << 20
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
    model: VisionTransformer,
    step: StepShape,
    transport: Transport,
    *,
    node: str = "local",
    labels: dict[str, str] | None = None,
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
    sharers: int = 1,
) -> DeviceProfile:
    """Profile this worker; every worker of the group must call it at the same time, since links are measured pairwise.

    `sharers` is the number of workers that share this machine's (or GPU's) memory.
    """
    shape = model_shape(model)
    whole = Placement.make(np.zeros((shape.num_blocks, shape.num_heads), dtype=int), 1)
    shard = Shard(model, whole, 0, device)
    stopwatch = _Stopwatch(shard, step, autocast)
    curves = {part: stopwatch.curves(part) for part in SUBLAYERS}
    return DeviceProfile(
        rank=transport.rank,
        node=node,
        device=_device_name(shard.device),
        attn_forward_us=curves["attn"][0],
        attn_backward_us=curves["attn"][1],
        mlp_forward_us=curves["mlp"][0],
        mlp_backward_us=curves["mlp"][1],
        embed_us=stopwatch.embed_us(),
        classify_us=stopwatch.classify_us(),
        sum_us=stopwatch.sum_us(),
        update_us=stopwatch.update_us(),
        free_bytes=_free_bytes(shard.device) // sharers,
        links=measure_links(transport, shard.dtype, shard.device),
        labels=labels or {},
        measured_at=time.time(),
    )


def measure_links(
    transport: Transport, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[LinkProfile | None, ...]:
    """Latency and width of the link to every peer, from echoes of a small and a large message; collective."""
    small = torch.zeros(1, dtype=dtype, device=device)
    large = torch.zeros(LARGE_MESSAGE_BYTES // small.element_size(), dtype=dtype, device=device)
    out: list[LinkProfile | None] = [None] * transport.size
    for first in range(transport.size):
        for second in range(first + 1, transport.size):
            if transport.rank in (first, second):
                peer = second if transport.rank == first else first
                latency_s = _echo_s(transport, peer, small)
                large_s = _echo_s(transport, peer, large)
                rate = int(LARGE_MESSAGE_BYTES / max(large_s - latency_s, 1e-7))
                out[peer] = LinkProfile(max(1, round(latency_s * 1e6)), max(1, rate))
    return tuple(out)


class _Stopwatch:
    """Times the pieces of a step on synthetic activations of the job's shapes."""

    def __init__(self, shard: Shard, step: StepShape, autocast: torch.dtype | None) -> None:
        self.shard, self.block = shard, shard.blocks[0]
        self.autocast = autocast
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
        size = self.shard._ends.patch_embed.img_size
        images = torch.zeros(
            self.batch, self.shard._ends.in_chans, *size, dtype=self.shard.dtype, device=self.shard.device
        )
        return self._median_us(lambda: self.shard.embed(images).sum().backward())

    def classify_us(self) -> int:
        return self._median_us(lambda: self.shard.classify(self.x_BND.requires_grad_()).sum().backward())

    def sum_us(self) -> int:
        x_BND = self.x_BND.detach()
        return self._median_us(lambda: torch.addcmul(x_BND, x_BND + x_BND, x_BND[0, 0]))

    def update_us(self) -> int:
        params = [p.detach().clone().requires_grad_() for p in self.block.params[0].values()]
        optimiser = torch.optim.AdamW(params, lr=0.0)
        for param in params:
            param.grad = torch.ones_like(param)
        return self._median_us(optimiser.step)

    def _forward_backward_us(self, part: str, heads: tuple[int, ...]) -> tuple[int, int]:
        block: BlockShard = self.block
        forward_us, backward_us = [], []
        for _ in range(REPEATS):
            leaf = self.x_BND.detach().requires_grad_()
            begin = self._now()
            with torch.autocast(self.shard.device.type, dtype=self.autocast, enabled=self.autocast is not None):
                out = block.run(part, block.norms[part](leaf), block.trainable(part, heads))
            middle = self._now()
            torch.autograd.backward(out, torch.ones_like(out))
            forward_us.append(middle - begin)
            backward_us.append(self._now() - middle)
        self.shard.clear()
        return round(statistics.median(forward_us) * 1e6), round(statistics.median(backward_us) * 1e6)

    def _median_us(self, run: Callable[[], object]) -> int:
        seconds = []
        for _ in range(REPEATS):
            begin = self._now()
            run()
            seconds.append(self._now() - begin)
        self.shard.clear()
        return max(1, round(statistics.median(seconds) * 1e6))

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


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"CPU ({torch.get_num_threads()} threads)"


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
