"""What a step costs under each op pattern: processor seconds, wall seconds and bytes, beside plain timm.

    python -m tests.bench.engine [--blocks 12] [--rounds 8] [--wire shared|gloo] [--out engine]

ViT-S width (384, 6 heads), 98 px, 5 micro-batches of 16 images, two gloo workers with one thread each, pinned to
different cores. Placements are the planner's: whole blocks; split blocks; split blocks placed together with the heads
that 40 % FULL holds still, which then tend to be one worker's in each block (the lead). "LoRA" rows train adapters of
rank 8 on all matrices of the blocks. Every round runs one step
of every row in turn, so that a machine that changes its speed changes all rows alike; figures are medians over the
rounds after the first, ratios are of medians. "plain timm" is the ordinary loop (five backward passes,
clipping, AdamW), run on both cores at the same time, since two busy cores are slower than one.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from dataclasses import asdict, dataclass, replace

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F

from scheduler.compiler import compile_step
from scheduler.cost import Costs, residual_bytes
from scheduler.domain import DeviceProfile, Scores, StepShape
from scheduler.placement import propose
from scheduler.selection import SelectionRequest, select, static_part
from scheduler.simulate import simulate
from tests.bench.report import publish, target
from tests.workers.processes import on_processes
from workers.contract import Optimiser
from workers.executor import Executor
from workers.lora import attach
from workers.method import Lora
from workers.optimiser import Adam
from workers.partition import model_shape
from workers.profiling import keep_freed_memory, profile_device
from workers.shard import Shard
from workers.steps import Batch, StepPrograms
from workers.transport import Gloo, Shared

MICRO_BATCHES, BATCH = 5, 16
TRANSPORTS = {"shared": Shared, "gloo": Gloo}
HELD = "40 % FULL, rest FORWARD, held"
PATTERNS = {
    "all FULL": SelectionRequest(),
    "3F2S whole micro-batches": SelectionRequest(ratios=(3, 0, 2), strategy="hardest"),
    "3F2S": SelectionRequest(ratios=(3, 0, 2)),
    "3F2S scattered": SelectionRequest(ratios=(3, 0, 2), grain="scattered"),
    "2F3O redrawn": SelectionRequest(ratios=(2, 3, 0), strategy="random", hold="none"),
    "2F1O2S held": SelectionRequest(ratios=(2, 1, 2)),
    "2F1O2S redrawn": SelectionRequest(ratios=(2, 1, 2), strategy="random", hold="none"),
    HELD: SelectionRequest(ratios=(2, 3, 0)),
}
LEAD_PATTERNS = ("all FULL", HELD)
LORA_PATTERNS = ("all FULL", "3F2S whole micro-batches", "3F2S")
PLAIN = ("plain timm", "")


@dataclass
class Row:
    """One pattern on one placement: what runs it, and what it must send."""

    executor: Executor
    steps: list[StepPrograms]
    forecast_bytes: list[int]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--wire", choices=TRANSPORTS, default="shared")
    parser.add_argument("--out", default="engine")
    args = parser.parse_args()
    measured, exact = on_processes(2, measure, args.blocks, args.rounds, args.wire)[0]
    publish(args.out, rows_of(measured), targets_of(measured, exact), note_of(args))


def measure(rank, num_blocks, rounds, wire):
    """(by (placement, pattern) an array [steps, 3]: cpu s, wall s, bytes; whether bytes were always as simulated)."""
    model = settled(core_of(rank), num_blocks)
    batch = synthetic_batch()
    rows = build_rows(rank, model, wire)
    plain = plain_timm(model, batch)
    samples, exact = {}, True
    # What others are divided by is measured twice a round: its noise is in every ratio.
    order = [key for key in rows for _ in range(2 if key[1] == "all FULL" else 1)]
    for turn in range(rounds + 1):
        for _ in range(2):
            record(samples, PLAIN, *clocked(plain), 0.0)
        for key in order:
            row = rows[key]
            which = turn % len(row.steps)
            cpu_s, wall_s = clocked(lambda row=row, which=which: row.executor.run(row.steps[which], batch))
            sent = torch.tensor([float(sum(row.executor.transport.sent_bytes))], dtype=torch.float64)
            dist.all_reduce(sent)
            exact &= int(sent) == row.forecast_bytes[which]
            record(samples, key, cpu_s, wall_s, float(sent))
    return {key: np.array(values[len(values) // (rounds + 1) :]) for key, values in samples.items()}, exact


def build_rows(rank, model, wire):
    transport = TRANSPORTS[wire]()
    transport.prepare(residual_bytes(model_shape(model), StepShape(MICRO_BATCHES, BATCH)))
    adapted = copy.deepcopy(model)
    attach(adapted, Lora(rank=8), seed=0)
    rows = {}
    for prefix, each in (("", model), ("LoRA, ", adapted)):
        costs = Costs(model_shape(each), StepShape(MICRO_BATCHES, BATCH), gathered(profile_of(each, transport)))
        worth = Scores(*np.random.default_rng(0).uniform(0.5, 1.5, (2, costs.shape.num_blocks, costs.shape.num_heads)))
        candidates = {
            "split": propose(costs, "split", scores=worth)[0],
            "whole": propose(costs, "whole", scores=worth)[0],
        }
        if not prefix:
            held = static_part(PATTERNS[HELD], costs, worth)
            candidates["split, lead"] = propose(costs, "split", static=held, scores=worth)[0]
        for name, candidate in candidates.items():
            shard = Shard(each, candidate.placement, rank)
            executor = Executor(shard, transport, update=Adam(shard, Optimiser(learning_rate=1e-5), 1000))
            patterns = LORA_PATTERNS if prefix else LEAD_PATTERNS if name == "split, lead" else PATTERNS
            for pattern in patterns:
                rows[prefix + name, pattern] = row_of(executor, candidate, PATTERNS[pattern], costs, worth, not prefix)
    return rows


def profile_of(model, transport):
    return profile_device(model, StepShape(MICRO_BATCHES, BATCH), transport)


def row_of(executor, candidate, request, costs, worth, embed_grad):
    # Worths are random, since here only cost counts.
    asked = replace(request, embed_grad=embed_grad)
    chosen = select(asked, candidate.placement, costs, worth, full_LH=candidate.full_LH)
    programs = [compile_step(candidate.placement, ops, costs, embed_grad=embed_grad) for ops in chosen.cycle]
    steps = [StepPrograms(p, executor.rank, costs, executor.shard.dtype) for p in programs]
    return Row(executor, steps, [simulate(p, costs).total_bytes for p in programs])


def plain_timm(model, batch, autocast=None):
    """The ordinary loop; with `autocast` it computes in that type."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.05, fused=True)

    def step():
        for m in range(MICRO_BATCHES):
            images = batch.images[m]
            with torch.autocast(images.device.type, dtype=autocast, enabled=autocast is not None):
                logits = model(images)
            (F.cross_entropy(logits.float(), batch.labels[m]) / MICRO_BATCHES).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()

    return step


def clocked(work):
    """(processor seconds of both workers, the slower one's wall seconds) of one step; of two plain loops, the mean."""
    dist.barrier()
    cpu, wall = time.process_time(), time.perf_counter()
    report = work()
    spent = torch.tensor([time.process_time() - cpu, time.perf_counter() - wall], dtype=torch.float64)
    everyone = [torch.zeros_like(spent) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, spent)
    cpus, walls = zip(*(t.tolist() for t in everyone), strict=True)
    return (sum(cpus) / len(cpus) if report is None else sum(cpus)), max(walls)


def record(samples, key, *values):
    samples.setdefault(key, []).append(values)


def core_of(rank):
    """A core of its own, of those that this process may use."""
    return sorted(os.sched_getaffinity(0))[rank]


def settled(core, num_blocks):
    """This worker on one core with one thread; the model, the same on all."""
    torch.set_num_threads(1)
    keep_freed_memory()
    os.sched_setaffinity(0, {core})
    torch.manual_seed(0)
    return vit_small(num_blocks)


def vit_small(num_blocks):
    return timm.create_model("vit_small_patch14_dinov2", img_size=98, num_classes=10, depth=num_blocks)


def synthetic_batch(batch=BATCH, img_size=98, device="cpu"):
    gen = torch.Generator().manual_seed(1)
    images = {m: torch.randn(batch, 3, img_size, img_size, generator=gen).to(device) for m in range(MICRO_BATCHES)}
    labels = {m: torch.randint(0, 10, (batch,), generator=gen).to(device) for m in range(MICRO_BATCHES)}
    return Batch(images, labels)


def gathered(profile):
    """Every worker's profile, in rank order: programs must be compiled from the same ones."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, asdict(profile))
    return [DeviceProfile.from_dict(data) for data in found]


def ratio(some, other, column):
    """The quotient of two rows' medians."""
    return float(np.median(some[:, column]) / np.median(other[:, column]))


def rows_of(measured):
    plain = measured[PLAIN]
    return [_row(measured, key, plain) for key in measured]


def _row(measured, key, plain):
    placement, pattern = key
    mine, full = measured[key], measured.get((placement, "all FULL"), plain)
    cpu, wall, sent = np.median(mine, axis=0).tolist()
    return {
        "placement": placement,
        "pattern": pattern,
        "cpu s": cpu,
        "wall s": wall,
        "MB": sent / 1e6,
        "cpu / all FULL": ratio(mine, full, 0),
        "wall / all FULL": ratio(mine, full, 1),
        "bytes / all FULL": sent / float(np.median(full[:, 2])) if pattern else 0.0,
        "cpu / plain": ratio(mine, plain, 0),
        "bytes / split": sent / float(np.median(measured["split", "all FULL"][:, 2])),
    }


def targets_of(measured, exact):
    def row(placement, pattern="all FULL"):
        return measured[placement, pattern]

    def of_full(placement, pattern, column):
        return ratio(row(placement, pattern), row(placement), column)

    return [
        target("all FULL, split: cpu / plain timm", ratio(row("split"), measured[PLAIN], 0), "<=", 1.08),
        target("3F2S, split: cpu", of_full("split", "3F2S", 0), "<=", 0.65),
        target("3F2S, whole: cpu", of_full("whole", "3F2S", 0), "<=", 0.65),
        target("2F1O2S redrawn, split: cpu", of_full("split", "2F1O2S redrawn", 0), "<=", 0.50),
        target("2F1O2S redrawn, whole: cpu", of_full("whole", "2F1O2S redrawn", 0), "<=", 0.50),
        target("2F1O2S redrawn, split: bytes", of_full("split", "2F1O2S redrawn", 2), "<=", 0.40),
        target("40 % held, split, lead: cpu", of_full("split, lead", HELD, 0), "<=", 0.63),
        target("40 % held, whole: cpu", of_full("whole", HELD, 0), "<=", 0.63),
        target("40 % held, whole: wall", of_full("whole", HELD, 1), "<=", 0.65),
        target("LoRA 3F2S, split: cpu", of_full("LoRA, split", "3F2S whole micro-batches", 0), "<=", 0.66),
        target("LoRA 3F2S, whole: cpu", of_full("LoRA, whole", "3F2S whole micro-batches", 0), "<=", 0.66),
        target("whole / split, all FULL: bytes", ratio(row("whole"), row("split"), 2), "<=", 0.05),
        target("bytes measured = simulated, every step", exact, "==", True),
    ]


def note_of(args):
    versions = f"torch {torch.__version__}, timm {timm.__version__}"
    return f"{args.blocks} blocks; medians of {args.rounds} rounds; wire: {args.wire}; {versions}"


if __name__ == "__main__":
    main()
