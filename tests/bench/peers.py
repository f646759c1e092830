"""One training step of the same model and images, as others run it and as we do.

    python -m tests.bench.peers [--cores 0 1] [--blocks 12] [--rounds 6] [--peers PATTERN …] [--out peers]

ViT-S width (384, 6 heads), 98 px, 5 micro-batches × 16 images, AdamW, gradients clipped. A process for each entry of
`--cores`, pinned there, one thread each: `--cores 0 1` are equal workers, `--cores 0 1 1` unlike ones. Messages of all
go through gloo over the loopback interface, and bytes are what its counters say; "rings" rows are ours as the product
runs on one machine, through shared memory, where nothing passes that interface.

plain timm         the ordinary loop, on every core at once: processor seconds are one loop's
DDP                images of a micro-batch shared out, gradients summed in the last backward pass
FSDP2              the same with parameters, gradients and moments sharded by block
tensor parallel    DTensor: heads and hidden units shared out evenly, every sub-layer summed
pipeline           torch's 1F1B schedule, blocks shared out evenly; each stage clips by its own norm
ours               a placement by the planner from measured profiles, all FULL and at three budgets of compute: whole
                   micro-batches, or ("heads") the most worthy heads

The loss of every peer's first step is compared with plain timm's: all compute the same thing.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import statistics
import time

import numpy as np
import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from scheduler.compiler import compile_step
from scheduler.cost import Costs, residual_bytes
from scheduler.domain import Scores, StepShape
from scheduler.plan import make_plan
from scheduler.request import PlanRequest
from tests.bench.engine import BATCH, MICRO_BATCHES, gathered, settled, synthetic_batch
from tests.bench.report import matching, publish, target
from tests.workers.processes import on_processes
from workers.contract import Optimiser
from workers.executor import Executor
from workers.optimiser import Adam
from workers.partition import model_shape
from workers.profiling import profile_device
from workers.shard import Shard
from workers.steps import StepPrograms
from workers.transport import Gloo, Shared

BUDGETS = (1.0, 0.6, 0.4, 0.2)  # whole micro-batches of five, so that every step is alike
MODES = {"split": "split", "whole": "whole", "planned": "auto"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--peers", nargs="+", default=["*"], help="patterns of row names")
    parser.add_argument("--out", default="peers")
    args = parser.parse_args()
    wanted = matching(PEERS, args.peers)
    rows = []
    for name in wanted:
        rows.append(row_of(name, on_processes(len(args.cores), measure, name, args)))
        print(f"{name}: {rows[-1]['cpu s']:.3f} cpu s, {rows[-1]['wall s']:.3f} s, {rows[-1]['MB']:.1f} MB", flush=True)
    publish(args.out, rows, targets_of(rows, args), note_of(args))


def measure(rank, name, args):
    """This worker's figures of one peer: lists over the rounds, and its peak memory."""
    model = settled(args.cores[rank], args.blocks)
    step = PEERS[name](model, synthetic_batch())
    seen = {"cpu": [], "wall": [], "bytes": [], "loss": 0.0}
    for turn in range(args.rounds + 1):
        dist.barrier()
        sent, cpu, wall = wire_bytes(), time.process_time(), time.perf_counter()
        loss = step()
        spent = time.process_time() - cpu, time.perf_counter() - wall
        dist.barrier()
        if turn == 0:  # the first one warms caches and connections
            seen["loss"] = None if loss is None else float(torch.as_tensor(loss).detach())
            continue
        for key, value in zip(("cpu", "wall", "bytes"), (*spent, wire_bytes() - sent), strict=True):
            seen[key].append(value)
    return {**seen, "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def wire_bytes():
    return psutil.net_io_counters(pernic=True)["lo"].bytes_sent


def row_of(name, found):
    alone = name == "plain timm"
    cpus = [statistics.median(of["cpu"]) for of in found]
    losses = [of["loss"] for of in found if of["loss"] is not None]
    return {
        "peer": name,
        "cpu s": statistics.fmean(cpus) if alone else sum(cpus),
        "wall s": max(statistics.median(of["wall"]) for of in found),
        "MB": 0.0 if alone else statistics.median(found[0]["bytes"]) / 1e6,
        "peak MB": max(of["rss"] for of in found),
        "loss": statistics.fmean(losses) if losses else float("nan"),
    }


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.05, foreach=True)


def update(model, optimiser):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad()


def accumulated(model, batch, rows=slice(None), before=None):
    """Backward passes of all micro-batches; the mean loss."""
    total = 0.0
    for m in range(MICRO_BATCHES):
        if before is not None:
            before(m)
        loss = F.cross_entropy(model(batch.images[m][rows]), batch.labels[m][rows]) / MICRO_BATCHES
        loss.backward()
        total += loss.detach()
    return total


def plain(model, batch):
    optimiser = adam(model)

    def step():
        loss = accumulated(model, batch)
        update(model, optimiser)
        return loss

    return step


def own_rows():
    """This worker's images of a micro-batch."""
    rank, size = dist.get_rank(), dist.get_world_size()
    return slice(rank * BATCH // size, (rank + 1) * BATCH // size)


def ddp(model, batch):
    wrapped = DistributedDataParallel(model)
    optimiser = adam(wrapped)

    def step():
        wrapped.require_backward_grad_sync = False

        def before(m):
            wrapped.require_backward_grad_sync = m == MICRO_BATCHES - 1

        loss = accumulated(wrapped, batch, own_rows(), before)
        update(wrapped, optimiser)
        return loss

    return step


def fsdp2(model, batch):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimiser = adam(model)

    def step():
        loss = accumulated(model, batch, own_rows(), lambda m: model.set_requires_gradient_sync(m == MICRO_BATCHES - 1))
        update(model, optimiser)
        return loss

    return step


def tensor_parallel(model, batch):
    """Each worker's rows of the fused qkv are made neighbours, so that a shard is whole heads."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    plan = {
        "attn.qkv": ColwiseParallel(), "attn.proj": RowwiseParallel(),
        "mlp.fc1": ColwiseParallel(), "mlp.fc2": RowwiseParallel(),
    }  # fmt: skip
    for block in model.blocks:
        attn = block.attn
        order = torch.arange(3 * attn.attn_dim).view(3, size, -1).transpose(0, 1).flatten()
        with torch.no_grad():
            attn.qkv.weight.copy_(attn.qkv.weight[order])
            attn.qkv.bias.copy_(attn.qkv.bias[order])
        attn.num_heads, attn.attn_dim = attn.num_heads // size, attn.attn_dim // size
        parallelize_module(block, mesh, plan)
    sharded, whole = (
        [p for p in model.parameters() if isinstance(p, DTensor) == is_sharded] for is_sharded in (True, False)
    )
    optimisers = [torch.optim.AdamW(params, lr=1e-5, weight_decay=0.05, foreach=True) for params in (sharded, whole)]

    def step():
        loss = accumulated(model, batch)
        own = [p.grad.to_local() for p in sharded if p.grad is not None]
        shared = [p.grad for p in whole if p.grad is not None]
        squares = [torch.stack(torch._foreach_norm(grads)).square().sum() for grads in (own, shared)]
        dist.all_reduce(squares[0])
        scale = min(1.0, 1.0 / float(sum(squares)) ** 0.5)
        torch._foreach_mul_([*own, *shared], scale)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        return loss

    return step


class Stage(nn.Module):
    """Consecutive blocks, with the model's ends where they are first or last."""

    def __init__(self, model, index, size):
        super().__init__()
        blocks = list(model.blocks)
        self.blocks = nn.Sequential(*blocks[index * len(blocks) // size : (index + 1) * len(blocks) // size])
        self.first, self.last = index == 0, index == size - 1
        kept = ("patch_embed", "cls_token", "pos_embed", "norm", "fc_norm", "head")
        model.blocks = nn.Sequential()
        self.ends = model if self.first or self.last else None
        for name in kept[3:] if self.first and not self.last else kept[:3] if self.last and not self.first else ():
            setattr(model, name, None if name in ("cls_token", "pos_embed") else nn.Identity())

    def forward(self, x):
        if self.first:
            x = self.ends.norm_pre(self.ends.patch_drop(self.ends._pos_embed(self.ends.patch_embed(x))))
        x = self.blocks(x)
        return self.ends.forward_head(self.ends.norm(x)) if self.last else x


def pipeline(model, batch):
    rank, size = dist.get_rank(), dist.get_world_size()
    module = Stage(model, rank, size)
    schedule = Schedule1F1B(
        PipelineStage(module, rank, size, torch.device("cpu")), MICRO_BATCHES, loss_fn=F.cross_entropy
    )
    optimiser = adam(module)
    images = torch.cat([batch.images[m] for m in range(MICRO_BATCHES)])
    labels = torch.cat([batch.labels[m] for m in range(MICRO_BATCHES)])

    def step():
        losses = []
        if rank == 0:
            schedule.step(images, return_outputs=False)
        elif rank == size - 1:
            schedule.step(target=labels, losses=losses, return_outputs=False)
        else:
            schedule.step(return_outputs=False)
        update(module, optimiser)
        return torch.stack(losses).mean() if losses else None

    return step


def ours(mode, compute, wire, strategy="hardest"):
    """The planner's answer to a job that asks for this placement and budget."""

    def build(model, batch):
        shape, step_shape, transport = model_shape(model), StepShape(MICRO_BATCHES, BATCH), wire()
        transport.prepare(residual_bytes(shape, step_shape))
        profile = profile_device(model, step_shape, transport)
        costs = Costs(shape, step_shape, gathered(profile))
        worth = Scores(*np.random.default_rng(0).uniform(0.5, 1.5, (2, shape.num_blocks, shape.num_heads)))
        request = PlanRequest(placement=mode, compute=compute if compute < 1 else None, strategy=strategy)
        plan = make_plan(request, costs, worth)
        shard = Shard(model, plan.placement, dist.get_rank())
        executor = Executor(shard, transport, update=Adam(shard, Optimiser(learning_rate=1e-5), 1000))
        rank = dist.get_rank()
        programs = (compile_step(plan.placement, ops, costs) for ops in plan.cycle)
        steps = itertools.cycle([StepPrograms(program, rank, costs, shard.dtype) for program in programs])
        return lambda: executor.run(next(steps), batch).loss

    return build


PEERS = {
    "plain timm": plain,
    "DDP": ddp,
    "FSDP2": fsdp2,
    "tensor parallel": tensor_parallel,
    "pipeline": pipeline,
    **{f"ours, {name}, {c:g}": ours(mode, c, Gloo) for name, mode in MODES.items() for c in BUDGETS},
    "ours, split, heads, 0.6": ours("split", 0.6, Gloo, "hull"),
    "ours, whole, heads, 0.6": ours("whole", 0.6, Gloo, "hull"),
    **{f"ours, rings, {name}, {c:g}": ours(mode, c, Shared) for name, mode in MODES.items() for c in BUDGETS},
}


def targets_of(rows, args):
    by_name = {row["peer"]: row for row in rows}

    def over(name, column, most):
        if {name, "tensor parallel"} <= set(by_name):
            value = by_name[name][column] / by_name["tensor parallel"][column]
            yield target(f"{name} / tensor parallel: {column}", value, "<=", most)

    if len(set(args.cores)) < len(args.cores):
        return [*over("ours, planned, 0.6", "wall s", 0.6), *over("ours, rings, planned, 0.6", "wall s", 0.6)]
    return [
        *(t for column in ("cpu s", "MB") for t in over("ours, split, 1", column, 1.0)),
        *(t for column in ("cpu s", "MB") for t in over("ours, split, 0.6", column, 0.6)),
        *(t for column in ("cpu s", "MB") for t in over("ours, whole, 0.6", column, 0.6)),
    ]


def note_of(args):
    cores = " ".join(map(str, args.cores))
    return f"{args.blocks} blocks; cores {cores}; medians of {args.rounds} rounds; torch {torch.__version__}"


if __name__ == "__main__":
    main()
