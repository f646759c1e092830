"""A model too large for one worker: divided over two that could each hold 60 % of it, and what they really take.

    python -m tests.bench.large [--model vit_large_patch16_224] [--workers 2] [--share 0.6] [--micro-batches 3]
        [--micro-batch-size 1] [--steps 2] [--out large]

One worker is measured first, and a plan for it alone says what the whole job would need there. Workers may then take
`--share` of that beside their process: one is refused, two or more get a plan. They run the product's own session, on
random images and from random weights, all heads FULL; every worker's peak is the kernel's VmHWM, which never falls.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from scheduler.cost import Costs
from scheduler.domain import Scores, StepShape
from scheduler.errors import InfeasibleError
from scheduler.plan import make_plan
from scheduler.request import PlanRequest
from tests.bench.report import publish, target
from tests.workers.planners import GroupPlanner
from tests.workers.processes import on_processes
from workers.contract import JobSpec
from workers.events import EventLog
from workers.memory import peak_bytes
from workers.model import build_model
from workers.partition import model_shape
from workers.profiling import keep_freed_memory, profile_device
from workers.pulse import Quiet
from workers.session import Place, Session
from workers.transport import Shared

CLASSES, TRAIN_IMAGES, TEST_IMAGES = ("a", "b"), 8, 2
MB = 1e6
CPU = torch.device("cpu")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_large_patch16_224")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--share", type=float, default=0.6)
    parser.add_argument("--micro-batches", type=int, default=3)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--placement", default="auto")
    parser.add_argument("--out", default="large")
    args = parser.parse_args()
    whole_bytes, cap_bytes, refusal = on_processes(1, measure_alone, spec_of(args, "digits"), args.share)[0]
    with tempfile.TemporaryDirectory() as folder:
        draw_images(Path(folder) / "data", side_of(args))
        spec = spec_of(args, f"folder://{folder}/data")
        found = on_processes(args.workers, train, spec, cap_bytes, folder)
    ledger = found[0][0]
    forecast, measured = (ledger["memory"][name] for name in ("predicted_bytes", "measured_bytes"))
    rows = [
        {
            "worker": rank,
            "whole on one MB": whole_bytes / MB,
            "may take MB": cap_bytes / MB,
            "forecast MB": told / MB,
            "peak MB": seen / MB,
            "error": seen / told - 1,
        }
        for rank, (told, seen) in enumerate(zip(forecast, measured, strict=True))
    ]
    phases = [{"worker": rank, **of_rank} for rank, (_, of_rank) in enumerate(found)]
    publish(args.out, [*rows, *phases], targets_of(rows, refusal), f"One worker: {refusal}")


def targets_of(rows, refusal):
    return [
        target("one worker alone is refused", refusal is not None, "==", True),
        *(target(f"worker {row['worker']}: forecast error", abs(row["error"]), "<=", 0.1) for row in rows),
        *(
            target(f"worker {row['worker']}: peak / what it may take", row["peak MB"] / row["may take MB"], "<=", 1.0)
            for row in rows
        ),
    ]


def spec_of(args, dataset):
    return {
        "model": args.model,
        "dataset": dataset,
        "workers": args.workers,
        "micro_batches": args.micro_batches,
        "micro_batch_size": args.micro_batch_size,
        "steps": args.steps,
        "placement": args.placement,
    }


def side_of(args):
    with torch.device("meta"):
        return build_model(JobSpec.model_validate(spec_of(args, "digits")), 1, load=False).patch_embed.img_size[0]


def draw_images(folder, side):
    """Noise in two classes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", TRAIN_IMAGES), ("test", TEST_IMAGES)):
        for label in CLASSES:
            (folder / split / label).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f"{index}.png")


def measure_alone(rank, spec, share):
    """(bytes that one worker needs in all, bytes with `share` of the model's, why a worker of so many is refused)."""
    spec = JobSpec.model_validate(spec)
    keep_freed_memory()
    model = build_model(spec, len(CLASSES))
    shape, step = model_shape(model), StepShape(spec.micro_batches, spec.micro_batch_size)
    profile = profile_device(model, step, Shared())
    worth = Scores(*np.ones((2, shape.num_blocks, shape.num_heads)))
    (whole_bytes,) = make_plan(PlanRequest(), Costs(shape, step, [profile]), worth).memory_bytes
    held = int(share * (whole_bytes - profile.base_bytes))
    cap, small = profile.base_bytes + held, replace(profile, free_bytes=held)
    try:
        make_plan(PlanRequest(), Costs(shape, step, [replace(small, limit_bytes=cap)]), worth)
    except InfeasibleError as error:
        return whole_bytes, cap, f"{error.message} {error.param}: {error.remedy}"
    return whole_bytes, cap, None


class _Peaks(Quiet):
    """Notes the process's peak at the end of every phase, in MB."""

    def __init__(self):
        super().__init__()
        self.found = {}
        self._named = "start"

    def phase(self, name):
        self.found[self._named] = peak_bytes(CPU) / MB
        self._named = name


def train(rank, spec, cap_bytes, folder):
    """(the ledger, the peak up to the end of each phase) of one worker."""
    keep_freed_memory()
    transport, peaks = Shared(), _Peaks()
    spec, place = JobSpec.model_validate(spec), Place(sharers=spec["workers"], memory_bytes=cap_bytes)
    log = EventLog(folder) if rank == 0 else None
    ledger = Session(spec, folder, transport, GroupPlanner(transport), log, place, pulse=peaks).run()
    if log is not None:
        log.close()
    peaks.phase("end")
    return ledger, peaks.found


if __name__ == "__main__":
    main()
