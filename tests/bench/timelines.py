"""What it costs to say why: explaining plans beside making them, and traced steps beside untraced ones, interleaved.

python -m tests.bench.timelines [--rounds 20] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial

import numpy as np
import torch

from scheduler import gantt
from scheduler.compiler import compile_step
from scheduler.cost import Costs
from scheduler.domain import Op, Placement, Scores, StepShape, uniform_ops
from scheduler.explain import Explanation
from scheduler.replan import first_plan, next_plan
from scheduler.request import PlanRequest
from tests.bench.report import publish, target
from tests.scheduler.fleet import fleet, vit_shape
from tests.workers.engine import costs_for, images_and_labels, on_threads, tiny_vit
from workers.executor import Executor
from workers.partition import model_shape
from workers.shard import Shard
from workers.steps import Batch, StepPrograms
from workers.trace import UNTRACED, Trace

ASKED = {
    "3F2S": PlanRequest(ratios=(3, 0, 2)),
    "2F3O": PlanRequest(ratios=(2, 3, 0)),
    "2F3O, split": PlanRequest(ratios=(2, 3, 0), placement="split"),
}
FLEETS = {  # blocks, heads, width, speeds
    "ViT-B on 4": (12, 12, 768, [2.0, 2.0, 1.0, 1.0]),
    "ViT-L on 16": (24, 16, 1024, [4.0] * 4 + [2.0] * 4 + [1.0] * 8),
}
STEPS = {  # workers, width, image size, images
    "bundled sizes on 2 workers": (2, 96, 28, 16),
    "ViT-S width on 1 worker": (1, 384, 56, 8),
}


def told_rows():
    for fleet_name, (blocks, heads, dim, speeds) in FLEETS.items():
        shape = vit_shape(num_blocks=blocks, num_heads=heads, dim=dim, num_tokens=197)
        costs = Costs(shape, StepShape(5, 16), fleet(speeds, shape=shape))
        worths = np.random.default_rng(0).uniform(0.1, 3, (2, blocks, heads))
        scores = Scores(*worths)
        for asked_name, asked in ASKED.items():
            first_s, plan = seconds(partial(first_plan, asked, costs, scores))
            kept = {"window": 1, "steps_left": 1000, "memory": plan.policy}
            later_s, _ = seconds(partial(next_plan, asked, costs, scores, plan.placement, **kept))
            told_s, told = seconds(partial(Explanation(plan, costs, scores).told, embed_grad=True))
            spans = gantt.of_plan(plan, costs, embed_grad=True)
            yield {
                "plan": f"{fleet_name}, {asked_name}", "first s": first_s, "later s": later_s, "told s": told_s,
                "heads kB": size(told["heads"]), "spans": len(spans), "chart kB": size(gantt.to_dict(spans)),
            }  # fmt: skip


def step_rows(rounds):
    for name, (workers, dim, img_size, images) in STEPS.items():
        model = tiny_vit(embed_dim=dim, depth=6, num_heads=6, img_size=img_size).float()
        costs = costs_for(model, workers, 5, images, itemsize=4)
        placement = Placement.make([[head * workers // 6 for head in range(6)]] * 6, workers)
        programs = compile_step(placement, uniform_ops(model_shape(model), 5, Op.FULL), costs)
        batches = images_and_labels(model, 5, images)
        found = on_threads(workers, lambda *at, of=(model, placement, programs, costs, batches): run(*at, *of, rounds))
        for rank, reports in enumerate(found):
            plain, traced = ([r for r, trace in reports if bool(trace) is is_traced] for is_traced in (False, True))
            work = [
                gantt.busy_us(trace.spans(rank))[rank] / 1e6 / (r.wall_s - r.wait_s) for r, trace in reports if trace
            ]
            ends = [trace.spans(rank)[-1].end_us / 1e6 / r.wall_s for r, trace in reports if trace]
            wall = [statistics.median(r.wall_s for r in some) for some in (traced, plain)]
            yield {
                "step": f"{name}, w{rank}", "instructions": len(programs[rank].instructions), "wall s": wall[1],
                "traced wall": wall[0] / wall[1],
                "traced cpu": sum(r.cpu_s for r in traced) / sum(r.cpu_s for r in plain),
                "work / busy": statistics.median(work), "least": min(work), "most": max(work),
                "last span / wall": min(ends),
            }  # fmt: skip


def run(rank, transport, model, placement, programs, costs, batches, rounds):
    """(report, trace or None) of steps that are traced in turn; the first few warm up."""
    shard = Shard(model, placement, rank)
    executor, steps = (
        Executor(shard, transport, update=lambda _: None),
        StepPrograms(programs, rank, costs, shard.dtype),
    )
    images, labels = ({m: batches[m][kind] for m in range(len(batches))} for kind in (0, 1))
    traces = [Trace() if index % 2 else None for index in range(2 * rounds + 4)]
    return [(executor.run(steps, Batch(images, labels), trace=trace or UNTRACED), trace) for trace in traces][4:]


def seconds(work):
    """(processor seconds of the faster of two runs, what it gave)."""
    spent = []
    for _ in range(2):
        begin = time.process_time()
        found = work()
        spent.append(time.process_time() - begin)
    return min(spent), found


def size(value):
    return len(json.dumps(value, separators=(",", ":"))) / 1e3


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    told, steps = list(told_rows()), list(step_rows(args.rounds))
    targets = [
        target("explaining / making a first plan, at most", max(r["told s"] / r["first s"] for r in told), "<=", 0.2),
        target("heads and chart of a plan, kB at most", max(r["heads kB"] + r["chart kB"] for r in told), "<=", 480),
        target("traced / untraced wall, at most", max(r["traced wall"] for r in steps), "<=", 1.05),
        target("spans of work / busy time, at least", min(r["work / busy"] for r in steps), ">=", 0.97),
    ]
    publish("timelines", [*told, *steps], targets)


if __name__ == "__main__":
    main()
