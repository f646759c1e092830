"""The words of the planner as values: shapes, profiles, ops, placements and plans.

Pure data, no torch, no Ray, no I/O. Times are integer µs, sizes integer bytes. Arrays are small numpy
arrays; axes are named by a suffix: L blocks, H heads of a block, M micro-batches of a step, W workers.

| paper (arXiv 2504.12471) | here |
|---|---|
| p_f full operation | `Op.FULL` |
| p_o forward-only operation | `Op.FORWARD` |
| p_s shortcut | `Op.SKIP` |
| subnet | (block, head): a head with its 1/H slice of the MLP |
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]
OpTable = npt.NDArray[np.int8]  # [L, H, M], values of Op

SUBLAYERS = ("attn", "mlp")


class Op(enum.IntEnum):
    """What one head does for one micro-batch."""

    SKIP = 0
    FORWARD = 1
    FULL = 2


OP_LETTERS = {Op.SKIP: "S", Op.FORWARD: "O", Op.FULL: "F"}


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a vision transformer cut into heads and a trunk.

    `mlp_dims[h]` is the width of head h's slice of the MLP, which has `mlp_matrices` such matrices: three where it is
    gated. Parameter counts: `head_params[h]` of one head with its slices, `embed_params`, `norm_params` (norms, layer
    scales and output biases of one block), `classifier_params`. Where some of a block is frozen, `trained_head_params`
    and `trained_norm_params` count what is not. A head's backward pass costs `backward_weight` forward passes: two, or
    one where its matrices need no gradient; what adapters multiply is not counted. Of the first `num_frozen` blocks
    nothing trains: their heads run FORWARD at the most.
    """

    num_blocks: int
    num_heads: int
    dim: int
    head_dim: int
    mlp_dims: tuple[int, ...]
    num_tokens: int
    patch_dim: int
    num_classes: int
    head_params: tuple[int, ...]
    embed_params: int
    norm_params: int
    classifier_params: int
    mlp_matrices: int = 2
    trained_head_params: tuple[int, ...] | None = None
    trained_norm_params: int | None = None
    backward_weight: int = 2
    num_frozen: int = 0

    @property
    def updated_norm_params(self) -> int:
        """Those of a block's trunk whose gradients are summed and whose optimiser state is held."""
        return self.norm_params if self.trained_norm_params is None else self.trained_norm_params

    @property
    def updated_head_params(self) -> tuple[int, ...]:
        return self.head_params if self.trained_head_params is None else self.trained_head_params

    def head_forward_flops(self, head: int, batch: int) -> int:
        """Multiply-adds × 2 of one head (attention and MLP slice) in one forward pass over `batch` images."""
        tokens = batch * self.num_tokens
        attn = tokens * self.dim * 4 * self.head_dim + 2 * tokens * self.num_tokens * self.head_dim
        return 2 * (attn + self.mlp_matrices * tokens * self.dim * self.mlp_dims[head])

    def trunk_flops(self, batch: int) -> int:
        """FLOPs of the trunk in one micro-batch, forward and backward: it always runs."""
        embed = 2 * batch * self.num_tokens * self.patch_dim * self.dim
        classifier = 2 * batch * self.dim * self.num_classes
        return 2 * embed + 3 * classifier


@dataclass(frozen=True)
class StepShape:
    """One optimiser step: M micro-batches of `micro_batch_size` images, and the bytes of a number.

    `wire_itemsize` is that of messages of the residual stream and its gradient, `itemsize` that of weights, of their
    gradients, in messages too, and of the residual stream in memory, `compute_itemsize` that of what sub-layers compute
    and keep. With `recompute` a FULL half keeps its input alone, and its backward pass runs its forward pass again.
    """

    num_micro_batches: int
    micro_batch_size: int
    wire_itemsize: int = 4
    itemsize: int = 4
    compute_itemsize: int = 4
    recompute: bool = False


@dataclass(frozen=True)
class LinkProfile:
    """One directed link as measured: a message of n bytes takes latency_us + n / bytes_per_s."""

    latency_us: int
    bytes_per_s: int

    def transfer_us(self, num_bytes: int) -> int:
        return self.latency_us + num_bytes * 1_000_000 // self.bytes_per_s


@dataclass(frozen=True)
class DeviceProfile:
    """What one worker measured on the job's own subnet shapes, for one micro-batch.

    The four curves have H + 1 entries: entry k is the µs for k heads run together (entry 0 is 0).
    `sum_us` is adding one part to the residual, `embed_us`/`classify_us` the trunk's ends (forward and backward
    together), `update_us` the optimiser's time for one head. `send_us`/`recv_us` is what handing one message of the
    residual stream to the transport, or taking an arrived one out, keeps the worker busy; `trunk_us` packing, adding or
    unpacking the gradients of one trunk unit; `end_us` the end of a step apart from the heads: tally, clipping, update.
    `links[v]` is the link to worker v (None to itself). `device_id` names the device across jobs, `facts` says what the
    machine tells of it, `samples` counts the measurements behind the curves. `free_bytes` are there for the model,
    beside the `base_bytes` of the worker's process; with `limit_bytes` (0: none) the user bounds both together.
    """

    rank: int
    node: str
    device: str
    attn_forward_us: tuple[int, ...]
    attn_backward_us: tuple[int, ...]
    mlp_forward_us: tuple[int, ...]
    mlp_backward_us: tuple[int, ...]
    embed_us: int
    classify_us: int
    sum_us: int
    update_us: int
    free_bytes: int
    links: tuple[LinkProfile | None, ...]
    labels: dict[str, str] = field(default_factory=dict)
    measured_at: float = 0.0
    send_us: int = 0
    recv_us: int = 0
    trunk_us: int = 0
    end_us: int = 0
    device_id: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    samples: int = 0
    base_bytes: int = 0
    limit_bytes: int = 0

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DeviceProfile:
        links = tuple(None if link is None else LinkProfile(**link) for link in data["links"])
        curves = {key: tuple(value) for key, value in data.items() if key.endswith("ward_us")}
        return cls(**{**data, **curves, "links": links})


@dataclass(frozen=True, eq=False)
class Scores:
    """Worth of every head, with mean 1: `backward_LH` of FULL over FORWARD, `forward_LH` of FORWARD over SKIP.

    `backward_TLHM`, where single images were scored, is the worth for each micro-batch of the window's T steps, with
    mean 1 over the heads of every micro-batch.
    """

    backward_LH: npt.NDArray[np.float64]
    forward_LH: npt.NDArray[np.float64]
    backward_TLHM: npt.NDArray[np.float64] | None = None


@dataclass(frozen=True, eq=False)
class StaticPart:
    """The part of a selection that a window holds still, as placement decides it together with who owns what.

    `num_full` of the heads are FULL, the others FORWARD, in `run_share` of the micro-batches (the rest is SKIP).
    Σ `worth_LH` over the FULL heads may fall below the best possible by the fraction `tolerance`, for speed.
    """

    worth_LH: npt.NDArray[np.float64]
    num_full: int
    run_share: float = 1.0
    tolerance: float = 0.02


@dataclass(frozen=True, eq=False)
class Placement:
    """Which worker owns each head, and which one holds the classifier. `owner_LH[l, h]` is a rank."""

    owner_LH: IntArray
    num_workers: int
    classifier: int

    @property
    def embedders(self) -> frozenset[int]:
        """The workers that hold the embedding: the owners of the first block's heads."""
        return frozenset(int(w) for w in self.owner_LH[0])

    @property
    def heads_owned(self) -> IntArray:
        """[W]: how many heads each worker owns."""
        return np.bincount(self.owner_LH.ravel(), minlength=self.num_workers).astype(np.int64)

    def heads_of(self, worker: int, block: int) -> tuple[int, ...]:
        return tuple(int(h) for h in np.flatnonzero(self.owner_LH[block] == worker))

    def holders(self, block: int) -> tuple[int, ...]:
        """The workers that own at least one head of the block, so hold its norms; sorted."""
        return tuple(int(w) for w in np.unique(self.owner_LH[block]))

    @classmethod
    def make(cls, owner_LH: npt.ArrayLike, num_workers: int) -> Placement:
        """A placement whose classifier sits with the worker that owns most of the last block's heads."""
        owners = np.asarray(owner_LH, dtype=np.int64)
        counts = np.bincount(owners[-1], minlength=num_workers)
        return cls(owners, num_workers, int(np.argmax(counts)))

    def to_dict(self) -> dict[str, Any]:
        return {"owners": self.owner_LH.tolist(), "num_workers": self.num_workers, "classifier": self.classifier}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Placement:
        return cls(np.asarray(data["owners"], dtype=np.int64), data["num_workers"], data["classifier"])


@dataclass(frozen=True)
class Forecast:
    """What `simulate` says of one step. `link_bytes[src][dst]`; `peak_bytes[w]` activations and messages kept."""

    step_us: int
    busy_us: tuple[int, ...]
    idle_share: float
    peak_bytes: tuple[int, ...]
    link_bytes: tuple[tuple[int, ...], ...]
    flops: int

    @property
    def total_bytes(self) -> int:
        return sum(map(sum, self.link_bytes))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Forecast:
        return cls(
            data["step_us"],
            tuple(data["busy_us"]),
            data["idle_share"],
            tuple(data["peak_bytes"]),
            tuple(tuple(row) for row in data["link_bytes"]),
            data["flops"],
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def mean_forecast(forecasts: Iterable[Forecast]) -> Forecast:
    """The average step of a cycle (peak bytes: the largest)."""
    items = list(forecasts)
    count = len(items)
    workers = range(len(items[0].busy_us))
    return Forecast(
        step_us=sum(f.step_us for f in items) // count,
        busy_us=tuple(sum(f.busy_us[w] for f in items) // count for w in workers),
        idle_share=sum(f.idle_share for f in items) / count,
        peak_bytes=tuple(max(f.peak_bytes[w] for f in items) for w in workers),
        link_bytes=tuple(tuple(sum(f.link_bytes[a][b] for f in items) // count for b in workers) for a in workers),
        flops=sum(f.flops for f in items) // count,
    )


def op_rows(ops_LHM: OpTable) -> list[list[str]]:
    """The table as text, one word of F, O and S per head: rows[l][h] == "FFSOF"."""
    letters = np.array([OP_LETTERS[op] for op in Op])
    return [["".join(letters[word]) for word in heads] for heads in ops_LHM]


def parse_op_rows(rows: list[list[str]]) -> OpTable:
    """Inverse of `op_rows`."""
    values = {letter: int(op) for op, letter in OP_LETTERS.items()}
    return np.array([[[values[c] for c in word] for word in heads] for heads in rows], dtype=np.int8)


def uniform_ops(shape: ModelShape, num_micro_batches: int, op: Op) -> OpTable:
    """Every head does `op` for every micro-batch; those of frozen blocks no more than FORWARD."""
    return held_frozen(np.full((shape.num_blocks, shape.num_heads, num_micro_batches), int(op), dtype=np.int8), shape)


def held_frozen(ops_LHM: OpTable, shape: ModelShape) -> OpTable:
    """The table with FORWARD for FULL in the blocks that do not train; in place."""
    np.minimum(ops_LHM[: shape.num_frozen], int(Op.FORWARD), out=ops_LHM[: shape.num_frozen])
    return ops_LHM


def backward_weight(shape: ModelShape, step: StepShape) -> int:
    """What a head's backward pass costs in forward passes; one that is run again for it is one of them."""
    return shape.backward_weight + step.recompute


def step_flops(shape: ModelShape, step: StepShape, ops_LHM: OpTable) -> int:
    """FLOPs of one step: a FORWARD head costs its forward pass, a FULL head its backward pass besides.

    The trunk runs for every micro-batch that some head runs for.
    """
    forward_H = np.array([shape.head_forward_flops(h, step.micro_batch_size) for h in range(shape.num_heads)])
    weight_LHM = np.array([0, 1, 1 + backward_weight(shape, step)])[ops_LHM]
    heads = int((weight_LHM.sum(axis=(0, 2)) * forward_H).sum())
    return heads + int(ops_LHM.any(axis=(0, 1)).sum()) * shape.trunk_flops(step.micro_batch_size)


@dataclass(frozen=True)
class SolverReport:
    """How good an answer is: the solver's status, its objective and bound, and the relative gap between them.

    `rounding_loss` is what whole heads cost: the answer over its fractional relaxation, less 1.
    """

    method: str
    status: str
    objective: float
    bound: float
    gap: float
    seconds: float
    note: str = ""
    rounding_loss: float = 0.0


@dataclass(frozen=True, eq=False)
class Plan:
    """Placement, op tables and forecast for one window; immutable and versioned.

    Step s of the window runs `cycle[s % len(cycle)]`. `forecast` is the mean over the cycle, `all_full` the forecast of
    a step in which every head is FULL under the same placement: fractions are taken against it. `policy` is what the
    replan policy remembers from window to window, as JSON. `memory_bytes[w]` is the most that worker w's process will
    hold, of all that `scheduler.memory` counts.
    """

    version: int
    window: int
    placement: Placement
    cycle: tuple[OpTable, ...]
    forecast: Forecast
    all_full: Forecast
    placement_report: SolverReport
    selection_report: SolverReport
    skip_fill: str = "zero"
    policy: dict[str, Any] = field(default_factory=dict)
    memory_bytes: tuple[int, ...] = ()

    @property
    def compute_fraction(self) -> float:
        return self.forecast.flops / self.all_full.flops

    @property
    def bytes_fraction(self) -> float:
        total = self.all_full.total_bytes
        return self.forecast.total_bytes / total if total else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "window": self.window,
            "placement": self.placement.to_dict(),
            "cycle": [op_rows(ops) for ops in self.cycle],
            "forecast": self.forecast.to_dict(),
            "all_full": self.all_full.to_dict(),
            "placement_report": asdict(self.placement_report),
            "selection_report": asdict(self.selection_report),
            "skip_fill": self.skip_fill,
            "policy": self.policy,
            "memory_bytes": list(self.memory_bytes),
            "compute_fraction": self.compute_fraction,
            "bytes_fraction": self.bytes_fraction,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        return cls(
            data["version"],
            data["window"],
            Placement.from_dict(data["placement"]),
            tuple(parse_op_rows(rows) for rows in data["cycle"]),
            Forecast.from_dict(data["forecast"]),
            Forecast.from_dict(data["all_full"]),
            SolverReport(**data["placement_report"]),
            SolverReport(**data["selection_report"]),
            data["skip_fill"],
            data.get("policy", {}),
            tuple(data.get("memory_bytes", ())),
        )
