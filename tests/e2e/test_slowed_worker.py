"""A real Ray job in which one worker's core gets a second guest: the scheduler sees it and moves heads away."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.workers.processes import busy_guest
from workers.contract import JobSpec, RunContext
from workers.events import read_events

ROOT = Path(__file__).parents[2]
CALM_WINDOWS = 3


@pytest.fixture
def folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="d2s", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def spec() -> JobSpec:
    return JobSpec.model_validate(
        {
            "model": "vit_small_patch16_224",
            "model_args": {"depth": 4, "embed_dim": 192, "num_heads": 6},
            "img_size": 112,
            "workers": 2,
            "micro_batches": 4,
            "micro_batch_size": 8,
            "steps": 120,
            "window": 5,
            "images_per_class": 10,
        }
    )


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two workers need a core each")
def test_heads_move_away_from_a_worker_that_is_slowed_while_it_trains(folder: Path) -> None:
    run = folder / "run"
    run.mkdir()
    context = RunContext(job_id="slowed", spec=spec(), run_dir=str(run), storage_path=str(folder / "ray"), cores=(0, 1))
    (folder / "context.json").write_text(context.model_dump_json())
    env = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "workers.loop", "--context", str(folder / "context.json")]
    driver = subprocess.Popen(command, env=env, cwd=ROOT)
    guest = None
    try:
        while driver.poll() is None:
            if guest is None and len(of_type(run, "window")) > CALM_WINDOWS:
                guest = busy_guest(0)
            time.sleep(0.2)
    finally:
        for process in (driver, guest):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()
    assert driver.returncode == 0 and of_type(run, "outcome")[-1]["status"] == "succeeded"
    moves = [of["change"] for of in of_type(run, "plan.changed") if of["change"]["migrated"]]
    away = [change for change in moves if change["after"]["heads"][0] < change["before"]["heads"][0]]
    assert away and all(change["migration"]["bytes"] > 0 for change in away)
    assert away[-1]["after"]["step_us"] < away[-1]["before"]["step_us"]
    losses = [of["loss"] for of in of_type(run, "metrics")]
    assert len(losses) == spec().steps and losses[-1] < losses[0]


def of_type(run: Path, wanted: str) -> list[dict[str, Any]]:
    return [event["data"] for _, event in read_events(run / "events.jsonl", 0) if event["type"] == wanted]
