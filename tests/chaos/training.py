"""Workers that die, hang or stand still while they train, each run beside a calm one under the same plan.

    python -m tests.chaos.training [--seeds 10]

A first run writes a checkpoint after a few steps; the calm run and every hurt one go on from there, and so under one
plan and one order of sums: their losses and weights are the same bits, or something was lost.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from signal import SIGKILL, SIGSTOP
from typing import Any

from tests.bench.report import publish, target
from tests.chaos.runs import EVERY, STEPS, Ray, Run, ray_here
from workers.manifest import names

START = EVERY
FAST_S, STALL_S = 20.0, 45.0
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    given = parser.parse_args()
    rows, targets = rows_and_targets(given.seeds)
    publish("chaos_training", rows, targets, f"{given.seeds} seeds of kills")


def rows_and_targets(seeds: int) -> tuple[list[Row], list[Row]]:
    """All runs: `seeds` kills, a hang, a stop."""
    with ray_here() as ray:
        calm, base = calm_run(ray)
        kills = [killed(ray, calm, base, seed) for seed in range(seeds)]
        stalls = [stalled(ray, calm, base, "hang"), stalled(ray, calm, base, "SIGSTOP")]
    rows = [*kills, *stalls]
    recoveries = [row["new step s"] for row in kills]
    slowest = max(recoveries) if len(recoveries) < 20 else statistics.quantiles(recoveries, n=20)[-1]
    return rows, [
        target("kills: runs equal to the calm one, bit for bit", sum(row["equal"] for row in kills), "==", seeds),
        target("kills: to the next new step, p95 s", slowest, "<=", FAST_S),
        *(target(f"{row['fault']}: replaced, s", row["replaced s"], "<=", STALL_S) for row in stalls),
        target("hangs and stops: runs equal to the calm one", sum(row["equal"] for row in stalls), "==", len(stalls)),
    ]


def calm_run(ray: Ray) -> tuple[Run, Path]:
    """(the run that nothing happens to, the checkpoint that it and all others go on from)."""
    first = Run(ray, "first").ended()
    assert first.outcome == "succeeded", first.printed()
    base = ray.home / "base"
    base.mkdir()
    name = f"step-{START:08d}"
    assert name in names(first.vault), names(first.vault)
    shutil.copytree(first.vault / name, base / name)
    calm = Run(ray, "calm", resume_from=base).ended()
    assert calm.outcome == "succeeded" and min(calm.losses()) == START + 1, calm.printed()
    return calm, base


def killed(ray: Ray, calm: Run, base: Path, seed: int) -> Row:
    """SIGKILL of rank 1 at a random step."""
    step = random.Random(seed).randint(START + 1, STEPS - 2)
    run = Run(ray, f"kill{seed}", resume_from=base)
    return hurt(run, calm, "SIGKILL", step, lambda: run.strike(1, SIGKILL))


def stalled(ray: Ray, calm: Run, base: Path, how: str) -> Row:
    """A rank that hangs in its training thread, or whose process stands still."""
    step = START + 10
    if how == "SIGSTOP":
        run = Run(ray, "stopped", resume_from=base)
        return hurt(run, calm, how, step, lambda: run.strike(1, SIGSTOP))
    run = Run(ray, "hung", resume_from=base, fail=f"step.begin:hang@{step - START}")
    return hurt(run, calm, how, step - 1, lambda: run.steps_at(step - 1))


def hurt(run: Run, calm: Run, fault: str, step: int, act: Callable[[], float]) -> Row:
    """Let it happen after a step, wait for the end, and compare."""
    run.until_step(step)
    moment = act()
    run.ended()
    lost = {event["data"].get("step") for event in run.events("phase") if event["data"]["name"] == "recovering"}
    return {
        "fault": fault,
        "after step": step,
        "outcome": run.outcome,
        "equal": run.losses() == calm.losses() and run.repeated() and run.weights == calm.weights,
        "redone steps": len(run.steps()) - len(run.losses()),
        "seen s": run.recovering_after(moment),
        "replaced s": run.phase_after(moment, "planning"),
        "new step s": run.first_step_after(moment),
        "losses counted": len(lost),
    }


if __name__ == "__main__":
    main()
