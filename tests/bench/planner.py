"""What planning costs and how good plans are: selection, placement and what-if on invented fleets.

    python -m tests.bench.planner [--part selection|placement|what-if …] [--rounds 3] [--out planner]

Times are processor seconds, medians of several runs; steps are simulated. Selection and placement have files of their
own, `planner_selection` and `planner_placement`, with `rows()` and `targets(rows)`; this one asks what-if for whole
plans (placement, selection, forecast and a reason per head) and times the forecast of a large step by itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import statistics
import time

from scheduler.compiler import compile_step, rehearse
from scheduler.cost import Costs
from scheduler.devices import profiles_of
from scheduler.domain import Op, Placement, StepShape, uniform_ops
from scheduler.fleets import parse_device, records_of
from scheduler.simulate import forecast_of, simulate
from scheduler.whatif import what_if
from tests.bench.report import publish, target
from tests.scheduler.fleet import vit_shape

VIT_S, VIT_B, VIT_L = (12, 6, 384, 197), (12, 12, 768, 197), (24, 16, 1024, 197)
WIDE = "ViT-L, 16 devices in 3 sorts"
FLEETS = {
    "ViT-S, 2 alike": (VIT_S, ["2x fast"], "10Gbps"),
    "ViT-S, fast and slow, 1 Gbit/s": (VIT_S, ["fast", "slow"], "1Gbps"),
    "ViT-B, 8 in 2 nodes": (VIT_B, ["4x fast@a", "4x fast@b"], "10Gbps"),
    "ViT-B, 4 GPUs all unlike": (VIT_B, ["a100", "rtx3090", "v100", "t4"], "25Gbps"),
    "ViT-L, 16 alike in one node": (VIT_L, ["16x fast@a"], "10Gbps"),
    WIDE: (VIT_L, ["4x fast@a", "4x fast@b", "8x slow"], "10Gbps"),
}
REQUESTS = {
    "all-FULL": {},
    "3F2S": {"ratios": {"full": 3, "skip": 2}, "strategy": "hull"},
    "2F3O": {"ratios": {"full": 2, "forward": 3}, "strategy": "hull"},
    "2F2O1S": {"ratios": {"full": 2, "forward": 2, "skip": 1}, "strategy": "hull"},
}
STEP = StepShape(5, 16)
PARTS = ("selection", "placement", "what-if")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default="planner")
    args = parser.parse_args()
    rows, targets = [], []
    for part in args.part or PARTS:
        more_rows, more_targets = plans(args.rounds) if part == "what-if" else of_file(part)
        rows += more_rows
        targets += more_targets
    publish(
        args.out,
        rows,
        targets,
        f"what-if: medians of {args.rounds} rounds; seconds are the processor's; steps are simulated",
    )


def of_file(part):
    """Rows and targets of a part with a file of its own, loaded only when it is asked for."""
    module = importlib.import_module(f"tests.bench.planner_{part}")
    rows = module.rows()
    return rows, module.targets(rows)


def plans(rounds):
    """Rows and targets of whole plans, and of forecasting the step with most instructions."""
    rows, slowest = [], {}
    for fleet, (sizes, devices, link) in FLEETS.items():
        for name, asked in REQUESTS.items():
            request = asking(sizes, devices, link, asked)
            seconds, answer = clocked(lambda request=request: what_if(request), rounds)
            slowest[fleet] = max(slowest.get(fleet, 0.0), seconds)
            rows.append(_row(fleet, name, seconds, answer))
    steps, seconds = forecasts(rounds)
    targets = [target(f"what-if, {fleet}: cpu s", slowest[fleet], "<=", 2.0) for fleet in FLEETS]
    return rows + steps, [*targets, target("compile and forecast, all FULL on 16 workers: cpu s", seconds, "<=", 0.3)]


def forecasts(rounds):
    """Rows for one all-FULL step of ViT-L split over 16 workers, and the seconds of compiling with its forecast."""
    shape = vit_shape(*VIT_L)
    costs = Costs(shape, STEP, profiles_of(records_of([parse_device("16x fast@a")]), shape, STEP))
    split = Placement.make([range(16)] * shape.num_blocks, 16)
    full = uniform_ops(shape, STEP.num_micro_batches, Op.FULL)
    compiling, programs = clocked(lambda: compile_step(split, full, costs), rounds)
    simulating, played = clocked(lambda: simulate(programs, costs), rounds)
    both, forecast = clocked(lambda: forecast_of(rehearse(split, full, costs), costs), rounds)
    assert forecast == played
    count = sum(len(program.instructions) for program in programs)
    words = (("compile", compiling), ("simulate", simulating), ("compile and forecast", both))
    return [{"what": what, "instructions": count, "cpu s": seconds} for what, seconds in words], both


def asking(sizes, devices, link, asked):
    shape = dataclasses.asdict(vit_shape(*sizes))
    return {"shape": shape, "step": dataclasses.asdict(STEP), "plan": asked, "devices": devices, "link": link}


def clocked(work, rounds):
    """(median processor seconds, the last result)."""
    seconds, result = [], None
    for _ in range(rounds):
        began = time.process_time()
        result = work()
        seconds.append(time.process_time() - began)
    return statistics.median(seconds), result


def _row(fleet, name, seconds, answer):
    plan = answer["plan"]
    used = [d for d in answer["devices"] if d["heads"]]
    return {
        "fleet": fleet,
        "asked": name,
        "cpu s": seconds,
        "used": f"{len(used)} of {len(answer['devices'])}",
        "step ms": plan["forecast"]["step_us"] / 1e3,
        "step / all-FULL": plan["forecast"]["step_us"] / plan["all_full"]["step_us"],
        "bytes": plan["bytes_fraction"],
        "placement gap": plan["placement_report"]["gap"],
        "worth gap": plan["selection_report"]["gap"],
        "rounding loss": answer["rounding_loss"],
        "bound by": ", ".join(sorted({d["binding"] for d in used})),
    }


if __name__ == "__main__":
    main()
