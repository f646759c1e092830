"""One training run of `accuracy`: the product's session, on processes or on threads that share a GPU."""

from __future__ import annotations

import json
import resource
import tempfile

import numpy as np
import torch

from scheduler.actor import Scheduler
from scheduler.domain import Op
from tests.bench.ways import WAYS
from tests.workers.engine import on_threads
from tests.workers.planners import DirectPlanner, GroupPlanner, ScriptedPlanner, even_heads
from tests.workers.processes import on_processes
from workers.contract import JobSpec
from workers.profiling import keep_freed_memory
from workers.session import Place, Session
from workers.transport import Shared


def on_group(args, name, seeds):
    """Train one way with each seed, on processes of its own: peak memory is a process's, and never falls."""
    return on_processes(args.workers, _worker, args, name, seeds)[0]


def _worker(rank, args, name, seeds):
    keep_freed_memory()
    transport = Shared()
    runs = [train(args, name, seed, transport, GroupPlanner(transport)) for seed in seeds]
    return [{**run, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024} for run in runs]


def on_device(args, name, seeds):
    """The same on threads of this process, which share its GPU."""
    return [_on_threads(args, name, seed) for seed in seeds]


def _on_threads(args, name, seed):
    torch.set_num_threads(1)
    torch.cuda.reset_peak_memory_stats()
    scheduler = Scheduler()

    def work(rank, transport):
        return train(args, name, seed, transport, DirectPlanner(scheduler, rank, args.workers))

    run = on_threads(args.workers, work)[0]
    # Every thread has counted the seconds of all.
    return {**run, "cpu_s": run["cpu_s"] / args.workers, "peak_mb": torch.cuda.max_memory_allocated() / 2**20}


def train(args, name, seed, transport, planner):
    """What the run's ledger says, on one worker of the group."""
    way = WAYS[name]
    if way.last is not None:
        planner = ScriptedPlanner(
            transport,
            lambda _: even_heads(planner.shape.num_blocks, planner.shape.num_heads, args.workers),
            last_blocks(way.last),
        )
    place = Place(sharers=args.workers, device=args.device)
    with tempfile.TemporaryDirectory() as folder:
        ledger = Session(spec_of(args, way, seed), folder, transport, planner, None, place).run()
    measured = {entry["name"]: entry["measured"] for entry in ledger["rows"]}
    share = way.share * (way.batches or args.micro_batches) / args.micro_batches
    return {
        "way": name,
        "seed": seed,
        "accuracy": 100 * ledger["accuracy"]["after"],
        "before": 100 * ledger["accuracy"]["before"],
        "compute": share * measured["compute fraction"],
        "bytes": share * (measured["bytes fraction"] or 0.0),
        "cpu_s": measured["processor seconds per step"] * ledger["steps"],
        "wall_s": ledger["phases"]["train"],
    }


def spec_of(args, way, seed):
    steps = max(1, round(way.share * args.steps))
    return JobSpec.model_validate(
        {
            "model": args.model,
            "model_args": dict(read_arg(text) for text in args.model_arg),
            "weights": args.weights,
            "img_size": args.img_size,
            "dataset": args.dataset,
            "images_per_class": args.images_per_class,
            "method": way.method,
            "optimiser": {"learning_rate": way.rate * args.lr},
            "workers": args.workers,
            "micro_batches": way.batches or args.micro_batches,
            "micro_batch_size": args.micro_batch_size,
            "steps": steps,
            "window": args.window if way.window is None else max(1, round(way.window * steps)),
            "placement": "split" if args.workers > 1 else "auto",
            "seed": seed,
        }
    )


def read_arg(text):
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def last_blocks(share):
    """Op tables in which the blocks nearest the classifier are FULL and the others FORWARD."""

    def cycle(window, shape, num_micro_batches):
        ops_LHM = np.full((shape.num_blocks, shape.num_heads, num_micro_batches), int(Op.FORWARD), dtype=np.int8)
        ops_LHM[shape.num_blocks - round(share * shape.num_blocks) :] = int(Op.FULL)
        return (ops_LHM,)

    return cycle
