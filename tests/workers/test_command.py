"""Jobs by flags, and what a run without a service prints."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from workers import loop, outside
from workers.command import run_dir_of
from workers.contract import JobSpec
from workers.progress import Progress, lines_of


def spec_of(*words: str) -> dict[str, Any]:
    return loop.read_context([*words, "--out", "/tmp/run"]).spec.model_dump(mode="json", exclude_defaults=True)


def test_flags_make_a_job() -> None:
    words = "--model vit_small_patch16_224 --dataset digits --ratios 3,0,2 --steps 9 --lr 0.001 --workers 3 --lora 4"
    assert spec_of(*words.split()) == {
        "model": "vit_small_patch16_224", "steps": 9, "workers": 3, "optimiser": {"learning_rate": 0.001},
        "method": {"ratios": {"full": 3, "skip": 2}, "lora": {"rank": 4}},
    }  # fmt: skip


def test_ratios_say_how_many_micro_batches_there_are_unless_something_else_does() -> None:
    assert spec_of("--ratios", "2,0,1")["micro_batches"] == 3
    assert spec_of("--bytes", "0.5")["method"]["budgets"] == {"compute": 1.0, "bytes": 0.5}


def test_set_reaches_every_field_and_a_plain_path_is_a_folder() -> None:
    words = ["--set", "checkpoint.every_steps=5", "--set", "method.hold=none", "--set", 'model_args={"depth": 2}']
    spec = spec_of(*words, "--dataset", "/data/my pets")
    assert spec["checkpoint"] == {"every_steps": 5} and spec["model_args"] == {"depth": 2}
    assert spec["method"]["hold"] == "none" and spec["dataset"] == "folder:///data/my%20pets"


def test_flags_go_over_the_spec(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(json.dumps({"steps": 3, "seed": 4}))
    assert spec_of("--spec", str(tmp_path / "job.json"), "--steps", "5") == {"steps": 5, "seed": 4}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ratios", "3,2"], "'3,2' is not FULL,FORWARD,SKIP"),
        (["--ratios", "3,0,2", "--micro-batches", "4"], "method.ratios sum to 5 but a step has 4"),
        (["--set", "steps"], "'steps' is not PATH=VALUE"),
        (["--set", "stepps=3"], "stepps"),
        (["--steps", "many"], "invalid int value: 'many'"),
        (["--compute", "2"], "method.budgets.compute"),
    ],
)
def test_a_bad_flag_is_named(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        loop.read_context(words)
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_results_are_not_left_in_the_directory_that_ray_removes() -> None:
    args = argparse.Namespace(out=Path("run"))
    assert run_dir_of(args, {}) == Path("run").absolute()
    with pytest.raises(ValueError, match="give a whole path"):
        run_dir_of(args, {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"})
    assert run_dir_of(argparse.Namespace(out=None), {"D2FT_HOME": "/home/d"}).parent == Path("/home/d/runs")


def test_a_plain_run_has_everything_in_one_directory(tmp_path: Path) -> None:
    context = outside.plain_context(JobSpec(), tmp_path)
    assert context.job_id == tmp_path.name and context.storage_path == str(tmp_path / "ray") and not context.post_url


def metrics(step: int, loss: float | None = 1.5) -> dict[str, Any]:
    data = {"step": step, "total_steps": 9, "loss": loss, "step_seconds": 0.25}
    return {"type": "metrics", "message": "", "data": data}


def test_of_many_steps_the_newest_is_told() -> None:
    lines: list[str] = []
    evaluation = {"type": "evaluation", "message": "", "data": {"accuracy": 0.5, "when": "before training"}}
    Progress(lines.append).take([evaluation, metrics(1), metrics(2), metrics(3, None)])
    assert lines == ["test accuracy 0.5000 before training", "step 3/9  no loss  0.250 s"]


def test_the_ledger_is_told_as_a_table() -> None:
    rows = [
        {"name": "compute fraction", "unit": "fraction", "predicted": 0.6, "measured": 0.61, "all_full": 1.0},
        {"name": "traffic per step", "unit": "MB", "predicted": None, "measured": 2.0, "all_full": 3.0},
    ]
    ledger = {"rows": rows, "accuracy": {"before": 0.1, "after": None}, "phases": {"train": 3.21}, "steps": 9}
    head, first, second, last = lines_of("ledger", "", ledger)
    assert head.split() == ["predicted", "measured", "all-FULL"] and first.split()[-3:] == ["0.6", "0.61", "1"]
    assert second.startswith("traffic per step, MB") and "–" in second
    assert last == "accuracy 0.1 before, – after 9 steps; train 3.2 s"
    assert lines_of("window", "", {}) == [] and lines_of("phase", "", {"name": "running"}) == ["running"]
