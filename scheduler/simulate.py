"""Forecasts a step: plays compiled programs against the cost model before a worker runs them."""

from __future__ import annotations

from collections.abc import Sequence

from scheduler import timing
from scheduler.cost import Costs
from scheduler.domain import Forecast
from scheduler.program import Program


def simulate(programs: Sequence[Program], costs: Costs) -> Forecast:
    """Step time, idle share, peak bytes and bytes per link of one step; raises DeadlockError if it would hang.

    Bytes and FLOPs are exact, times as good as the profiles. FLOPs count a head's backward as twice its forward.
    """
    seen = timing.play([[program.instructions] for program in programs], costs)
    updates = [_update_us(program, costs) for program in programs]
    step_us = max(end + update for end, update in zip(seen.end_us, updates, strict=True))
    busy = [spent + update for spent, update in zip(seen.busy_us, updates, strict=True)]
    return Forecast(
        step_us=step_us,
        busy_us=tuple(busy),
        idle_share=1 - sum(busy) / (step_us * len(busy)) if step_us else 0.0,
        peak_bytes=tuple(seen.peak_bytes),
        link_bytes=tuple(map(tuple, seen.link_bytes)),
        flops=sum(program_flops(program, costs) for program in programs),
    )


def program_flops(program: Program, costs: Costs) -> int:
    """FLOPs that this program runs; over all workers of a step they add up to `domain.step_flops`."""
    shape, batch = costs.shape, costs.step.micro_batch_size
    total = 0
    for instruction in program.instructions:
        if instruction.kind == "fwd" and instruction.part == "attn":
            total += sum(3 * shape.head_forward_flops(h, batch) for h in instruction.full)
            total += sum(shape.head_forward_flops(h, batch) for h in instruction.only)
        elif instruction.kind == "classify":
            total += shape.trunk_flops(batch)
    return total


def _update_us(program: Program, costs: Costs) -> int:
    """Time of the optimiser over the heads that were FULL at least once."""
    trained = {(i.block, h) for i in program.instructions if i.kind == "bwd" for h in i.full}
    return costs.update_us(program.worker, len(trained))
