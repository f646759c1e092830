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
    num_micro_batches = ops_LHM.shape[2]
    lanes = [
        transfers.lower(placement, ops_LHM[:, :, m], m, embed_grad=embed_grad, skip_fill=skip_fill)
        for m in range(num_micro_batches)
    ]
    ordered = _interleave(lanes, costs, max_in_flight or costs.max_in_flight)
    tails = transfers.step_end(placement, ops_LHM, embed_grad=embed_grad)
    return _programs(placement, num_micro_batches, [[*body, *tail] for body, tail in zip(ordered, tails, strict=True)])


def compile_evaluation(placement: Placement, ops_LHM: OpTable, costs: Costs) -> tuple[Program, ...]:
    """Programs that run every head that is not SKIP forward only and end at the classifier: no gradient, no update."""
    num_micro_batches = ops_LHM.shape[2]
    lanes = [transfers.lower(placement, ops_LHM[:, :, m], m, train=False) for m in range(num_micro_batches)]
    return _programs(placement, num_micro_batches, _interleave(lanes, costs, costs.max_in_flight))


def _interleave(lanes: Sequence[transfers.Sequences], costs: Costs, max_in_flight: int) -> list[list[Instruction]]:
    workers = [[with_frees(lane[w]) for lane in lanes] for w in range(costs.num_workers)]
    return timing.play(workers, costs, max_in_flight=max_in_flight).order


def with_frees(lane: Sequence[Instruction]) -> list[Instruction]:
    """The lane with `free x` and `free g` after the last read of each value this worker held."""
    out: list[Instruction] = []
    alive: set[str] = set()
    for instruction in reversed(lane):
        for cargo in sorted(_reads(instruction) - alive):
            out.append(Instruction("free", cargo, mb=instruction.mb))
            alive.add(cargo)
        out.append(instruction)
        alive -= _writes(instruction)
    return out[::-1]


def _reads(instruction: Instruction) -> set[str]:
    kind, cargo = instruction.kind, instruction.cargo
    if kind in ("fwd", "classify"):
        return {"x"}
    if kind in ("bwd", "unembed"):
        return {"g"}
    return {cargo} & {"x", "g"} if kind in ("send", "sum") else set()


def _writes(instruction: Instruction) -> set[str]:
    """Values that do not depend on an older value of the same name."""
    if instruction.kind == "embed":
        return {"x"}
    if instruction.kind == "classify":
        return {"g"} if instruction.grad and not instruction.floor else set()
    return {instruction.cargo} & {"x", "g"} if instruction.kind == "recv" else set()


def _programs(placement: Placement, num_micro_batches: int, bodies: Iterable[list[Instruction]]) -> tuple[Program, ...]:
    return tuple(Program(w, placement.num_workers, num_micro_batches, tuple(body)) for w, body in enumerate(bodies))
