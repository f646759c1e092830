"""What checkpoints take from training: steps while one is written, beside the steps between.

    python -m tests.bench.checkpoints [--steps 100] [--every 20]

A real run of a ViT-S on two workers. Seconds are those between the events of two steps: the copy, during which all
stand still, is in them, and so is what the writers take from the cores of the steps.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from typing import Any

from tests.bench.report import publish, target
from tests.chaos.runs import Run, ray_here

PERIOD_S = 60.0  # one a minute is asked; the default is one every five
SHAPE = {"model": "vit_small_patch16_224", "img_size": 112, "micro_batches": 4, "micro_batch_size": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=20)
    given = parser.parse_args()
    with ray_here() as ray:
        checkpoint = {"every_s": None, "every_steps": given.every}
        run = Run(ray, "saving", **SHAPE, steps=given.steps, checkpoint=checkpoint, images_per_class=20).ended()
        assert run.outcome == "succeeded", run.printed()
        row = row_of(run)
    targets = [
        target("stolen of the steps' time, one checkpoint a minute", row["stolen s each"] / PERIOD_S, "<=", 0.03)
    ]
    publish("checkpoints", [row], targets, f"{given.steps} steps, a checkpoint every {given.every}")


def row_of(run: Run) -> dict[str, Any]:
    """The gaps between steps, those in which a checkpoint was written apart."""
    ends = [event["at"] for event in run.events("metrics")]
    saved = run.events("checkpoint.saved")
    writing = [(event["at"] - event["data"]["seconds"], event["at"]) for event in saved]
    calm, busy = [], []
    for begin, end in itertools.pairwise(ends):
        (busy if any(begin < until and since < end for since, until in writing) else calm).append(end - begin)
    return {
        "step s": statistics.fmean(calm),
        "checkpoints": len(saved),
        "MB each": statistics.fmean(event["data"]["bytes"] for event in saved) / 1e6,
        "written in s": statistics.fmean(event["data"]["seconds"] for event in saved),
        "steps meanwhile": len(busy),
        "stolen s each": (sum(busy) - len(busy) * statistics.fmean(calm)) / len(saved),
    }


if __name__ == "__main__":
    main()
