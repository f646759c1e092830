"""Whole sweeps over HTTP on one slot, by stand-ins for the drivers: followed by both clients and the command line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from service.client import ApiConflictError, ApiNotFoundError, Client
from service.home import read_secret
from service.settings import Settings
from tests.service.both import blocking_client
from tests.service.conftest import FakeRay, free_port, serving
from workers.sweeps.contract import SweepSpec

Connect = Callable[..., Any]
Run = Callable[..., Result]


@pytest.fixture(params=[Client, blocking_client], ids=["sync", "async"])
def client(request: pytest.FixtureRequest, server: str, home: Path) -> Iterator[Any]:
    """Either client, by the same words."""
    with request.param(server, read_secret(home / "key")) as found:
        yield found


def spec(job: dict[str, Any] | None = None, **metadata: str) -> SweepSpec:
    body = {"job": {"steps": 2, **(job or {})}, "space": {"seed": {"values": [1, 2]}}, "metadata": metadata}
    return SweepSpec.model_validate(body)


def until(ask: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not ask():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_sweep_ends_with_a_point_of_every_trial(client: Any, tmp_path: Path) -> None:
    made = client.submit_sweep(spec(), idempotency_key="k")
    assert client.submit_sweep(spec(), idempotency_key="k").id == made.id
    types = [event.type for event in client.events(made.id, follow=True)]
    assert types.count("sweep.trial") == 4 and "sweep.result" in types and types[-1] == "job.status"
    ended = client.wait_sweep(made.id, timeout_s=5)
    assert ended.status == "succeeded" and ended.progress.done == ended.progress.total == 4
    assert [trial.key for trial in ended.trials] == ["full", "t-0", "t-1", "stopped"]
    assert {point.key: point.compute for point in ended.points} == {"full": 1, "t-0": 1, "t-1": 1, "stopped": 0.5}
    assert ended.knee == "stopped" and ended.against == "full" and ended.result["knee"] == "full"
    assert [sweep.id for sweep in client.sweeps()] == [made.id]
    assert {job.trial_key for job in client.jobs(sweep=made.id)} == {trial.key for trial in ended.trials}
    (artifact,) = client.artifacts(made.id).data
    assert json.loads(client.download(made.id, artifact.name, tmp_path).read_text())[0]["key"] == "full"
    assert "last words" in "".join(client.logs(made.id))
    with pytest.raises(ApiConflictError):
        client.retry_sweep(made.id)
    with pytest.raises(ApiNotFoundError):
        client.get(made.id)


def test_a_cancelled_sweep_ends_with_its_trials_and_goes_on_when_retried(client: Any) -> None:
    made = client.submit_sweep(spec({"steps": 200, "metadata": {"pause_s": "0.1"}}))
    until(lambda: any(trial.step for trial in client.sweep(made.id).trials))
    assert client.cancel_sweep(made.id).status == "cancelling"
    ended = client.wait_sweep(made.id, timeout_s=20)
    until(lambda: all(trial.status == "cancelled" for trial in client.sweep(made.id).trials))
    assert ended.status == "cancelled" and len(ended.trials) == 1
    assert client.retry_sweep(made.id).status == "queued"
    until(lambda: client.sweep(made.id).attempt == 2 and client.get(ended.trials[0].job_id).attempt == 2)
    client.cancel_sweep(made.id)
    client.wait_sweep(made.id, timeout_s=20)


def test_a_failed_trial_is_told_and_the_sweep_goes_on(client: Any) -> None:
    made = client.submit_sweep(spec({"metadata": {"outcome": "failed"}}))
    ended = client.wait_sweep(made.id, timeout_s=30)
    assert ended.status == "failed" and ended.error.code == "no_trial_succeeded"
    assert {trial.error.code for trial in ended.trials} == {"bad_image"} and ended.progress.failed == 4
    told = [event for event in client.events(made.id) if event.type == "sweep.trial"]
    assert [event.level for event in told] == ["warning"] * 4


def test_a_driver_that_dies_is_followed_by_another_and_no_trial_runs_twice(client: Any) -> None:
    made = client.submit_sweep(spec(dies="2"))
    ended = client.wait_sweep(made.id, timeout_s=30)
    assert ended.status == "succeeded" and ended.attempt == 2 and len(ended.trials) == 4
    assert {job.attempt for job in client.jobs(sweep=made.id)} == {1}
    assert "attempt.lost" in [event.type for event in client.events(made.id)]


def test_the_service_may_be_restarted_during_a_sweep(settings: Settings, models: object) -> None:
    ray = FakeRay(drives=True)
    settings = settings.model_copy(update={"port": free_port()})
    with serving(settings, ray) as url, Client(url, read_secret(settings.home / "key")) as client:
        made = client.submit_sweep(spec(dies="3"))
        until(lambda: client.sweep(made.id).progress.done >= 3)
    with serving(settings, ray) as url, Client(url, read_secret(settings.home / "key")) as client:
        assert client.wait_sweep(made.id, timeout_s=30).status == "succeeded"
        assert {job.attempt for job in client.jobs(sweep=made.id)} == {1}
    ray.join()


def test_sweep_on_the_command_line_shows_table_front_and_knee(run: Run, tmp_path: Path) -> None:
    done = run(
        "sweep", "--ratios", "5,0,0", "--ratios", "3,0,2", "--lr", "0.001", "--steps", "2", "--name", "r", "--watch"
    )
    assert done.exit_code == 0, done.output
    assert (
        "full fine-tuning" in done.stdout
        and "ratios=3,0,2" in done.stdout
        and "compute is a share of full" in done.stdout
    )
    assert "knee K: stopped" in done.stdout and "accuracy" in done.stdout and "t-0 succeeded" in done.stderr
    (found,) = json.loads(run("sweeps", "--json").stdout)["data"]
    assert found["name"] == "r" and found["spec"]["job"]["optimiser"]["learning_rate"] == 0.001
    assert found["spec"]["job"]["micro_batches"] == 5 and list(found["spec"]["space"]) == ["method.ratios"]
    assert found["id"] in run("sweeps").stdout and "4/4" in run("sweeps").stdout
    shown = run("get", found["id"])
    assert shown.exit_code == 0 and "knee K" in shown.stdout and "4 of 4 are over" in shown.stdout
    assert json.loads(run("get", found["id"], "--json").stdout)["knee"] == "stopped"
    assert len(run("list", "--sweep", found["id"], "--json").stdout.split("ftjob_")) > 4
    assert run("events", found["id"]).exit_code == run("logs", found["id"]).exit_code == 0
    run("artifacts", found["id"], "-o", str(tmp_path / "out"))
    assert (tmp_path / "out" / "sweep.json").exists()
    assert run("cancel", found["id"]).exit_code == 6 and run("pause", found["id"]).exit_code == 6
    assert run("get", "sweep_none").exit_code == 3


def test_flags_become_a_space(run: Run, tmp_path: Path) -> None:
    def made(*words: str) -> dict[str, Any]:
        done = run("sweep", *words, "--json")
        assert done.exit_code == 0, done.output
        run("cancel", json.loads(done.stdout)["id"])
        found: dict[str, Any] = json.loads(done.stdout)["spec"]
        return found

    drawn = made("--lr", "1e-4:1e-2", "--compute", "0.4:0.9", "--optuna", "5", "--objective", "accuracy=max",
                 "--objective", "compute=min", "--no-baselines", "--at-once", "2", "--search-seed", "3")  # fmt: skip
    assert drawn["search"] == {"type": "optuna", "samples": 5, "seed": 3} and drawn["baselines"] is False
    assert drawn["space"]["optimiser.learning_rate"] == {"low": 1e-4, "high": 1e-2, "log": True, "whole": False}
    assert drawn["objectives"] == {"accuracy": "max", "compute": "min"} and drawn["at_once"] == 2
    early = made("--strategy", "hull", "--strategy", "hardest", "--ratios", "3,0,2", "--random", "2", "--asha", "10")
    assert early["asha"] == {"grace_steps": 10, "reduction": 3} and early["search"]["type"] == "random"
    assert early["job"]["checkpoint"]["evaluate"] and early["job"]["checkpoint"]["every_steps"] == 10
    assert early["job"]["method"]["ratios"] == {"full": 3, "forward": 0, "skip": 2}
    path = tmp_path / "spec.json"
    path.write_text(json.dumps({"job": {"steps": 3, "seed": 9}, "space": {"seed": {"values": [1]}}, "name": "file"}))
    filed = made("--spec", str(path), "--steps", "4", "--try", "workers=[1,2]", "--label", "a=b")
    assert filed["job"]["steps"] == 4 and filed["job"]["seed"] == 9 and filed["name"] == "file"
    assert {name: of["values"] for name, of in filed["space"].items()} == {"seed": [1], "workers": [1, 2]}
    assert filed["metadata"] == {"a": "b"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ratios", "3,2"], "FULL,FORWARD,SKIP"),
        (["--lr", "x", "--lr", "y"], "'x' cannot be read as a number"),
        (["--lr", "1e-4:z"], "'z' cannot be read"),
        (["--try", "seed=1"], "PATH=[VALUE"),
        (["--try", "seed"], "PATH=[VALUE"),
        (["--objective", "accuracy"], "METRIC=max"),
        (["--lr", "1e-3", "--lr", "1e-4", "--random", "2", "--optuna", "2"], "not both"),
        (["--steps", "4"], "space"),
        (["--ratios", "3,0,2", "--ratios", "4,0,2"], "sum to"),
    ],
)
def test_flags_that_make_no_sense_are_refused(run: Run, words: list[str], said: str) -> None:
    done = run("sweep", *words)
    assert done.exit_code == 2 and said in " ".join(done.output.replace("│", " ").split())
