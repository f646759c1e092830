"""What a step costs on one device under each op pattern: seconds and peak memory, beside plain timm.

    python -m tests.bench.one_device [--device cuda] [--model vit_small_patch14_dinov2] [--img-size 224] [--batch 32]
        [--blocks N] [--rounds 10] [--out one-device]

One worker, so that nothing is sent: what the engine costs by itself, and how much of the work that it leaves out comes
back as time. On a GPU both sides compute in bfloat16 where it has it, and the device is waited for after each step.
Every round runs one step of every row in turn; figures are medians over the rounds after the first.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import timm
import torch

from scheduler.compiler import compile_step
from scheduler.cost import Costs
from scheduler.domain import Op, Placement, StepShape, step_flops, uniform_ops
from tests.bench.engine import MICRO_BATCHES, plain_timm, synthetic_batch
from tests.bench.report import publish
from workers.contract import Optimiser
from workers.executor import Executor
from workers.optimiser import Adam
from workers.partition import model_shape
from workers.profiling import keep_freed_memory, profile_device
from workers.shard import Shard
from workers.steps import StepPrograms
from workers.transport import InProcess, Mailboxes

# Share of FULL heads, share of FORWARD heads among the rest, per head and held still; or counts of micro-batches, the
# same in all blocks or others in each.
HELD = {"2F3O held": (0.4, 1.0), "1F4O held": (0.2, 1.0), "2F1O2S held": (0.4, 1 / 3)}
COUNTS = {"3F2S": (3, 0, 2), "2F3O": (2, 3, 0)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="vit_small_patch14_dinov2")
    parser.add_argument("--img-size", type=int, default=98)
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", default="one-device")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = measure(args)
    publish(args.out, rows, [], note_of(args))


def measure(args):
    device = torch.device(args.device)
    autocast = torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else None
    depth = {} if args.blocks is None else {"depth": args.blocks}
    torch.manual_seed(0)
    model = timm.create_model(args.model, img_size=args.img_size, num_classes=10, **depth).to(device)
    step_shape, shape = StepShape(MICRO_BATCHES, args.batch), model_shape(model)
    profile = profile_device(model, step_shape, InProcess(0, Mailboxes(1)), device=device, autocast=autocast)
    costs = Costs(shape, step_shape, [profile])
    placement = Placement.make(np.zeros((shape.num_blocks, shape.num_heads), dtype=int), 1)
    batch = synthetic_batch(args.batch, args.img_size, device)
    full = uniform_ops(shape, MICRO_BATCHES, Op.FULL)
    tables = {"all FULL": full, **{n: held(shape, *s) for n, s in HELD.items()}}
    tables |= {f"{n}, by blocks": by_micro_batch(shape, counts, turn=1) for n, counts in COUNTS.items()}
    tables |= {f"{n}, whole micro-batches": by_micro_batch(shape, counts, turn=0) for n, counts in COUNTS.items()}
    works, flops = {"plain timm": plain_timm(model, batch, autocast)}, {"plain timm": 1.0}
    for name, ops_LHM in tables.items():
        shard = Shard(model, placement, 0, device)
        update = Adam(shard, Optimiser(learning_rate=1e-5), 1000)
        executor = Executor(shard, InProcess(0, Mailboxes(1)), update=update, autocast=autocast)
        steps = StepPrograms(compile_step(placement, ops_LHM, costs), 0, costs, shard.dtype)
        works[name] = lambda executor=executor, steps=steps: executor.run(steps, batch)
        flops[name] = step_flops(shape, step_shape, ops_LHM) / step_flops(shape, step_shape, full)
    seen = {name: [] for name in works}
    for _ in range(args.rounds + 1):
        for name, work in works.items():
            seen[name].append(clocked(work, device))
    return [row(name, flops[name], seen) for name in works]


def held(shape, full, forward):
    """Op tables in which the same heads, drawn once, do the same for every micro-batch."""
    order = np.random.default_rng(0).permutation(shape.num_blocks * shape.num_heads)
    num_full = round(full * len(order))
    num_forward = round(forward * (len(order) - num_full))
    ops = np.full(len(order), int(Op.SKIP), dtype=np.int8)
    ops[order[:num_full]] = int(Op.FULL)
    ops[order[num_full : num_full + num_forward]] = int(Op.FORWARD)
    return np.repeat(ops.reshape(shape.num_blocks, shape.num_heads)[:, :, None], MICRO_BATCHES, axis=2)


def by_micro_batch(shape, counts, turn):
    """All heads of a block do the same for a micro-batch; from block to block it is another one, or the same."""
    ops = np.repeat(np.array([Op.FULL, Op.FORWARD, Op.SKIP], dtype=np.int8), counts)
    ops_LM = np.stack([np.roll(ops, turn * block) for block in range(shape.num_blocks)])
    return np.repeat(ops_LM[:, None], shape.num_heads, axis=1)


def clocked(work, device):
    """(Wall seconds, processor seconds, peak MiB of the device beyond what was there before) of one step."""
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if on_cuda else 0
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    if on_cuda:
        torch.cuda.synchronize(device)
    spent = time.perf_counter() - wall, time.process_time() - cpu
    peak = torch.cuda.max_memory_allocated(device) - before if on_cuda else 0
    return (*spent, peak / 2**20)


def row(name, flops, seen):
    walls, cpus, peaks = (statistics.median(column) for column in zip(*seen[name][1:], strict=True))
    full, plain = (statistics.median(s[0] for s in seen[of][1:]) for of in ("all FULL", "plain timm"))
    return {
        "pattern": name,
        "compute": flops,
        "wall s": walls,
        "cpu s": cpus,
        "peak MiB": peaks,
        "wall / all FULL": walls / full,
        "wall / plain": walls / plain,
    }


def note_of(args):
    name = torch.cuda.get_device_name(args.device) if args.device != "cpu" else "cpu"
    return (
        f"{args.model}, {args.img_size} px, {MICRO_BATCHES} × {args.batch} images, {name}; "
        f"medians of {args.rounds} rounds; torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
