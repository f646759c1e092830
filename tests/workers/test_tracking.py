"""What TensorBoard and MLflow are told of a run, and that neither can harm it.

With D2FT_TEST_MLFLOW, the path of a whole installation's `mlflow`, a real server is asked, too.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.service import fake_driver
from workers import control, tracking
from workers.contract import Export, JobSpec, RunContext
from workers.events import EventLog
from workers.tracking import MLFLOW_URI, STEP_NAMES, tracked

SPEC = JobSpec(name="a <b>job</b>", steps=5, method={"ratios": {"full": 3, "skip": 2}}, metadata={"team": "vision/é"})  # type: ignore[arg-type]
SERVER = os.environ.get("D2FT_TEST_MLFLOW")


def context(tmp_path: Path, spec: JobSpec = SPEC, attempt: int = 1) -> RunContext:
    run_dir = tmp_path / f"a{attempt}"
    return RunContext(
        job_id="ftjob_x", attempt=attempt, spec=spec, run_dir=str(run_dir), storage_path=str(tmp_path / "storage")
    )


def run(told: RunContext, outcome: str = "succeeded", **options: float) -> float:
    """A run of the fake driver under the eyes of the trackers; the seconds that it took them to let it go."""
    spec = told.spec.model_copy(update={"metadata": {**told.spec.metadata, "outcome": outcome}})
    with tracked(told, period_s=options.pop("period_s", 0.05), **options):
        with EventLog(told.run_dir) as events:
            fake_driver.run(told.model_copy(update={"spec": spec}), events)
        began = time.monotonic()
    return time.monotonic() - began


@pytest.fixture(autouse=True)
def no_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MLFLOW_URI, raising=False)


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    found = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    found.Reload()
    return {name: [(each.step, each.value) for each in found.Scalars(name)] for name in found.Tags()["scalars"]}


def test_tensorboard_shows_what_every_step_measured(tmp_path: Path) -> None:
    told = context(tmp_path)
    run(told)
    found = scalars(tmp_path / "a1" / "tensorboard")
    assert found["train/loss"] == [(step, pytest.approx(2.0 / step)) for step in range(1, 6)]
    assert found["step/compute_fraction"] == [(step, pytest.approx(0.6)) for step in range(1, 6)]
    assert {"train/learning_rate", "step/seconds", "step/bytes_fraction"} <= set(found)
    assert found["test/accuracy"] == [(0, pytest.approx(0.11)), (5, pytest.approx(0.87))]


def test_it_follows_while_the_run_goes_on_and_begins_a_file_for_each_attempt(tmp_path: Path) -> None:
    told = context(tmp_path)
    with tracked(told, period_s=0.05), EventLog(told.run_dir) as events:
        events.emit("metrics", step=1, loss=1.5)
        deadline = time.monotonic() + 20
        while not scalars_there(tmp_path / "a1" / "tensorboard"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        events.emit("metrics", step=2, loss=float("nan"))
    assert scalars(tmp_path / "a1" / "tensorboard") == {"train/loss": [(1, 1.5)]}
    run(context(tmp_path, attempt=2))
    assert len(scalars(tmp_path / "a2" / "tensorboard")["train/loss"]) == 5


def scalars_there(directory: Path) -> bool:
    return directory.exists() and bool(scalars(directory))


def test_it_is_left_away_where_nobody_wants_it_or_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(context(tmp_path, SPEC.model_copy(update={"export": Export(tensorboard=False)})))
    assert not (tmp_path / "a1" / "tensorboard").exists()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    run(context(tmp_path, attempt=2))
    assert not (tmp_path / "a2" / "tensorboard").exists()


def test_neither_torch_nor_tensorflow_is_loaded_for_it(tmp_path: Path) -> None:
    script = (
        "import sys, workers.summaries, workers.tracking; print({'torch', 'tensorflow', 'timm'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


class Flaky:
    """Fails the first times, then keeps what it is told."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.taken: list[dict[str, Any]] = []

    def take(self, events: Sequence[dict[str, Any]]) -> None:
        if self.failures:
            self.failures -= 1
            raise OSError("it is away")
        self.taken += events

    def close(self) -> None:
        raise OSError("it does not close")


def test_what_fails_is_said_once_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    flaky = Flaky(3)
    monkeypatch.setattr(tracking, "_wanted", lambda context: iter([("Flaky", lambda: flaky)]))
    told = context(tmp_path)
    with tracked(told, period_s=0.02), EventLog(told.run_dir) as events:
        for step in range(2500):
            events.emit("metrics", step=step)
        while len(flaky.taken) < 2500:
            time.sleep(0.01)
    assert [event["seq"] for event in flaky.taken] == list(range(1, 2501))
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == [
        "tracking Flaky; the run goes on without it, and it is tried again: it is away"
    ]


def test_one_that_hangs_is_let_go_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hanging(Flaky):
        def take(self, events: Sequence[dict[str, Any]]) -> None:
            time.sleep(5)

    monkeypatch.setattr(tracking, "_wanted", lambda context: iter([("Hanging", lambda: Hanging(0))] * 2))
    assert run(context(tmp_path), close_s=0.3) < 2


def test_a_server_that_is_down_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(MLFLOW_URI, f"http://127.0.0.1:{free_port()}")
    assert run(context(tmp_path), close_s=5) < 8
    assert len([record for record in caplog.records if "tracking MLflow" in record.message]) <= 1
    assert (tmp_path / "a1" / "tensorboard").exists()


@pytest.fixture(params=["a file", pytest.param("a server", marks=pytest.mark.skipif(not SERVER, reason="no server"))])
def client(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """MLflow's client, of a store of its own."""
    from workers import mlflow_runs

    if request.param == "a file":
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv(MLFLOW_URI, f"sqlite:///{tmp_path}/mlflow.db")
        yield mlflow_runs.MlflowClient()
        return
    port = free_port()
    command = [SERVER, "server", "--port", str(port), "--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db"]
    with (tmp_path / "server.log").open("w") as output:
        server = subprocess.Popen(
            [*map(str, command), "--artifacts-destination", str(tmp_path / "artifacts"), "--workers", "1"],
            stdout=output, stderr=output, cwd=tmp_path, start_new_session=True,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )  # fmt: skip
    monkeypatch.setenv(MLFLOW_URI, f"http://127.0.0.1:{port}")
    try:
        _await(f"http://127.0.0.1:{port}/health", server)
        yield mlflow_runs.MlflowClient()
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # its own way to end takes long, and it has children
        server.wait(20)


def only_run(client: Any) -> Any:
    experiment = client.get_experiment_by_name("d2ft")
    (found,) = client.search_runs([experiment.experiment_id])
    return found


@pytest.mark.filterwarnings("ignore")
def test_mlflow_has_a_run_with_spec_steps_ledger_and_files(tmp_path: Path, client: Any) -> None:
    run(context(tmp_path), close_s=60)
    found = only_run(client)
    assert found.info.status == "FINISHED" and found.info.run_name == SPEC.name
    assert found.data.params["method.ratios.full"] == "3" and found.data.params["model"] == "d2ft_digits"
    assert "weights" not in found.data.params and found.data.tags["metadata.team"] == "vision/é"
    assert found.data.metrics["train/loss"] == pytest.approx(0.4) and found.data.metrics["test/accuracy"] == 0.87
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(each.step, each.value) for each in history] == [(step, pytest.approx(2.0 / step)) for step in range(1, 6)]
    assert any(name.startswith("ledger/") for name in found.data.metrics)
    result = str(tmp_path / "a1" / "result" / "model.safetensors")
    assert found.data.tags["d2ft.artifact.model.safetensors"] == result
    assert {each.path for each in client.list_artifacts(found.info.run_id)} >= {"ledger.json"}


@pytest.mark.filterwarnings("ignore")
def test_attempts_are_one_run_that_ends_as_the_last_of_them_does(tmp_path: Path, client: Any) -> None:
    run(context(tmp_path), "failed", close_s=60)
    failed = only_run(client)
    assert failed.info.status == "FAILED" and "bad_image" in failed.data.tags["d2ft.error"]
    run(context(tmp_path, attempt=2), close_s=60)
    assert only_run(client).info.status == "FINISHED" and only_run(client).data.tags["d2ft.attempt"] == "2"


CUT_OFF = """
import os, signal, sys, time
from pathlib import Path
from workers import control, loop
from workers.contract import RunContext
from workers.events import EventLog
from workers.tracking import tracked

told, want, ends = RunContext.model_validate_json(sys.argv[1]), sys.argv[2], sys.argv[3:]
with tracked(told, period_s=0.05) as trackers, EventLog(told.run_dir) as events:
    signal.signal(signal.SIGTERM, lambda *_: loop._switched_off(Path(told.run_dir), trackers))
    events.emit("metrics", step=1, loss=1.5)
    while not all(thread._tracker for thread in trackers._threads):
        time.sleep(0.05)
    for status in ends:
        events.emit("outcome", status=status, error=None)
    control.ask(told.run_dir, want)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("want", "ends", "status"),
    [
        (control.CANCEL, (), "KILLED"),
        (control.END, (), "SCHEDULED"),
        (control.END, ("succeeded",), "FINISHED"),
        (control.CANCEL, ("failed",), "FAILED"),
    ],
)
def test_a_run_that_is_cut_off_does_not_stay_running(
    tmp_path: Path, client: Any, want: str, ends: tuple[str, ...], status: str
) -> None:
    run(context(tmp_path), close_s=60)
    told = context(tmp_path, attempt=2)
    command = [sys.executable, "-c", CUT_OFF, told.model_dump_json(), want, *ends]
    done = subprocess.run(command, cwd=tmp_path, timeout=120, check=False)
    assert done.returncode == 143
    found = only_run(client)
    assert found.info.status == status and found.data.tags["d2ft.attempt"] == "2"


def test_one_that_hangs_does_not_hold_up_a_cancel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hanging(Flaky):
        def take(self, events: Sequence[dict[str, Any]]) -> None:
            time.sleep(5)

    monkeypatch.setattr(tracking, "_wanted", lambda context: iter([("Hanging", lambda: Hanging(0))] * 2))
    with tracked(context(tmp_path), period_s=0.02, close_s=0) as trackers, EventLog(tmp_path / "a1") as events:
        events.emit("metrics", step=1)
        began = time.monotonic()
        trackers.cut_off("cancelled", within_s=0.3)
        assert time.monotonic() - began < 2


def test_every_metric_has_its_name() -> None:
    assert {"loss", "train_accuracy", "learning_rate", "step_seconds", "compute_fraction"} <= set(STEP_NAMES)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert server.poll() is None, "the server ended at once"
        try:
            if httpx2.get(url, trust_env=False).status_code == 200:
                return
        except httpx2.HTTPError:
            pass
        time.sleep(0.3)
    raise AssertionError("the server did not come up")
