"""Lowers (placement, op table) to one step program per worker, in small passes.

    transfers.lower    one micro-batch: who computes what, which message travels      (a lane)
    free               when x and g of a micro-batch are read no more
    timing.play        interleave the lanes, so that one waits for the wire while another computes
    transfers.step_end trunk gradients, tallies, update

The order comes from the cost model, correctness does not: any interleaving of the lanes is valid, since a lane never
waits for another one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from scheduler import timing, transfers
from scheduler.cost import Costs
from scheduler.domain import OpTable, Placement
from scheduler.program import Instruction, Program

VALUES = ("x", "g")
READS = {"fwd": "x", "classify": "x", "bwd": "g", "unembed": "g"}  # sends and sums read what they name


def compile_step(
    placement: Placement,
    ops_LHM: OpTable,
    costs: Costs,
    *,
    embed_grad: bool = True,
    max_in_flight: int | None = None,
    skip_fill: str = "zero",
) -> tuple[Program, ...]:
    """Programs of one training step, one per worker.

    `max_in_flight` bounds the micro-batches between first forward and last backward, by default `costs.max_in_flight`.
    """
    lanes, tails = _lowered(placement, ops_LHM, costs, embed_grad, skip_fill)
    freeing = [[with_frees(lane) for lane in worker] for worker in lanes]
    seen = timing.play(freeing, costs, max_in_flight=max_in_flight or costs.max_in_flight, tails=tails)
    return _programs(placement, ops_LHM.shape[2], seen.order)


def rehearse(
    placement: Placement,
    ops_LHM: OpTable,
    costs: Costs,
    *,
    embed_grad: bool = True,
    max_in_flight: int | None = None,
    skip_fill: str = "zero",
) -> timing.Playback:
    """`compile_step`'s instructions but for the frees, with the times that `simulate` would find: ordering plays them.

    Enough for a forecast, at two thirds of the price of both. Raises DeadlockError.
    """
    lanes, tails = _lowered(placement, ops_LHM, costs, embed_grad, skip_fill)
    return timing.play(lanes, costs, max_in_flight=max_in_flight or costs.max_in_flight, tails=tails)


def compile_evaluation(placement: Placement, ops_LHM: OpTable, costs: Costs) -> tuple[Program, ...]:
    """Programs that run every head that is not SKIP forward only and end at the classifier: no gradient, no update."""
    num_micro_batches = ops_LHM.shape[2]
    lanes = [transfers.lower(placement, ops_LHM[:, :, m], m, train=False) for m in range(num_micro_batches)]
    freeing = [[with_frees(lane[w]) for lane in lanes] for w in range(placement.num_workers)]
    order = timing.play(freeing, costs, max_in_flight=costs.max_in_flight).order
    return _programs(placement, num_micro_batches, order)


def _lowered(
    placement: Placement, ops_LHM: OpTable, costs: Costs, embed_grad: bool, skip_fill: str
) -> tuple[list[transfers.Sequences], transfers.Sequences]:
    """Per worker a lane per micro-batch, and per worker the tail of the step."""
    lanes = [
        transfers.lower(placement, ops_LHM[:, :, m], m, embed_grad=embed_grad, skip_fill=skip_fill)
        for m in range(ops_LHM.shape[2])
    ]
    trunk_grad = costs.shape.updated_norm_params > 0
    tails = transfers.step_end(placement, ops_LHM, embed_grad=embed_grad, trunk_grad=trunk_grad)
    return list(map(list, zip(*lanes, strict=True))), tails


def with_frees(lane: Sequence[Instruction]) -> list[Instruction]:
    """The lane with `free x` and `free g` after the last read of each value this worker held."""
    out: list[Instruction] = []
    alive: set[str] = set()
    for instruction in reversed(lane):
        kind, cargo = instruction.kind, instruction.cargo
        read = cargo if kind in ("send", "sum") else READS.get(kind, "")
        if read in VALUES and read not in alive:
            out.append(Instruction("free", read, mb=instruction.mb))
            alive.add(read)
        out.append(instruction)
        if kind == "recv":
            alive.discard(cargo)
        elif kind == "embed":
            alive.discard("x")
        elif kind == "classify" and instruction.grad and not instruction.floor:
            alive.discard("g")  # a new value, that does not depend on an older one of the same name
    return out[::-1]


def _programs(placement: Placement, num_micro_batches: int, bodies: Iterable[list[Instruction]]) -> tuple[Program, ...]:
    return tuple(Program(w, placement.num_workers, num_micro_batches, tuple(body)) for w, body in enumerate(bodies))
