"""What things cost: µs of computing, bytes of messages, bytes kept; from shapes and measured profiles alone.

One micro-batch is the unit: curves of a `DeviceProfile` are indexed by how many heads run together.
"""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.domain import SUBLAYERS, DeviceProfile, ModelShape, StepShape, backward_weight

TALLIED = 3  # gradient norm², loss, correct answers; behind them the loss of every image
OPTIMISER_BYTES_PER_PARAM = 16  # weight, gradient and AdamW's two moments, float32


class Costs:
    """Durations and sizes for one model, step shape and fleet. Pure look-ups."""

    def __init__(self, shape: ModelShape, step: StepShape, profiles: Sequence[DeviceProfile]) -> None:
        self.shape = shape
        self.step = step
        self.profiles = tuple(profiles)
        self._forward = [_curves(p.attn_forward_us, p.mlp_forward_us) for p in self.profiles]
        self._backward = [_curves(p.attn_backward_us, p.mlp_backward_us) for p in self.profiles]

    @property
    def num_workers(self) -> int:
        return len(self.profiles)

    @property
    def max_in_flight(self) -> int:
        """Micro-batches between first forward and last backward: enough to hide the wire, few enough to hold in memory.

        One worker waits for nobody. For two workers 5 instead of 2 took 0.70 instead of 0.82 of an all-FULL step's wall
        time with 3F2S in split blocks.
        """
        return 1 if self.num_workers == 1 else min(self.step.num_micro_batches, 2 * self.num_workers + 1)

    @property
    def backward_weight(self) -> int:
        """A head's backward pass in forward passes."""
        return backward_weight(self.shape, self.step)

    @property
    def residual_bytes(self) -> int:
        """One message that carries the residual stream of a micro-batch, x_BND or its gradient."""
        return residual_bytes(self.shape, self.step)

    def forward_us(self, worker: int, sublayer: str, num_heads: int) -> int:
        return self._forward[worker][sublayer][num_heads]

    def backward_us(self, worker: int, sublayer: str, num_heads: int) -> int:
        return self._backward[worker][sublayer][num_heads]

    def sum_us(self, worker: int, num_parts: int = 1) -> int:
        """Adding so many partial sums to the residual or its gradient."""
        return self.profiles[worker].sum_us * num_parts

    def trunk_us(self, worker: int, num_units: int) -> int:
        """One instruction that packs, adds or unpacks the gradients of so many trunk units."""
        return self.profiles[worker].trunk_us * num_units

    def embed_us(self, worker: int) -> int:
        return self.profiles[worker].embed_us

    def classify_us(self, worker: int) -> int:
        return self.profiles[worker].classify_us

    def update_us(self, worker: int, num_heads: int) -> int:
        return self.profiles[worker].update_us * num_heads

    def end_us(self, worker: int) -> int:
        """What the end of a step takes whatever was trained; `update_us` comes on top."""
        return self.profiles[worker].end_us

    def send_us(self, worker: int, num_bytes: int) -> int:
        """What handing a message to the transport keeps the sender busy."""
        return self.profiles[worker].send_us * num_bytes // self.residual_bytes

    def recv_us(self, worker: int, num_bytes: int) -> int:
        """What taking an arrived message out of the transport keeps the reader busy."""
        return self.profiles[worker].recv_us * num_bytes // self.residual_bytes

    def transfer_us(self, src: int, dst: int, num_bytes: int) -> int:
        link = self.profiles[src].links[dst]
        if link is None:
            raise ValueError(f"worker {src} has no link to worker {dst}")
        return link.transfer_us(num_bytes)

    def kept_bytes(self, sublayer: str, num_heads: int) -> int:
        """What `num_heads` FULL heads of a sub-layer keep for backward: their input, and what they make of it.

        That is its norm and the heads' inner width; nothing of it where the forward pass is run again.
        """
        made = 0 if self.step.recompute else self._made_bytes(sublayer, num_heads)
        return stream_bytes(self.shape, self.step) + made

    def rerun_bytes(self, sublayer: str, num_heads: int) -> int:
        """What is held besides while `num_heads` FULL heads run of which nothing but the input is kept; else 0."""
        return self._made_bytes(sublayer, num_heads) if self.step.recompute else 0

    def _made_bytes(self, sublayer: str, num_heads: int) -> int:
        tokens = self.step.micro_batch_size * self.shape.num_tokens
        inner = 4 * self.shape.head_dim if sublayer == "attn" else self.shape.mlp_matrices * max(self.shape.mlp_dims)
        return tokens * (self.shape.dim + num_heads * inner) * self.step.compute_itemsize


def num_tallied(step: StepShape) -> int:
    """How many numbers a worker tells each other at the end of a step."""
    return TALLIED + step.num_micro_batches * step.micro_batch_size


def tally_bytes(step: StepShape) -> int:
    """Bytes of these, as float64."""
    return 8 * num_tallied(step)


def residual_bytes(shape: ModelShape, step: StepShape) -> int:
    """Bytes of x_BND on the wire."""
    return step.micro_batch_size * shape.num_tokens * shape.dim * step.wire_itemsize


def stream_bytes(shape: ModelShape, step: StepShape) -> int:
    """Bytes of x_BND in memory."""
    return step.micro_batch_size * shape.num_tokens * shape.dim * step.itemsize


def trunk_bytes(shape: ModelShape, step: StepShape, units: Sequence[int]) -> int:
    """Bytes of the gradients of trunk units: -1 is the embedding, l ≥ 0 the norms of block l."""
    return step.itemsize * sum(shape.embed_params if unit < 0 else shape.updated_norm_params for unit in units)


def _curves(attn_us: Sequence[int], mlp_us: Sequence[int]) -> dict[str, Sequence[int]]:
    return dict(zip(SUBLAYERS, (attn_us, mlp_us), strict=True))
