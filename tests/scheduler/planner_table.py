"""Prints what the planner makes of invented fleets: `python -m tests.scheduler.planner_table`.

Times are simulated from invented profiles; only the planner's own processor seconds are measured.
"""

from __future__ import annotations

import time

import numpy as np

from scheduler.cost import Costs
from scheduler.domain import Plan, Scores, StepShape
from scheduler.errors import InfeasibleError
from scheduler.plan import make_plan
from scheduler.request import PlanRequest
from tests.scheduler.fleet import fleet, two_nodes, vit_shape

FLEETS = {
    "digits 6×6, 2 equal": ((6, 6, 96), (1.0, 1.0), 10**9),
    "ViT-S 12×6, 2 equal": ((12, 6, 384), (1.0, 1.0), 10**9),
    "ViT-S 12×6, 2:1, slow link": ((12, 6, 384), (2.0, 1.0), 10**7),
    "ViT-S 12×6, 4:2:2:1": ((12, 6, 384), (4.0, 2.0, 2.0, 1.0), 10**9),
    "ViT-B 12×12, 8 in 2 nodes": ((12, 12, 768), (1.0,) * 8, two_nodes),
}
REQUESTS = {
    "all-FULL": PlanRequest(),
    "3F2S": PlanRequest(ratios=(3, 0, 2)),
    "2F3O": PlanRequest(ratios=(2, 3, 0)),
    "2F1O2S": PlanRequest(ratios=(2, 1, 2)),
    "2F1O2S redrawn": PlanRequest(ratios=(2, 1, 2), hold="none"),
    "2F3O, two stages": PlanRequest(ratios=(2, 3, 0), strategy="two_stage"),
    "compute 0.6, bytes 0.5": PlanRequest(compute=0.6, max_bytes=0.5),
}
COLUMNS = (
    "fleet", "asked", "planner cpu s", "placement", "its gap", "rounding loss", "step ÷ all-FULL", "compute", "bytes",
    "idle", "gap of worth",
)  # fmt: skip


def main() -> None:
    print(f"| {' | '.join(COLUMNS)} |")
    print("|---" * len(COLUMNS) + "|")
    for fleet_name, ((blocks, heads, dim), speeds, width) in FLEETS.items():
        shape = vit_shape(blocks, heads, dim)
        costs = Costs(shape, StepShape(5, 16), fleet(speeds, shape=shape, link_bytes_per_s=width))
        scores = Scores(*np.random.default_rng(0).uniform(0.5, 1.5, (2, blocks, heads)))
        for asked, request in REQUESTS.items():
            began = time.process_time()
            try:
                plan = make_plan(request, costs, scores)
            except InfeasibleError as error:
                print(f"| {fleet_name} | {asked} | {time.process_time() - began:.2f} | refused: {error.message} |")
                continue
            seconds = time.process_time() - began
            print(f"| {fleet_name} | {asked} | {seconds:.2f} | {_row(plan)} |")


def _row(plan: Plan) -> str:
    placement, selection = plan.placement_report, plan.selection_report
    return " | ".join(
        [
            f"{placement.method.removeprefix('CP-SAT ')} {placement.status.lower()}",
            f"{placement.gap:.3f}",
            f"{placement.rounding_loss:.3f}",
            f"{plan.forecast.step_us / plan.all_full.step_us:.2f}",
            f"{plan.compute_fraction:.3f}",
            f"{plan.bytes_fraction:.3f}",
            f"{plan.forecast.idle_share:.2f}",
            f"{selection.gap:.3f}",
        ]
    )


if __name__ == "__main__":
    main()
