"""Unlike devices: does the planned split beat the even one, and does it follow a device that slows down?

    python -m tests.bench.unlike [--parts split slowed] [--blocks 6] [--width 384] [--window 2] [--out unlike]

Three worker processes over shared memory, one thread each: rank 0 has core 0 to itself, ranks 1 and 2 share core 1. A
ViT with random weights (6 heads, 112 px, 50 tokens) is trained on scikit-learn's digits, blown up, since here only time
counts. Everything is the product's own: `Session` profiles, scores, asks a `Scheduler` in rank 0's process, trains
in windows, folds what it timed, migrates.

split    all-FULL; medians of a window's steps, over the windows after the second, and of the rounds' ratios. "even"
         gives every worker as many blocks, or as many heads of each block, and the better of the two counts. "ideal" is
         the work over the sum of the workers' speeds, as their profiles showed in these windows: nobody waits, messages
         are free.
slowed   all-FULL, then 60 % of the compute; after some windows a process that never sleeps is pinned to core 0. Ratios
         are to the new ideal, the median over the last ten windows.

Steps have 16 micro-batches: with 8, filling and draining a chain of two teams alone takes an eighth of the step.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile

import torch

from scheduler.cost import Costs
from scheduler.domain import DeviceProfile, ModelShape, Op, StepShape
from tests.bench.report import publish, target
from tests.workers.planners import GroupPlanner, ScriptedPlanner, even_heads
from tests.workers.processes import busy_guest, on_processes
from workers.changes import full_heads_of
from workers.contract import JobSpec
from workers.profiling import keep_freed_memory
from workers.session import Place, Session
from workers.transport import Shared

CORES = (0, 1, 1)
HEADS = 6
CALM_WINDOWS, SLOWED_WINDOWS = 6, 20
WITHIN = 1.15
NOTICED = 1.3  # a worker's heads take so much longer than before
REHEARSED = 2  # windows that count for nothing: all-FULL without update, and the first of training


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("split", "slowed"), default=("split", "slowed"))
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--micro-batches", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--window", type=int, default=2)
    parser.add_argument("--windows", type=int, default=5, help="of each run of the part split")
    parser.add_argument("--rounds", type=int, default=3, help="of the part split")
    parser.add_argument("--compute", type=float, nargs="+", default=(1.0, 0.6), help="budgets of the part slowed")
    parser.add_argument("--out", default="unlike")
    args = parser.parse_args()
    rows, targets = [], []
    if "split" in args.parts:
        found = on_processes(len(CORES), run_split, args)[0]
        rows += split_rows(found)
        targets += split_targets(found)
    if "slowed" in args.parts:
        for compute in args.compute:
            found = on_processes(len(CORES), run_slowed, args, compute)[0]
            rows += slowed_rows(found, compute)
            targets += slowed_targets(found, compute)
    publish(args.out, rows, targets, note_of(args))


def run_split(rank, args):
    """By placement the windows that count of every round: rounds go over all placements, as machines drift."""
    settle_in(rank)
    transport = Shared()
    blocks = [[min(len(CORES) - 1, block * len(CORES) // args.blocks)] * HEADS for block in range(args.blocks)]
    heads = even_heads(args.blocks, HEADS, len(CORES))
    planners = {
        "planned": lambda: GroupPlanner(transport),
        "even blocks": lambda: ScriptedPlanner(transport, lambda _: blocks),
        "even heads": lambda: ScriptedPlanner(transport, lambda _: heads),
    }
    spec, found = spec_of(args, args.windows, {}), {name: [] for name in planners}
    for _ in range(args.rounds):
        for name, planner in planners.items():
            found[name].append((run_job(spec, transport, planner()) or [])[1:])
    return found


def run_slowed(rank, args, compute):
    settle_in(rank)
    transport = Shared()
    planner = SlowingPlanner(transport, slowed_from=CALM_WINDOWS + 1)
    method = {"budgets": {"compute": compute}, "strategy": "hull"} if compute < 1 else {}
    spec = spec_of(args, CALM_WINDOWS + SLOWED_WINDOWS, method)
    try:
        return run_job(spec, transport, planner)
    finally:
        planner.stop()


def settle_in(rank):
    os.sched_setaffinity(0, {CORES[rank]})
    torch.set_num_threads(1)
    keep_freed_memory()


def spec_of(args, windows, method):
    sizes = {"depth": args.blocks, "embed_dim": args.width, "num_heads": HEADS}
    return JobSpec.model_validate(
        {
            "model": "vit_small_patch16_224",
            "model_args": sizes,
            "img_size": 112,
            "method": method,
            "workers": len(CORES),
            "micro_batches": args.micro_batches,
            "micro_batch_size": args.batch,
            "steps": windows * args.window,
            "window": args.window,
        }
    )


def run_job(spec, transport, planner):
    """One job without evaluation and export: what happened in its windows, at rank 0; nothing elsewhere."""
    recorded = Recorded(planner)
    with tempfile.TemporaryDirectory() as folder:
        session = Session(spec, folder, transport, recorded, None, Place(sharers=len(CORES)))
        session._evaluate = lambda when: 0.0
        session._export = lambda: None
        session.run()
    return None if transport.rank else windows_of(session.ledger, recorded)


class Recorded:
    """A planner that keeps what it was told and what it answered."""

    def __init__(self, planner):
        self.planner = planner
        self.reports, self.answers = [], []

    def announce(self, announcement):
        sizes = {key: tuple(v) if isinstance(v, list) else v for key, v in announcement["shape"].items()}
        self.shape, self.step = ModelShape(**sizes), StepShape(**announcement["step"])
        self.planner.announce(announcement)

    def plan(self, window, report):
        self.reports.append(report)
        self.answers.append(self.planner.plan(window, report))
        return self.answers[-1]


class SlowingPlanner(GroupPlanner):
    """From the plan of window `slowed_from` on, core 0 has a second guest."""

    def __init__(self, transport, slowed_from):
        super().__init__(transport)
        self.slowed_from, self.guest = slowed_from, None

    def plan(self, window, report):
        planned = super().plan(window, report)
        if window == self.slowed_from and self.transport.rank == 0:
            self.guest = busy_guest(CORES[0])
        return planned

    def stop(self):
        if self.guest is not None:
            self.guest.kill()
            self.guest.wait()


def windows_of(ledger, planner):
    """What happened in every window of training, as plain numbers."""
    out = []
    for seen in ledger.windows[REHEARSED:]:
        planned = planner.answers[seen.window]
        # What a window showed is in the report for the next one; the last window's is never sent.
        told = planner.reports[seen.window + 1] if seen.window + 1 < len(planner.reports) else None
        profiles = (
            planned.profiles
            if told is None
            else [DeviceProfile.from_dict(told["profiles"][str(r)]) for r in range(len(CORES))]
        )
        alone_us = alone(planned.plan.cycle, Costs(planner.shape, planner.step, profiles))
        out.append(
            {
                "window": seen.window,
                "step_s": seen.step_seconds_median,
                "forecast_s": seen.forecast_seconds,
                "ideal_s": 1e-6 / sum(1 / us for us in alone_us),
                "alone_s": [us * 1e-6 for us in alone_us],
                "heads": planned.plan.placement.heads_owned.tolist(),
                "full heads": full_heads_of(planned.plan),
                "owners": planned.plan.placement.owner_LH.tolist(),
                "reason": planned.change.get("reason", ""),
                "busy_s": seen.busy,
            }
        )
    return out


def alone(cycle, costs):
    """µs that each worker would take for a whole step by itself, all heads of a block together."""
    heads, num = costs.shape.num_heads, len(cycle)
    full, run = (sum(int((ops >= op).sum()) for ops in cycle) / num for op in (Op.FULL, Op.FORWARD))
    micro_batches = costs.step.num_micro_batches
    out = []
    for worker in range(costs.num_workers):
        forward, backward = (
            sum(us(worker, part, heads) for part in ("attn", "mlp")) / heads
            for us in (costs.forward_us, costs.backward_us)
        )
        ends = micro_batches * (costs.embed_us(worker) + costs.classify_us(worker))
        updates = costs.update_us(worker, costs.shape.num_blocks * heads)
        out.append(run * forward + full * backward + ends + updates)
    return out


def median(windows, key):
    return statistics.median(window[key] for window in windows)


def error_of(windows):
    return statistics.median(abs(window["step_s"] / window["forecast_s"] - 1) for window in windows)


def split_rows(found):
    return [
        {
            "placement": name,
            "round": turn,
            "step s": median(windows, "step_s"),
            "forecast s": median(windows, "forecast_s"),
            "median error": error_of(windows),
            "ideal s": median(windows, "ideal_s"),
            "heads": " ".join(map(str, windows[-1]["heads"])),
            "alone s": " ".join(f"{s:.2f}" for s in windows[-1]["alone_s"]),
            "busy s": " ".join(f"{s:.2f}" for s in windows[-1]["busy_s"]),
        }
        for name, rounds in found.items()
        for turn, windows in enumerate(rounds, 1)
    ]


def split_targets(found):
    """Ratios of runs that follow each other, the median over the rounds."""
    planned = found["planned"]
    even = [
        min(median(windows, "step_s") for windows in pair)
        for pair in zip(found["even blocks"], found["even heads"], strict=True)
    ]
    over_even = [median(mine, "step_s") / other for mine, other in zip(planned, even, strict=True)]
    over_ideal = [median(mine, "step_s") / median(mine, "ideal_s") for mine in planned]
    return [
        target("planned / even split: step", statistics.median(over_even), "<=", 0.8),
        target("planned / ideal: step", statistics.median(over_ideal), "<=", WITHIN),
        target("median forecast error", error_of(list(itertools.chain(*planned))), "<=", 0.1),
    ]


def slowed_rows(found, compute):
    ideal = new_ideal(found)
    calm = next(w["ideal_s"] for w in found if w["window"] == CALM_WINDOWS)
    return [
        {
            "compute": compute,
            "window": w["window"],
            "slowed": "yes" if w["window"] > CALM_WINDOWS else "",
            "step s": w["step_s"],
            "forecast s": w["forecast_s"],
            "step / ideal": w["step_s"] / (ideal if w["window"] > CALM_WINDOWS else calm),
            "heads": " ".join(map(str, w["heads"])),
            "full heads": " ".join(f"{n:.1f}" for n in w["full heads"]),
            "alone s": " ".join(f"{s:.2f}" for s in w["alone_s"]),
            "reason": w["reason"],
        }
        for w in found
    ]


def slowed_targets(found, compute):
    """Windows count from the first slowed one, which is 1; for what never came, one more than there are is told."""
    calm, slowed = ([w for w in found if (w["window"] > CALM_WINDOWS) == late] for late in (False, True))
    before, ideal = calm[-1], new_ideal(found)
    fast = first(w["step_s"] <= WITHIN * ideal for w in slowed)
    noticed = first(w["alone_s"][0] > NOTICED * before["alone_s"][0] for w in slowed)
    shifted = first(w["full heads"][0] < before["full heads"][0] - 0.5 for w in slowed)
    moves = [a["owners"] != b["owners"] for a, b in itertools.pairwise([before, *slowed])]
    shared = [
        target("median forecast error, calm", error_of(calm), "<=", 0.1),
        target("noticed at the end of window", noticed, "<=", 1),
        target("heads migrated in window", first(moves), "<=", 3),
        target("placement changes after the first", max(0, sum(moves) - 1), "==", 0),
        target("within 1.15 of the new ideal in window", fast, "<=", 3),
        target("step / new ideal, last ten windows", median(slowed[-10:], "step_s") / ideal, "<=", WITHIN),
    ]
    if compute < 1:
        shared.append(target("FULL heads shifted in window", shifted, "<=", 3))
    return [{**each, "name": f"compute {compute:g}: {each['name']}"} for each in shared]


def new_ideal(found):
    return median(found[-10:], "ideal_s")


def first(found):
    """The number of the first window for which it holds."""
    held = list(found)
    return held.index(True) + 1 if True in held else len(held) + 1


def note_of(args):
    shape = f"{args.blocks} blocks × {HEADS} heads, width {args.width}, {args.micro_batches} × {args.batch} images"
    return f"{shape}; windows of {args.window} steps; torch {torch.__version__}"


if __name__ == "__main__":
    main()
