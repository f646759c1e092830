"""What narrower numbers and forward passes run again cost and save, on two workers.

    python -m tests.bench.precision [--blocks 6] [--rounds 6] [--seeds 3] [--steps 100] [--out precision]

Steps: ViT-S width (384, 6 heads), 98 px, 5 micro-batches of 16 images, all FULL, split blocks, two workers with one
thread each, on cores of their own, shared memory. Every round runs a step of every setting in turn; seconds are medians
over the rounds after the first. "kept MB" is the most that one worker's FULL heads held for their backward passes at a
time, by the storages that autograd saved and the inputs, without weights. "forecast MB" is the simulation's. Bytes are
checked against the simulation.

Jobs: the bundled model on digits by the product's own session, 3 of 5 micro-batches FULL, one FORWARD, one SKIP,
the planner's own split placement; accuracy on the test images, mean and deviation over the seeds, and the loss of the
last ten steps beside that of fp32 with the same seed.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from scheduler.compiler import compile_step
from scheduler.cost import Costs, residual_bytes
from scheduler.domain import Op, Placement, uniform_ops
from scheduler.simulate import simulate
from tests.bench.engine import (
    BATCH,
    MICRO_BATCHES,
    clocked,
    core_of,
    gathered,
    settled,
    synthetic_batch,
)
from tests.bench.report import mean_and_std, publish, target
from tests.workers.engine import saved
from tests.workers.planners import GroupPlanner, even_heads
from tests.workers.processes import on_processes
from workers.casting import compute_type
from workers.contract import JobSpec, Optimiser
from workers.events import EventLog, read_events
from workers.executor import Executor
from workers.optimiser import Adam
from workers.partition import model_shape
from workers.precision import Precision, step_shape
from workers.profiling import keep_freed_memory, profile_device
from workers.session import Place, Session
from workers.shard import Shard
from workers.steps import StepPrograms
from workers.transport import Shared

SETTINGS = {
    "fp32": {},
    "bf16 compute": {"compute": "bf16"},
    "bf16 wire": {"wire": "bf16"},
    "both": {"compute": "bf16", "wire": "bf16"},
    "recompute": {"recompute": True},
    "both, recompute": {"compute": "bf16", "wire": "bf16", "recompute": True},
}
LAST = 10  # steps whose mean loss is compared


class Weighing(Executor):
    """Notes the most that FULL heads held for backward; weighs every graph, so its time says nothing."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.held, self.most, self.made = {}, 0, 0

    def _run_full(self, i, leaf, bias, *, watched):
        y_BND, out = super()._run_full(i, leaf, bias, watched=watched)
        block = self.shard.blocks[i.block]
        known = {bank.untyped_storage().data_ptr() for bank in block.bank.values()}
        known |= {param.untyped_storage().data_ptr() for _, param in block.trunk.parameters()}
        for kind in (None, self.autocast):
            known |= {w.untyped_storage().data_ptr() for w in block.trainable(i.part, i.full, kind).values()}
        found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved(out.grad_fn)}
        own = {leaf.untyped_storage().data_ptr()}
        self.made = sum(size for place, size in found.items() if place not in known | own)
        self.most = max(self.most, sum(self.held.values()) + leaf.nbytes * (i.kind == "fwd") + self.made)
        return y_BND, out

    def _fwd(self, i):
        super()._fwd(i)
        if i.full:
            leaf, out = self._state.kept[i.block, i.part, i.mb]
            self.held[i.block, i.part, i.mb] = leaf.nbytes + (0 if out is None else self.made)

    def _bwd(self, i):
        super()._bwd(i)
        del self.held[i.block, i.part, i.mb]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", default="precision")
    args = parser.parse_args()
    stepped = on_processes(2, measure, args.blocks, args.rounds)
    jobs = on_processes(2, train_all, args.seeds, args.steps)[0]
    rows = [step_row(name, stepped) for name in SETTINGS] + [job_row(name, jobs) for name in SETTINGS]
    note = f"{args.blocks} blocks, {args.rounds} rounds, {args.steps} steps; torch {torch.__version__}"
    publish(args.out, rows, targets_of(stepped, jobs), note)


def measure(rank, num_blocks, rounds):
    """By setting: {cpu s, wall s: of every round; bytes, exact, kept, forecast: of this worker's}."""
    model, batch = settled(core_of(rank), num_blocks), synthetic_batch()
    shape, transport = model_shape(model), Shared()
    placement = Placement.make(even_heads(shape.num_blocks, shape.num_heads, 2), 2)
    ops_LHM = uniform_ops(shape, MICRO_BATCHES, Op.FULL)
    ready, found = {}, {}
    for name, words in SETTINGS.items():
        precision = Precision.model_validate(words)
        autocast = compute_type(precision, torch.device("cpu"))
        step = step_shape(MICRO_BATCHES, BATCH, precision, bf16=autocast is not None)
        if not ready:
            transport.prepare(residual_bytes(shape, step))
            profiles = gathered(profile_device(model, step, transport))
        costs = Costs(shape, step, profiles)  # one order of instructions for all settings
        programs = compile_step(placement, ops_LHM, costs)
        steps, seen = StepPrograms(programs, rank, costs, torch.float32), simulate(programs, costs)
        shard = Shard(model, placement, rank)
        update = Adam(shard, Optimiser(learning_rate=1e-5), 1000)
        weighing = Weighing(shard, transport, autocast=autocast)
        report = weighing.run(steps, batch)
        shard.clear()
        exact = report.sent_bytes == seen.link_bytes[rank]
        ready[name] = Executor(shard, transport, update=update, autocast=autocast), steps
        found[name] = {"cpu": [], "wall": [], "bytes": seen.total_bytes, "exact": exact, "kept": weighing.most}
        found[name] |= {"forecast": seen.peak_bytes[rank], "gflop": seen.flops / 1e9}
    for _ in range(rounds + 1):
        for name, (executor, steps) in ready.items():
            cpu_s, wall_s = clocked(lambda executor=executor, steps=steps: executor.run(steps, batch))
            found[name]["cpu"].append(cpu_s)
            found[name]["wall"].append(wall_s)
    return found


def train_all(rank, seeds, steps):
    """By (setting, seed): (accuracy after, loss of the last steps, traffic of a step in MB)."""
    keep_freed_memory()
    transport = Shared()
    return {
        (name, seed): train(rank, transport, words, seed, steps)
        for seed in range(seeds)
        for name, words in SETTINGS.items()
    }


def train(rank, transport, words, seed, steps):
    fields = {"steps": steps, "window": 50, "micro_batch_size": 8, "placement": "split", "seed": seed}
    method = {"ratios": {"full": 3, "forward": 1, "skip": 1}}
    spec = JobSpec.model_validate({**fields, "method": method, "precision": words})
    dist.barrier()
    with tempfile.TemporaryDirectory() as folder:
        log = EventLog(folder) if rank == 0 else None
        ledger = Session(spec, folder, transport, GroupPlanner(transport), log, Place(sharers=2)).run()
        if log is None:
            return None
        log.close()
        events = [event for _, event in read_events(Path(folder) / "events.jsonl", 0)]
    losses = [event["data"]["loss"] for event in events if event["type"] == "metrics"]
    sent = next(row for row in ledger["rows"] if row["name"] == "traffic per step")
    assert abs(sent["measured"] - sent["predicted"]) < 1e-9
    return 100 * ledger["accuracy"]["after"], float(np.mean(losses[-LAST:])), sent["measured"]


def median(found, key):
    return float(np.median(found[key][1:]))


def step_row(name, stepped):
    mine, plain = stepped[0][name], stepped[0]["fp32"]
    kept, told = (max(of[name][key] for of in stepped) / 1e6 for key in ("kept", "forecast"))
    return {
        "setting": name,
        "cpu s": median(mine, "cpu"),
        "cpu / fp32": median(mine, "cpu") / median(plain, "cpu"),
        "wall / fp32": median(mine, "wall") / median(plain, "wall"),
        "MB": mine["bytes"] / 1e6,
        "MB / fp32": mine["bytes"] / plain["bytes"],
        "kept MB": kept,
        "forecast MB": told,
        "GFLOP": mine["gflop"],
    }


def job_row(name, jobs):
    mine = [value for (setting, _), value in jobs.items() if setting == name]
    plain = [value for (setting, _), value in jobs.items() if setting == "fp32"]
    apart = [own[1] - other[1] for own, other in zip(mine, plain, strict=True)]
    mean, spread = mean_and_std([accuracy for accuracy, _, _ in mine])
    return {
        "setting": name,
        "accuracy": f"{mean:.1f} ± {spread:.1f}",
        "loss": float(np.mean([loss for _, loss, _ in mine])),
        "loss − fp32": float(np.mean(apart)),
        "largest": float(np.max(np.abs(apart))),
        "MB": mine[0][2],
    }


def targets_of(stepped, jobs):
    rows = {name: step_row(name, stepped) for name in SETTINGS}
    plain = rows["fp32"]
    accuracies = {n: np.mean([value[0] for (setting, _), value in jobs.items() if setting == n]) for n in SETTINGS}
    worst = max(float(accuracies["fp32"] - accuracy) for accuracy in accuracies.values())
    return [
        target("bytes measured = simulated", all(of[name]["exact"] for of in stepped for name in SETTINGS), "==", True),
        target("bf16 wire: bytes", rows["bf16 wire"]["MB / fp32"], "<=", 0.52),
        target("recompute: kept", rows["recompute"]["kept MB"] / plain["kept MB"], "<=", 0.4),
        target("recompute: cpu", rows["recompute"]["cpu / fp32"], "<=", 1.4),
        target("points of accuracy lost at most", worst, "<=", 1.5),
    ]


if __name__ == "__main__":
    main()
