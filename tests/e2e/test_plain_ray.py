"""Jobs and sweeps on a cluster of Ray without a service: `ray job submit` of a checkout, and a sweep that trains."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.ray_head import ROOT, Head, ray_head, run
from workers.events import read_events
from workers.sweeps.children import SUCCEEDED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
FEW = {"steps": 6, "images_per_class": 12, "window": 5, "checkpoint": {"every_s": None}}
SWEEP = {"job": FEW, "space": {"method.ratios": {"values": [[3, 0, 2], [2, 3, 0]]}}}


def outcome(run_dir: Path) -> str:
    events = [event for _, event in read_events(run_dir / "events.jsonl", 0)]
    return str(events[-1]["data"]["status"])


def submit(head: Head, *words: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit` of this checkout; whoever runs it has the token."""
    command = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", head.dashboard]
    env = {name: value for name, value in head.env.items() if name != "RAY_ADDRESS"}
    return subprocess.run(
        [*command, "--working-dir", ".", "--", sys.executable, "-m", *words],
        env=env, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip


def test_a_checkout_is_submitted_as_a_plain_ray_job_and_so_is_a_sweep() -> None:
    with ray_head(dashboard=True) as head:
        out = head.folder / "run"
        words = "--model d2ft_digits --dataset digits --ratios 3,0,2 --steps 6 --set images_per_class=12 --set window=5"
        done = submit(head, "workers.loop", *words.split(), "--out", str(out))
        assert done.returncode == 0, done.stdout + done.stderr
        assert "step 6/6" in done.stdout and "compute fraction" in done.stdout and "test accuracy" in done.stdout
        assert outcome(out) == SUCCEEDED and (out / "result" / "model.safetensors").exists()
        refused = submit(head, "workers.loop", "--steps", "6", "--out", "here")
        assert refused.returncode != 0 and "give a whole path" in refused.stdout
        spec = head.folder / "sweep.json"
        spec.write_text(json.dumps({**SWEEP, "baselines": False}))
        swept = submit(head, "workers.sweep", "--spec", str(spec), "--out", str(head.folder / "swept"))
        assert swept.returncode == 0 and "the knee" in swept.stdout, swept.stdout + swept.stderr
        assert outcome(head.folder / "swept") == SUCCEEDED


def test_a_sweep_without_a_service_trains_its_children_itself(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps(SWEEP))
    words = ["workers.sweep", "--spec", str(tmp_path / "sweep.json"), "--out", str(tmp_path / "run")]
    with ray_head() as head:
        done = run(head, *words, timeout_s=600)
        assert done.returncode == 0, done.stderr
        begun = {path.parent.name: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("trials/*/trial.json")}
        again = run(head, *words)
        after = {path.parent.name: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("trials/*/trial.json")}
    assert set(begun) == {"full", "t-000", "t-001", "stopped"} and again.returncode == 0 and after == begun
    result = json.loads((tmp_path / "run" / "result" / "sweep.json").read_text())
    points = {point["key"]: point for point in result["points"]}
    assert [point["status"] for point in points.values()] == [SUCCEEDED] * 4 and result["of"] == "full"
    assert {point["placement"] for point in points.values()} in ({"split"}, {"whole"})
    assert points["t-000"]["compute"] == pytest.approx(0.6, abs=0.05) and result["knee"] in points
    assert points["stopped"]["figures"]["steps"] == round(6 * points[result["knee"]]["compute"]) or (
        points[result["knee"]]["baseline"] is not None
    )
    lines = done.stderr.splitlines()
    assert [line.split()[0] for line in lines if "accuracy 0" in line] == ["full", "t-000", "t-001", "stopped"]
    assert any(line.endswith("the knee") for line in lines)
