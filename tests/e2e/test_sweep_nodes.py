"""A node that leaves while a sweep trains: its trial goes on with who is left, and so does the sweep."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.runs import ROOT, Ray, end_tree, ray_here
from tests.waiting import until
from workers.events import read_events
from workers.sweeps.contract import SweepContext, SweepSpec

SWEEP: dict[str, Any] = {
    "job": {
        "steps": 60, "window": 10, "images_per_class": 12, "workers": {"min": 1, "max": 2},
        "checkpoint": {"every_s": None, "every_steps": 5},
    },
    "space": {"method.ratios": {"values": [[3, 0, 2], [2, 0, 3]]}},
    "baselines": False,
}  # fmt: skip


def sweep(ray: Ray, out: Path) -> subprocess.Popen[bytes]:
    """Its driver; a worker takes a whole node."""
    context = SweepContext(
        sweep_id="swept", spec=SweepSpec.model_validate(SWEEP), run_dir=str(out), storage_path=str(out / "ray"),
        resources_per_worker={"CPU": 1.0},
    )  # fmt: skip
    out.mkdir()
    (out / "context.json").write_text(context.model_dump_json())
    words = ["--context", str(out / "context.json")]
    env = {**os.environ, **ray.env, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    with (ray.home / "driver.txt").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "workers.sweep", *words], env=env, cwd=ROOT, stdout=output, stderr=output
        )


def of_type(run_dir: Path, wanted: str) -> list[dict[str, Any]]:
    return [event["data"] for _, event in read_events(run_dir / "events.jsonl", 0) if event["type"] == wanted]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_node_that_leaves_costs_its_trial_a_group_and_the_sweep_nothing() -> None:
    with ray_here(cpus=1) as ray:
        second, out = ray.add_node(1), ray.home / "swept"
        driver = sweep(ray, out)
        first = out / "trials" / "t-000"
        until(lambda: len(of_type(first, "metrics")) >= 12 or driver.poll() is not None, 240)
        end_tree(second)
        status, printed = driver.wait(300), (ray.home / "driver.txt").read_text(errors="replace")
        assert status == 0, printed[-3000:]
        plans = [event["placement"]["owners"] for event in of_type(first, "plan.created")]
        assert [len({owner for row in rows for owner in row}) for rows in plans] == [2, 1]
        assert [event["failures"] for event in of_type(first, "phase") if event["name"] == "recovering"] == [1]
        points = {point["key"]: point for point in of_type(out, "sweep.result")[0]["points"]}
        assert {key: point["status"] for key, point in points.items()} == {"t-000": "succeeded", "t-001": "succeeded"}
        assert all(point["figures"]["steps"] == 60 for point in points.values())
        assert points["t-001"]["placement"] == "single" and points["t-000"]["placement"].endswith(", single")
        assert "not all are placed alike" in printed
