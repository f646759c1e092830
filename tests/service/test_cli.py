"""The command line against a real server on loopback, whose drivers run in threads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from scheduler.devices import DeviceRecord
from service.cli import app
from service.cli.talk import clean
from service.client import Client
from service.home import read_secret
from service.settings import Settings
from tests.service.conftest import free_port, write_book
from workers.contract import JobSpec

Run = Callable[..., Result]


@pytest.fixture
def client(server: str, home: Path) -> Iterator[Client]:
    with Client(server, read_secret(home / "key")) as client:
        yield client


def test_submit_and_watch_to_the_ledger(run: Run, tmp_path: Path) -> None:
    done = run("submit", "--ratios", "3,0,2", "--steps", "5", "--name", "a\x1b[31mred\nname", "--watch")
    assert done.exit_code == 0, done.output
    assert "compute fraction" in done.stdout and "61.0%" in done.stdout and "87.0% after" in done.stdout
    assert "35.25 MB" in done.stdout and "0.052 s" in done.stdout
    assert "step 5/5" in done.stderr and "plan 1: compute 60.0%" in done.stderr and "running" in done.stderr
    assert "+4% of the forecast" in done.stderr and "plan 2: compute 60.0%" in done.stderr
    assert "3 heads move: worker 1 is slower" in done.stderr
    listed = run("list")
    assert "\x1b" not in listed.stdout and "\\x1b[31m" in listed.stdout
    job_id = json.loads(run("list", "--json").stdout)["data"][0]["id"]
    assert job_id in listed.stdout
    for name in ("get", "plan", "ledger", "timeline", "events", "artifacts"):
        words = (name, job_id)
        shown = run(*words)
        assert shown.exit_code == 0 and shown.stdout and "\x1b" not in shown.stdout
        if words[0] != "events":
            json.loads(run(*words, "--json").stdout)
    assert "b0.h1  w0 FFS  It is fast; FULL." in run("plan", job_id, "--why", "b0.h1").stdout
    assert run("plan", job_id, "--why", "b9.h1").exit_code == 2
    assert "last words" in run("logs", job_id).stdout
    fetched = run("artifacts", job_id, "-o", str(tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"weights" * 100
    assert len(fetched.stdout.splitlines()) == 2


def test_ratios_set_the_number_of_micro_batches(run: Run) -> None:
    job = json.loads(run("submit", "--ratios", "2,1,1", "--json").stdout)
    assert job["spec"]["micro_batches"] == 4 and job["method"]["ratios"] == {"full": 2, "forward": 1, "skip": 1}


def test_flags_go_over_the_spec_file(run: Run, tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({"steps": 7, "seed": 3, "optimiser": {"clip_norm": 2.0}}))
    words = ["submit", "--spec", str(spec), "--seed", "4", "--lr", "0.001", "--compute", "0.6", "--bytes", "0.5"]
    job = json.loads(run(*words, "--model-arg", "qkv_bias=false", "--json").stdout)["spec"]
    assert job["steps"] == 7 and job["seed"] == 4 and job["model_args"] == {"qkv_bias": False}
    assert job["optimiser"]["clip_norm"] == 2.0 and job["optimiser"]["learning_rate"] == 0.001
    assert job["method"]["budgets"] == {"compute": 0.6, "bytes": 0.5}


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("submit", "--ratios", "3,2"), 2, "FULL,FORWARD,SKIP"),
        (("submit", "--ratios", "3,0,1", "--micro-batches", "5"), 2, "method.ratios"),
        (("submit", "--model", "vit_smal_patch16_224"), 2, "vit_small_patch16_224"),
        (("submit", "--spec", "/none.json"), 2, "readable JSON"),
        (("submit", "--model-arg", "x"), 2, "NAME=VALUE"),
        (("submit", "--steps", "many"), 2, "integer"),
        (("get", "ftjob_none"), 3, "no job"),
        (("watch", "ftjob_none"), 3, "no job"),
        (("events", "ftjob_none"), 3, "no job"),
        (("list", "--status", "lost"), 2, "status"),
        (("nonsense",), 2, "nonsense"),
    ],
)
def test_mistakes_are_named_on_stderr_with_their_exit_code(
    run: Run, words: tuple[str, ...], code: int, said: str
) -> None:
    done = run(*words)
    assert done.exit_code == code, done.output
    assert said in " ".join(done.stderr.replace("│", " ").split()) and done.stdout == ""


def test_a_wrong_key_and_no_server_have_their_own_codes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D2FT_API_KEY", "d2ft_wrong")
    refused = run("list")
    assert refused.exit_code == 4 and "d2ft_wrong" not in refused.output
    unreachable = run("list", "--url", f"http://127.0.0.1:{free_port()}")
    assert unreachable.exit_code == 5 and "d2ft up" in unreachable.stderr


def test_the_key_of_this_machine_is_not_sent_to_another(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from service.cli.frame import key_for
    from service.settings import ClientSettings

    home.mkdir()
    (home / "key").write_text("d2ft_here")
    assert key_for("http://127.0.0.1:1", ClientSettings(home=home)) == "d2ft_here"
    assert key_for("http://gpu.example:7421", ClientSettings(home=home)) is None
    assert key_for("http://gpu.example:7421", ClientSettings(home=home, api_key="d2ft_there")) == "d2ft_there"


def test_a_failed_job_is_exit_code_one_with_its_error(run: Run, tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({"steps": 2, "metadata": {"outcome": "failed"}}))
    done = run("submit", "--spec", str(spec), "--watch")
    assert done.exit_code == 1 and "bad_image [dataset] (user): train/cat/3.jpg" in done.stderr


def test_watch_as_json_is_one_event_a_line_and_the_job(run: Run) -> None:
    lines = [json.loads(line) for line in run("submit", "--steps", "2", "--watch", "--json").stdout.splitlines()]
    assert lines[-1]["object"] == "job" and {line["object"] for line in lines[:-1]} == {"job.event"}
    assert [line["seq"] for line in lines[:-1]] == list(range(1, len(lines)))


def test_watch_gives_up_in_time_and_cancel_ends(run: Run, client: Client) -> None:
    job = client.submit(JobSpec(steps=1000, metadata={"pause_s": "0.01"}))
    done = run("watch", job.id, "--timeout", "0.6")
    assert done.exit_code == 7 and "goes on" in done.stderr
    assert "cancelling" in run("cancel", job.id).stdout
    assert client.wait(job.id, timeout_s=10, poll_s=0.05).status == "cancelled"
    assert run("watch", job.id).exit_code == 1


def test_an_interrupted_watch_lets_go(run: Run, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    job = client.submit(JobSpec(steps=1))

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Client, "events", interrupted)
    done = run("watch", job.id)
    assert done.exit_code == 130 and f"d2ft watch {job.id}" in done.stderr


def test_status_says_what_is_well(run: Run) -> None:
    done = run("status", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["ray check"] == "ok"
    assert run("status", "--url", f"http://127.0.0.1:{free_port()}").exit_code == 5


def test_a_schedule_and_the_words_of_a_method_are_flags(run: Run) -> None:
    words = ["--hold", "all", "--grain", "scattered", "--strategy", "cpsat", "--score", "taylor"]
    job = json.loads(run("submit", "--schedule", "0.5:1,0,4;0.25:0.6/0.5; 0.25:full", *words, "--json").stdout)
    first, second, third = job["method"]["schedule"]
    assert first["ratios"] == {"full": 1, "forward": 0, "skip": 4} and job["spec"]["micro_batches"] == 5
    assert second["budgets"] == {"compute": 0.6, "bytes": 0.5}
    assert third["share"] == 0.25 and third["ratios"] is None and third["budgets"] is None
    method = job["method"]
    assert [method[word[2:]] for word in words[::2]] == words[1::2]


def test_a_plan_that_no_job_has_is_drawn_with_its_reasons(run: Run) -> None:
    fleet = ["--device", "2x fast:24GB", "--device", "slow:8GB", "--link", "1Gbps"]
    done = run("plan", *fleet, "--ratios", "2,2,1", "--why", "b3.h2")
    assert done.exit_code == 0, done.output
    for word in ("fast-0", "slow-2", "bound by", "all-FULL", "gap", "b00", "one step", "ms", "b3.h2  w"):
        assert word in done.stdout, word
    assert "\x1b" not in done.stdout
    every = run("plan", *fleet, "--ratios", "2,2,1", "--reasons").stdout
    assert all(f"b{block}.h{head}  w" in every for block in range(6) for head in range(6))
    found = json.loads(run("plan", *fleet, "--compute", "0.6", "--json").stdout)
    assert found["object"] == "plan_preview" and found["gantt"]["workers"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--live"),
        (("--device", "fast", "--live"), "--live"),
        (("--device", "2x abacus"), "abacus"),
        (("--device", "fast", "--link", "fast"), "link"),
        (("--device", "fast", "--why", "b99.h0"), "b5.h5"),
        (("--device", "fast", "--ratios", "3,0"), "FULL,FORWARD,SKIP"),
        (("--device", "fast", "--schedule", "half:full"), "SHARE:full"),
        (("ftjob_x", "--device", "fast"), "leave JOB out"),
    ],
)
def test_a_bad_dry_run_is_exit_code_two(run: Run, words: tuple[str, ...], said: str) -> None:
    done = run("plan", *words)
    assert done.exit_code == 2, done.output
    assert said in " ".join(done.stderr.replace("│", " ").split()) and done.stdout == ""


def test_a_dry_run_without_a_service_is_exit_code_five(run: Run) -> None:
    assert run("plan", "--device", "fast", "--url", f"http://127.0.0.1:{free_port()}").exit_code == 5


def test_devices_are_listed_and_planned_for(run: Run, settings: Settings, record: DeviceRecord) -> None:
    none = run("devices")
    assert none.exit_code == 0 and none.stdout == "" and "measured yet" in none.stderr
    assert run("plan", "--live").exit_code == 6
    write_book(settings.devices_file, record, DeviceRecord(**{**vars(record), "id": "old-1", "measured_at": 1e9}))
    shown = run("devices")
    assert "gpu-0" in shown.stdout and "stale" in shown.stdout and "8,000.0" in shown.stdout
    assert len(json.loads(run("devices", "--json").stdout)["data"]) == 2
    planned = run("plan", "--live")
    assert planned.exit_code == 0 and "gpu-0" in planned.stdout and "warning: old-1" in planned.stderr


def test_the_help_names_every_command() -> None:
    text = CliRunner().invoke(app, ["--help"]).stdout
    for name in ("up", "down", "submit", "watch", "get", "list", "cancel", "events", "artifacts", "plan", "status"):
        assert f" {name} " in text


@pytest.mark.parametrize("text", ["a\x1b]0;x\x07b", "a\x9bb", "a\u202eb", "a\x00b", "a\rb"])
def test_control_characters_are_written_out(text: str) -> None:
    assert clean(text).isprintable()
