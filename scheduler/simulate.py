"""Forecasts a step: plays compiled programs against the cost model before a worker runs them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from scheduler import timing
from scheduler.cost import Costs
from scheduler.domain import Forecast
from scheduler.program import Instruction, Program


def simulate(programs: Sequence[Program], costs: Costs) -> Forecast:
    """Step time, idle share, peak bytes and bytes per link of one step; raises DeadlockError if it would hang.

    Bytes and FLOPs are exact, times as good as the profiles. FLOPs count a head's backward as the shape weighs it.
    """
    return forecast_of(timing.play([[program.instructions] for program in programs], costs), costs)


def forecast_of(seen: timing.Playback, costs: Costs) -> Forecast:
    """The forecast of a step that was played to its end."""
    updates = [timing.update_us(costs, worker, instructions) for worker, instructions in enumerate(seen.order)]
    step_us = max(end + update for end, update in zip(seen.end_us, updates, strict=True))
    busy = [spent + update for spent, update in zip(seen.busy_us, updates, strict=True)]
    return Forecast(
        step_us=step_us,
        busy_us=tuple(busy),
        idle_share=1 - sum(busy) / (step_us * len(busy)) if step_us else 0.0,
        peak_bytes=tuple(seen.peak_bytes),
        link_bytes=tuple(map(tuple, seen.link_bytes)),
        flops=sum(_flops(instructions, costs) for instructions in seen.order),
    )


def program_flops(program: Program, costs: Costs) -> int:
    """FLOPs that this program runs; over all workers of a step they add up to `domain.step_flops`."""
    return _flops(program.instructions, costs)


def _flops(instructions: Iterable[Instruction], costs: Costs) -> int:
    shape, batch, back = costs.shape, costs.step.micro_batch_size, costs.backward_weight
    forward_H = [shape.head_forward_flops(h, batch) for h in range(shape.num_heads)]
    total = 0
    for instruction in instructions:
        if instruction.kind == "fwd" and instruction.part == "attn":
            total += sum((1 + back) * forward_H[h] for h in instruction.full)
            total += sum(forward_H[h] for h in instruction.only)
        elif instruction.kind == "classify":
            total += shape.trunk_flops(batch)
    return total
