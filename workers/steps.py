"""What goes into a step, lives in it and comes out: images and labels, compiled programs, values, the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scheduler.cost import TALLIED, Costs, num_tallied
from scheduler.profiles import timing_keys
from scheduler.program import Instruction, MessageKey, Program
from scheduler.simulate import program_flops
from workers.casting import wire_type
from workers.transport import Parcel

TimingKey = tuple[str, str, int, int]
STOP, SAVE, SHOW = 1, 2, 4  # what rank 0 may wish for behind a step, to be added
WISH = 2.0**-10  # of a wish, beside whole numbers


@dataclass(frozen=True)
class StepReport:
    """What one worker measured in one step. Loss and counts are sums over all workers once the tallies are in.

    `wishes` are rank 0's, the same on all. `losses_MB` has every image's loss, 0 where a micro-batch sat
    out; `wait_s` is time blocked in receives; `kind_s` seconds per instruction kind; `sent_bytes` per destination;
    `timings_us` how long each instruction took, under its `timing_keys`; none when the step was not `timed`. A step on
    CUDA that is not has `kind_s` of what the processor did, not the device.
    """

    loss: float
    correct: int
    wishes: int
    grad_norm: float
    wall_s: float
    wait_s: float
    cpu_s: float
    kind_s: dict[str, float]
    sent_bytes: tuple[int, ...]
    flops: int
    losses_MB: npt.NDArray[np.float64]
    timings_us: dict[TimingKey, list[float]] = field(default_factory=dict)

    @property
    def idle_share(self) -> float:
        return self.wait_s / self.wall_s if self.wall_s else 0.0


@dataclass
class Batch:
    """The micro-batches of one step that this worker reads: images_BCHW and labels by index, which are classes [B] or
    probabilities [B, C]."""

    images: Mapping[int, Tensor]
    labels: Mapping[int, Tensor]


@dataclass
class StepState:
    """All that lives on a worker for one step; the first few are of its programs."""

    batch: Batch
    num_running: int  # micro-batches that the loss is the mean of
    num_tallied: int = TALLIED
    wire: torch.dtype = torch.float32
    travelling: frozenset[tuple[str, int, str, int]] = frozenset()
    recompute: bool = False
    x: dict[int, Tensor] = field(default_factory=dict)
    g: dict[int, Tensor] = field(default_factory=dict)
    part: dict[int, Tensor] = field(default_factory=dict)
    gpart: dict[int, Tensor] = field(default_factory=dict)
    inbox: dict[MessageKey, Tensor] = field(default_factory=dict)
    embedded: dict[int, Tensor] = field(default_factory=dict)
    kept: dict[tuple[int, str, int], tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    sums: dict[tuple[int, str, int], Tensor] = field(default_factory=dict)
    tally: Tensor | None = None
    total: Tensor | None = None
    loss: float | Tensor = 0.0
    correct: int | Tensor = 0
    losses: dict[int, Tensor] = field(default_factory=dict)  # of single images, by micro-batch


class StepPrograms:
    """The compiled programs of all workers for one step, seen from one of them: its own, and what will reach it.

    `running` are the micro-batches that do not sit out. The residual stream and its gradient travel in `wire`;
    `travelling` names those of their values that some worker receives, by who reads them: (cargo, block, part,
    micro-batch), none where the wire takes them as they are. `recompute` is the step's.
    """

    def __init__(self, programs: Sequence[Program], rank: int, costs: Costs, dtype: torch.dtype) -> None:
        self.own = programs[rank]
        self.flops = program_flops(self.own, costs)
        self.timing_keys = timing_keys(self.own)
        self.running = tuple(sorted({m for program in programs for m in program.label_micro_batches}))
        shape, batch = costs.shape, costs.step.micro_batch_size
        residual = (batch, shape.num_tokens, shape.dim)
        self.num_tallied = num_tallied(costs.step)
        self.wire, self.recompute = wire_type(costs.step, dtype), costs.step.recompute
        sends = [i for program in programs for i in program.sends() if i.cargo in ("x", "g")]
        self.travelling = frozenset((i.cargo, i.block, i.part, i.mb) for i in sends if self.wire != dtype)

        def parcel(src: int, instruction: Instruction) -> Parcel:
            key = instruction.key(src)
            if instruction.cargo == "tally":
                return Parcel(key, (self.num_tallied,), torch.float64)
            if instruction.units:
                numel = sum(shape.embed_params if u < 0 else shape.updated_norm_params for u in instruction.units)
                return Parcel(key, (numel,), dtype)
            return Parcel(key, residual, self.wire, passing=instruction.cargo in ("part", "gpart"))

        self.incoming = {
            src: [parcel(src, i) for i in program.sends() if i.peer == rank]
            for src, program in enumerate(programs)
            if src != rank
        }
