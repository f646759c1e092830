"""What Tune hears of a trial."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scheduler.errors import SystemFault
from tests.workers.sweeps.fake_service import TOKEN, FakeService, plain, served
from workers import control, sweep
from workers.sweeps.contract import SweepSpec
from workers.sweeps.hosted import Hosted
from workers.sweeps.trial import key_of, run_trial, setting_of

SPEC = SweepSpec.model_validate({"space": {"method.ratios": {"values": [[1, 0, 4], [3, 0, 2]]}}})
TWO = SPEC.model_copy(update={"objectives": {"accuracy": "max", "bytes": "min"}})


@pytest.fixture
def service() -> Iterator[FakeService]:
    with served(FakeService(steps=2)) as service:
        yield service


def heard(service: FakeService, spec: SweepSpec = SPEC, config: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    reports: list[dict[str, Any]] = []
    run_trial(spec, "t-001", config or {"place": 1}, Hosted(service.url, TOKEN), reports.append, 0.001)
    return reports


def test_each_change_is_reported_and_the_last_one_is_the_end(service: FakeService) -> None:
    *going, last = heard(service)
    assert [report["step"] for report in going] == [0, 1] and not any("done" in report for report in going)
    assert last["done"] and last["compute"] == last["child"]["figures"]["gflop"] and last["accuracy"] > 0.3
    assert "accuracy" not in going[1] and going[1]["loss"] > 0
    assert service.jobs["t-001"]["setting"] == {"method.ratios": [3, 0, 2]}


def test_a_job_that_fails_is_a_result(service: FakeService) -> None:
    service.end = lambda job: {"status": "failed", "error": {"code": "gone", "message": "a worker is gone"}}
    last = heard(service)[-1]
    assert last["done"] and last["child"]["status"] == "failed" and "accuracy" not in last


def test_a_metric_that_never_appears_is_a_failure_that_names_it(service: FakeService) -> None:
    service.end = lambda job: {**plain(job), "figures": {**plain(job)["figures"], "mb": None, "accuracy": None}}
    error = heard(service, TWO)[-1]["child"]["error"]
    assert error == {"code": "metric_missing", "message": "The job ended without accuracy and bytes."}


def test_a_setting_that_can_be_no_job_or_is_refused_is_a_result_as_well(service: FakeService) -> None:
    spec = SweepSpec.model_validate(
        {"space": {"seed": {"low": 0, "high": 9, "whole": True}}, "search": {"type": "optuna"}}
    )
    (report,) = heard(service, spec, {"seed": -1})
    assert report["child"]["error"]["code"] == "invalid_setting" and report["child"]["error"]["param"] == "seed"
    service.answers = [422]
    (report,) = heard(service)
    assert report["child"]["error"]["code"] == "told_so" and not service.jobs


def test_a_sweep_that_has_lost_its_children_is_no_result_of_a_trial(service: FakeService) -> None:
    service.answers = [403]
    with pytest.raises(SystemFault):
        heard(service)


def test_a_trial_is_known_by_its_place_or_by_tunes_own_name() -> None:
    assert key_of("abc", {"place": 7}) == "t-007" and key_of("abc", {"seed": 7}) == "t-abc"
    assert setting_of(SPEC, {"method.ratios": 0}) == {"method.ratios": [1, 0, 4]}


@pytest.mark.parametrize(
    ("words", "said"),
    [([], "give one of"), (["--spec", "none.json"], "none.json"), (["--spec", "a", "--context", "b"], "give one of")],
)
def test_a_bad_command_line_ends_with_status_2(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        sweep.read_context(words)
    assert end.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("want", [control.CANCEL, control.END])
def test_a_sweep_that_nobody_wants_any_more_ends_at_once(tmp_path: Path, want: str) -> None:
    control.ask(tmp_path, want)
    code = "import sys; from pathlib import Path; from workers import sweep; sweep._switched_off(Path(sys.argv[1]))"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 143


def test_a_sweep_whose_machine_is_switched_off_is_left_to_another_attempt(tmp_path: Path) -> None:
    with pytest.raises(sweep._SwitchedOffError):
        sweep._switched_off(tmp_path)


def test_a_spec_becomes_a_sweep_of_its_own_with_a_context_for_its_trials(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(SPEC.model_dump_json())
    words = ["--spec", str(tmp_path / "sweep.json"), "--out", str(tmp_path / "run")]
    context, path = sweep.read_context(words)
    assert context.sweep_id == "run" and context.spec == SPEC and context.storage_path == str(tmp_path / "run" / "ray")
    assert sweep.read_context(["--context", str(path)]) == sweep.read_context(words) == (context, path)


def test_a_sweep_does_not_go_on_with_another_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, spec in (("one", SPEC), ("other", TWO)):
        (tmp_path / name).write_text(spec.model_dump_json())
    sweep.read_context(["--spec", str(tmp_path / "one"), "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit):
        sweep.read_context(["--spec", str(tmp_path / "other"), "--out", str(tmp_path / "run")])
    assert "another sweep lies there" in capsys.readouterr().err
