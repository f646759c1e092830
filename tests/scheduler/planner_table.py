"""Prints what the planner makes of invented fleets: `python -m tests.scheduler.planner_table`.

Times are simulated from invented profiles; only the planner's own seconds are measured.
"""

from __future__ import annotations

import time

from scheduler.cost import Costs
from scheduler.domain import Plan, StepShape
from scheduler.errors import InfeasibleError
from scheduler.plan import PlanRequest, make_plan
from tests.scheduler.fleet import fleet, two_nodes, vit_shape
from tests.scheduler.test_selection import random_scores

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
    "compute 0.6, bytes 0.5": PlanRequest(compute=0.6, max_bytes=0.5),
}


def main() -> None:
    print("| fleet | asked | planner s | placement | its gap | step | compute | bytes | idle | worth gap |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for fleet_name, ((blocks, heads, dim), speeds, width) in FLEETS.items():
        shape = vit_shape(blocks, heads, dim)
        costs = Costs(shape, StepShape(5, 16), fleet(speeds, shape=shape, link_bytes_per_s=width))
        for asked, request in REQUESTS.items():
            began = time.perf_counter()
            try:
                plan = make_plan(request, costs, random_scores(blocks, heads))
            except InfeasibleError as error:
                print(f"| {fleet_name} | {asked} | {time.perf_counter() - began:.2f} | refused: {error.message} |")
                continue
            print(f"| {fleet_name} | {asked} | {time.perf_counter() - began:.2f} | {_row(plan)} |")


def _row(plan: Plan) -> str:
    placement, selection = plan.placement_report, plan.selection_report
    return " | ".join(
        [
            f"{placement.method.removeprefix('CP-SAT ')} {placement.status.lower()}",
            f"{placement.gap:.3f}",
            f"{plan.forecast.step_us / plan.all_full.step_us:.2f}",
            f"{plan.compute_fraction:.3f}",
            f"{plan.bytes_fraction:.3f}",
            f"{plan.forecast.idle_share:.2f}",
            f"{selection.gap:.3f}",
        ]
    )


if __name__ == "__main__":
    main()
