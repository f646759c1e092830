"""Ray Tune as a sweep uses it, with jobs that do not train: each setting once, whatever dies."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.ray_head import ROOT, Head, ray_head, run
from tests.waiting import until
from tests.workers.sweeps.fake_service import TOKEN, FakeService, plain, served
from workers.events import read_events
from workers.sweeps.contract import SweepContext, SweepSpec

RATIOS = {"values": [[1, 0, 4], [2, 0, 3], [3, 0, 2], [4, 0, 1]]}
GRID: dict[str, Any] = {"space": {"method.ratios": RATIOS}}
pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head() as head:
        yield head


@pytest.fixture
def service() -> Iterator[FakeService]:
    with served(FakeService()) as service:
        yield service


def context_of(folder: Path, service: FakeService, spec: dict[str, Any], attempt: int = 1) -> Path:
    """The context of an attempt: a run directory of its own, the same storage."""
    run_dir = folder / f"a{attempt}"
    run_dir.mkdir()
    context = SweepContext(
        sweep_id=folder.name, attempt=attempt, spec=SweepSpec.model_validate(spec), run_dir=str(run_dir),
        storage_path=str(folder / "storage"), post_url=service.url, post_token=TOKEN,
    )  # fmt: skip
    (run_dir / "context.json").write_text(context.model_dump_json())
    return run_dir / "context.json"


def start(head: Head, path: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "workers.sweep", "--context", str(path)]
    env = {**head.env, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    return subprocess.Popen(command, env=env, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)


def trial_processes(head: Head) -> list[psutil.Process]:
    """Those of Tune's trials on this head, among whatever else the machine runs."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any("ImplicitFunc" in word for word in process.info["cmdline"] or ()):
            with contextlib.suppress(psutil.Error):
                if process.environ().get("RAY_AUTH_TOKEN_PATH") == head.env["RAY_AUTH_TOKEN_PATH"]:
                    found.append(process)
    return found


def of_type(path: Path, wanted: str) -> list[dict[str, Any]]:
    return [event for _, event in read_events(path.parent / "events.jsonl", 0) if event["type"] == wanted]


def test_a_grid_becomes_points_though_a_trial_fails_one_lacks_its_metric_and_the_service_is_away(
    head: Head, service: FakeService, tmp_path: Path
) -> None:
    def end(job: dict[str, Any]) -> dict[str, Any]:
        ended = dict(plain(job))
        full = job["spec"].get("method", {}).get("ratios", {}).get("full")
        if full == 1:
            return {"status": "failed", "error": {"code": "worker_failed", "message": "a worker is gone"}}
        if full == 2:
            ended["figures"] = {**ended["figures"], "accuracy": None}
        return ended

    service.end = end
    path = context_of(tmp_path, service, GRID)
    service.answers = [503, 502, 429]
    done = run(head, "workers.sweep", "--context", str(path))
    assert done.returncode == 0, done.stderr
    assert [job["key"] for job in service.jobs.values()] == ["full", "t-000", "t-001", "t-002", "t-003", "stopped"]
    (result,) = of_type(path, "sweep.result")
    status = {point["key"]: (point["status"], (point["error"] or {}).get("code")) for point in result["data"]["points"]}
    assert status == {
        "full": ("succeeded", None), "t-000": ("failed", "worker_failed"), "t-001": ("failed", "metric_missing"),
        "t-002": ("succeeded", None), "t-003": ("succeeded", None), "stopped": ("succeeded", None),
    }  # fmt: skip
    point = next(point for point in result["data"]["points"] if point["key"] == "t-002")
    assert point["compute"] == pytest.approx(0.6)
    assert service.jobs["stopped"]["spec"]["steps"] == 4  # of 5: the knee of the trials is t-003, at 0.8
    told = [(event["data"]["key"], event["level"]) for event in of_type(path, "sweep.trial")]
    assert told[1:3] == [("t-000", "warning"), ("t-001", "warning")] and len(told) == 6
    files = {event["data"]["name"] for event in of_type(path, "artifact.ready")}
    assert files == {"sweep.json", "front.svg", "front.png"} and "a worker is gone" in done.stderr
    assert json.loads((path.parent / "result" / "sweep.json").read_text())["knee"] == result["data"]["knee"]
    kept = [file for file in (tmp_path / "storage").rglob("*") if file.is_file()]
    assert kept and not any(TOKEN.encode() in file.read_bytes() for file in kept)


@pytest.mark.parametrize("search", ["grid", pytest.param("optuna", marks=pytest.mark.slow)])
def test_a_driver_that_is_killed_is_followed_by_one_that_runs_each_setting_once(
    head: Head, service: FakeService, tmp_path: Path, search: str
) -> None:
    spec = {**GRID, "search": {"type": search, "samples": 4}, "at_once": 1}
    first = context_of(tmp_path, service, spec)
    driver = start(head, first)
    until(lambda: len(service.jobs) >= 3 and list(service.jobs.values())[-1]["step"] > 1, 120)
    driver.kill()
    driver.wait()
    begun = dict(service.jobs)
    time.sleep(1)
    service.offset = 0
    second = context_of(tmp_path, service, spec, attempt=2)
    done = run(head, "workers.sweep", "--context", str(second))
    assert done.returncode == 0, done.stderr
    assert list(service.jobs)[: len(begun)] == list(begun) and len(service.jobs) == 6
    assert [job["status"] for job in service.jobs.values()] == ["succeeded"] * 6
    if search == "grid":
        tried = [tuple(job["setting"]["method.ratios"]) for job in service.jobs.values() if not job["baseline"]]
        assert tried == [tuple(value) for value in RATIOS["values"]]
    (result,) = of_type(second, "sweep.result")
    assert {point["key"] for point in result["data"]["points"]} == set(service.jobs)


@pytest.mark.slow
def test_a_trial_whose_process_is_killed_finds_its_child_again(
    head: Head, service: FakeService, tmp_path: Path
) -> None:
    service.steps = 6
    path = context_of(tmp_path, service, {**GRID, "baselines": False})
    driver = start(head, path)
    until(lambda: service.jobs.get("t-001", {}).get("step", 0) > 1, 120)
    (process,) = trial_processes(head)
    process.kill()
    assert driver.wait(200) == 0
    assert [job["key"] for job in service.jobs.values()] == ["t-000", "t-001", "t-002", "t-003"]
    points = of_type(path, "sweep.result")[0]["data"]["points"]
    assert [point["status"] for point in points] == ["succeeded"] * 4


@pytest.mark.slow
def test_asha_ends_what_does_poorly_and_nothing_half_made_becomes_a_result(
    head: Head, service: FakeService, tmp_path: Path
) -> None:
    service.steps = 9
    values = {"values": [[4, 0, 1], [3, 0, 2], [2, 0, 3], [1, 0, 4]]}  # the best comes first: the others lose
    spec = {
        "space": {"method.ratios": values}, "asha": {"grace_steps": 2, "reduction": 2}, "objectives": {"loss": "min"},
    }  # fmt: skip
    path = context_of(tmp_path, service, spec)
    done = run(head, "workers.sweep", "--context", str(path))
    assert done.returncode == 0, done.stderr
    points = {point["key"]: point for point in of_type(path, "sweep.result")[0]["data"]["points"]}
    stopped = [key for key, point in points.items() if point["status"] == "stopped"]
    assert stopped and points["t-000"]["status"] == "succeeded"
    assert all(service.jobs[key]["status"] == "cancelled" for key in stopped)
    assert all(points[key]["accuracy"] is None and points[key]["figures"] is None for key in stopped)
    fronts = of_type(path, "sweep.result")[0]["data"]["fronts"]
    assert not any(key in front for front in fronts.values() for key in stopped)


@pytest.mark.slow
def test_after_a_killed_driver_asha_knows_what_the_trials_before_had_reached(
    head: Head, service: FakeService, tmp_path: Path
) -> None:
    service.steps = 12
    values = {"values": [[4, 0, 1], [1, 0, 4]]}  # the poor one comes when the good one is over
    spec = {
        "space": {"method.ratios": values}, "asha": {"grace_steps": 2, "reduction": 4}, "objectives": {"loss": "min"},
        "baselines": False,
    }  # fmt: skip
    driver = start(head, context_of(tmp_path, service, spec))
    until(lambda: service.jobs.get("t-000", {}).get("status") == "succeeded", 120)
    driver.kill()
    driver.wait()
    service.offset = 0
    second = context_of(tmp_path, service, spec, attempt=2)
    done = run(head, "workers.sweep", "--context", str(second))
    assert done.returncode == 0, done.stderr
    points = {point["key"]: point["status"] for point in of_type(second, "sweep.result")[0]["data"]["points"]}
    assert points == {"t-000": "succeeded", "t-001": "stopped"}
    assert service.jobs["t-001"]["step"] < 8  # at its first rung: the next, where t-000 reports again, is at 8


@pytest.mark.slow
def test_a_front_of_two_objectives_is_looked_for_by_optuna(head: Head, service: FakeService, tmp_path: Path) -> None:
    spec = {
        "space": {"method.ratios": RATIOS, "optimiser.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}},
        "search": {"type": "optuna", "samples": 3}, "objectives": {"accuracy": "max", "compute": "min"},
        "baselines": False, "at_once": 2,
    }  # fmt: skip
    path = context_of(tmp_path, service, spec)
    done = run(head, "workers.sweep", "--context", str(path))
    assert done.returncode == 0, done.stderr
    (result,) = of_type(path, "sweep.result")
    assert len(result["data"]["points"]) == 3 and result["data"]["of"] == "largest"
    assert all(1e-4 <= job["setting"]["optimiser.learning_rate"] <= 1e-2 for job in service.jobs.values())


@pytest.mark.slow
def test_a_sweep_of_failures_fails_and_says_why(head: Head, service: FakeService, tmp_path: Path) -> None:
    service.end = lambda job: {"status": "failed", "error": {"code": "x", "message": "no such weights"}}
    path = context_of(tmp_path, service, {**GRID, "baselines": False})
    done = run(head, "workers.sweep", "--context", str(path))
    assert done.returncode == 1 and "no such weights" in done.stderr
    (outcome,) = of_type(path, "outcome")
    assert outcome["data"]["error"]["code"] == "no_trial_succeeded" and not of_type(path, "sweep.result")


@pytest.mark.slow  # Ray tries for long before it says so
def test_a_cluster_that_refuses_the_token_is_named(head: Head, service: FakeService, tmp_path: Path) -> None:
    path = context_of(tmp_path, service, GRID)
    (tmp_path / "token").write_text("0" * 64)
    done = run(head, "workers.sweep", "--context", str(path), RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    (outcome,) = of_type(path, "outcome")
    assert done.returncode == 1 and outcome["data"]["error"]["code"] == "cluster_refused" and not service.jobs
