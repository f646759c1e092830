"""A worker that is killed under a real Ray: the run goes on by itself and computes the same bits."""

from __future__ import annotations

import shutil
from signal import SIGKILL

import pytest

from tests.chaos.runs import EVERY, Run, ray_here


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_a_killed_worker_costs_seconds_and_no_bit() -> None:
    with ray_here() as ray:
        calm = Run(ray, "calm", steps=20).ended()
        assert calm.outcome == "succeeded", calm.printed()
        name = f"step-{EVERY:08d}"
        shutil.copytree(calm.vault / name, ray.home / "base" / name)
        run = Run(ray, "killed", resume_from=ray.home / "base", steps=20)
        run.until_step(12)
        run.strike(1, SIGKILL)
        run.ended()
        assert run.outcome == "succeeded", run.printed()
        assert run.losses() == {step: loss for step, loss in calm.losses().items() if step > EVERY}
        assert run.repeated() and run.weights == calm.weights
        (lost,) = [event for event in run.events("phase") if event["data"]["name"] == "recovering"]
        assert lost["data"]["failures"] == 1 and lost["data"]["reason"]
        (resumed,) = run.events("checkpoint.resumed")[1:]
        assert resumed["data"]["step"] == 10
