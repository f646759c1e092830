"""Commands beyond a job's first run: filters, keys, users, data, streams that are let go, quiet and hostile text."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from service.cli import app
from service.client import Client
from service.home import read_secret
from service.settings import Settings
from tests.service.proxy import Cut, Proxy

Run = Callable[..., Result]
ENDLESS = {"steps": 10_000, "metadata": {"pause_s": "0.1"}}
HOSTILE = "<b>a\x1b]0;x\x07\x9b31m\u202eb\u200b\u2066c\ufeff\u061c"


@pytest.fixture
def settings(settings: Settings, tmp_path: Path) -> Settings:
    return settings.model_copy(update={"roots": (tmp_path,), "webhooks": True})


@pytest.fixture
def env(server: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of somebody on the server's machine."""
    given = {"D2FT_HOME": str(home), "D2FT_URL": server, "XDG_CONFIG_HOME": str(tmp_path / "config")}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    return {**os.environ, **given}


@pytest.fixture
def run(env: object) -> Run:
    runner = CliRunner()
    return lambda *words, **given: runner.invoke(app, list(words), **given)


@pytest.fixture
def client(server: str, home: Path) -> Iterator[Client]:
    with Client(server, read_secret(home / "key")) as client:
        yield client


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """A folder of two classes."""
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            (tmp_path / "pets" / split / label).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "pets" / split / label / "1.png")
    return tmp_path / "pets"


def test_lists_are_narrowed_and_walked_whole(run: Run, client: Client) -> None:
    made = [
        client.submit({**ENDLESS, "name": f"job {n}", "metadata": {"n": str(n % 2), "pause_s": "0.1"}}).id
        for n in range(4)
    ]
    assert run("pause", made[3]).stdout == f"{made[3]}  paused\n"
    assert made[3] in run("list", "--status", "paused", "--status", "failed").stdout
    odd = json.loads(run("list", "--label", "n=1", "--json").stdout)["data"]
    assert [job["id"] for job in odd] == [made[3], made[1]]
    assert made[2] in (found := run("list", "--search", "job 2").stdout) and made[1] not in found
    assert run("list", "--model", "none").stdout.split() == ["id", "name", "status", "model", "progress", "age"]
    first = run("list", "--limit", "2")
    assert f"--after {made[2]}" in first.stderr and run("list", "--limit", "2", "-q").stderr == ""
    lines = run("list", "--all", "--json").stdout.splitlines()
    assert [json.loads(line)["id"] for line in lines] == made[::-1]
    assert run("list", "--label", "n").exit_code == 2
    assert "queued" in run("resume", made[3]).stdout and "cancelled" in run("cancel", made[3]).stdout
    assert json.loads(run("retry", made[3], "--json").stdout)["status"] == "queued"
    assert run("retry", made[3]).exit_code == 6
    while "place" not in run("get", made[3]).stdout:  # as of the service's last look at the queue
        time.sleep(0.2)


def test_a_submit_carries_its_priority_labels_and_key(run: Run) -> None:
    words = ["submit", "--steps", "9999", "--label", "team=vision", "--label", "a=b=c", "--queue-timeout", "60"]
    first = run(*words, "--priority", "-3", "--idempotency-key", "one", "--json")
    job = json.loads(first.stdout)
    assert job["metadata"] == {"team": "vision", "a": "b=c"} and job["priority"] == -3
    assert job["spec"]["queue_timeout_s"] == 60
    again = run(*words, "--priority", "-3", "--idempotency-key", "one", "-q")
    assert again.stdout == f"{job['id']}\n" and again.stderr == ""
    other = run(*words, "--idempotency-key", "one")
    assert other.exit_code == 2 and "another body" in other.stderr and "req_" in other.stderr


def test_a_submit_whose_answer_was_lost_says_how_to_ask_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from service.client.errors import unreachable

    def lost(*_: object, **__: object) -> None:
        raise unreachable("http://x", OSError("cut"))

    monkeypatch.setattr(Client, "submit", lost)
    done = run("submit", "--steps", "1")
    assert done.exit_code == 5 and "--idempotency-key " in done.stderr


def test_metrics_logs_and_checkpoints_of_a_job(run: Run, client: Client, settings: Settings) -> None:
    job = client.submit({"steps": 30})
    job.wait(timeout_s=20, poll_s=0.05)
    shown = run("metrics", job.id)
    assert shown.stdout.splitlines()[0].split()[:2] == ["step", "loss"] and len(shown.stdout.splitlines()) == 16
    assert "15 of 30" in shown.stderr and len(run("metrics", job.id, "--points", "3").stdout.splitlines()) == 4
    assert json.loads(run("metrics", job.id, "--json").stdout)["total"] == 30
    assert run("checkpoints", job.id).exit_code == 0
    assert json.loads(run("checkpoints", job.id, "--json").stdout)["data"] == []
    logs = settings.attempt_dir(job.id, 1) / "logs"
    logs.mkdir(exist_ok=True)
    (logs / "rank0.log").write_bytes(b"one\x1b[31m\r\ntwo \xf0\x9f\x90\x8e\xff")
    assert run("logs", job.id, "--rank", "0").stdout == "one\\x1b[31m\\x0d\ntwo 🐎\ufffd\n"
    lines = run("logs", job.id, "--rank", "0", "-f", "--json").stdout.splitlines()
    assert [json.loads(line)["line"] for line in lines] == ["one\x1b[31m\r", "two 🐎\ufffd"]
    assert run("logs", job.id, "--rank", "0", "--offset", "-5").stdout == "🐎\ufffd\n"
    assert run("logs", job.id, "--rank", "9").exit_code == 3
    assert run("logs", job.id, "--attempt", "2").exit_code == 3


@pytest.mark.parametrize("words", [("watch",), ("logs", "-f"), ("events", "-f")])
def test_ctrl_c_lets_go_and_says_how_to_come_back(
    env: dict[str, str], client: Client, settings: Settings, words: tuple[str, ...]
) -> None:
    job = client.submit(ENDLESS)
    logs = settings.attempt_dir(job.id, 1) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    (logs / "driver.log").write_text("begins\n")
    main = "from service.cli import main; main()"
    command = [sys.executable, "-u", "-c", main, words[0], job.id, *words[1:], "--json"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True) as child:
        assert child.stdout is not None and json.loads(child.stdout.readline())
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=20)
    assert child.returncode == 130 and f"d2ft {words[0]} {job.id}" in said and "Traceback" not in said
    assert client.get(job.id).status != "cancelled"


@pytest.mark.slow
def test_commands_end_rightly_over_broken_connections(run: Run, server: str, tmp_path: Path) -> None:
    proxy = Proxy(int(server.rpartition(":")[2]), lambda n: Cut(after_bytes=3000))
    words = ("submit", "--steps", "60", "--label", "pause_s=0.02")
    try:
        job = json.loads(run(*words, "--json", "--url", proxy.url).stdout)["id"]
        watched = run("watch", job, "--url", proxy.url, "--json")
        lines = [json.loads(line) for line in watched.stdout.splitlines()]
        assert watched.exit_code == 0 and lines[-1]["status"] == "succeeded"
        assert [line["seq"] for line in lines[:-1]] == list(range(1, len(lines)))
        assert "last words" in run("logs", job, "-f", "--url", proxy.url).stdout
        assert run("artifacts", job, "-o", str(tmp_path / "out"), "--url", proxy.url).exit_code == 0
        assert proxy.num_cuts >= 3
    finally:
        proxy.close()


def test_output_that_nobody_reads_any_more_is_no_error(env: dict[str, str], client: Client) -> None:
    job = client.submit(ENDLESS)
    main = f'"{sys.executable}" -c "from service.cli import main; main()"'
    pipeline = f"{main} events {job.id} -f --json | head -1"
    done = subprocess.run(pipeline, shell=True, env=env, capture_output=True, text=True, timeout=20)
    assert json.loads(done.stdout)["seq"] == 1 and "Traceback" not in done.stderr


def test_keys_are_shown_once_and_revoked(run: Run, client: Client) -> None:
    made = run("keys", "add", "laptop", "--scope", "read", "--days", "1")
    key = made.stdout.strip()
    assert key.startswith("d2ft_") and len(made.stdout.splitlines()) == 1 and key not in made.stderr
    listed = run("keys", "list")
    [key_id] = [line.split()[0] for line in listed.stdout.splitlines() if "laptop" in line]
    assert key not in listed.stdout + run("keys", "list", "--json").stdout and "until " in listed.stdout
    refused = run("keys", "revoke", key_id)
    assert refused.exit_code == 2 and "--yes" in refused.stderr and client.me()
    assert run("keys", "revoke", key_id, "--yes").stdout == f"{key_id}  revoked\n"
    assert json.loads(run("keys", "revoke", key_id, "-y", "--json").stdout)["revoked_at"]
    assert "revoked" in run("keys", "list").stdout and run("keys", "revoke", "key_none", "-y").exit_code == 3


def test_users_are_made_and_changed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    made = run("users", "add", "ada", "--max-running", "2", "--share", "2")
    assert made.exit_code == 0 and "keys add --user ada" in made.stderr
    changed = json.loads(
        run("users", "set", "ada", "--max-running", "default", "--max-queued", "7", "--disable", "--json").stdout
    )
    assert changed["max_running"] is None and changed["max_queued"] == 7 and changed["disabled"]
    assert "disabled" in run("users", "list").stdout
    assert run("users", "set", made.stdout.strip(), "--enable").exit_code == 0
    assert run("users", "set", "ada").exit_code == 2 and run("users", "set", "bob", "--enable").exit_code == 3
    assert run("users", "set", "ada", "--max-queued", "many").exit_code == 2
    monkeypatch.setenv("D2FT_API_KEY", run("keys", "add", "--user", "ada").stdout.strip())
    assert run("users", "list").exit_code == 4 and run("list").exit_code == 0


def test_datasets_and_models(run: Run, pets: Path) -> None:
    made = run("datasets", "add", "pets", str(pets))
    assert made.exit_code == 0, made.output
    assert "2 classes" in made.stderr and "dataset:pets" in made.stderr
    assert "pets" in run("datasets", "list", "--search", "pet").stdout
    for words in (("show",), ("inspect",), ("samples",)):
        assert "dog" in run("datasets", *words, "pets").stdout
        assert json.loads(run("datasets", *words, "pets", "--json").stdout)["object"] in ("dataset", "list")
    job = json.loads(run("submit", "--dataset", "dataset:pets", "--steps", "9999", "--img-size", "28", "--json").stdout)
    assert "pets" in job["dataset"]
    assert run("datasets", "remove", "pets").exit_code == 2
    assert run("datasets", "remove", "pets", "--yes").exit_code == 0 and run("datasets", "show", "pets").exit_code == 3
    assert run("datasets", "add", "x", "/nowhere").exit_code == 2
    names = json.loads(run("models", "--min-params", "10000000", "--json").stdout)["data"]
    assert [model["id"] for model in names] == ["vit_large_patch16_224", "vit_small_patch16_224"]
    assert "There are more" in run("models", "--limit", "1").stderr
    refused = run("models", "--refused").stdout
    assert "resnet50" in refused and "reason" in refused and "architecture resnet" in refused and "vit_" not in refused
    every = run("models", "--every").stdout
    assert "architecture resnet" in every and "vit_tiny_patch16_224" in every and "GB" in every
    assert "reason" not in run("models").stdout and run("models", "--refused", "--every").exit_code == 2
    assert "vit_tiny" in run("models", "vit_tiny_patch16_224").stdout and run("models", "resnet50").exit_code == 3


def test_webhooks(run: Run) -> None:
    made = run("webhooks", "add", "https://example.com/hook", "--type", "job.failed")
    if made.exit_code == 0:  # where names can be looked up
        assert len(made.stdout.splitlines()) == 1
        hook = json.loads(run("webhooks", "list", "--json").stdout)["data"][0]["id"]
        assert "webhook.test" in run("webhooks", "test", hook).stdout
        assert "webhook.test" in run("webhooks", "deliveries", hook).stdout
        assert run("webhooks", "remove", hook).exit_code == 2 and run("webhooks", "remove", hook, "-y").exit_code == 0
    assert run("webhooks", "list").exit_code == 0 and run("webhooks", "deliveries", "wh_none").exit_code == 3
    assert run("webhooks", "add", "http://127.0.0.1/").exit_code == 2


def test_hostile_text_reaches_no_terminal(run: Run, client: Client) -> None:
    job = client.submit({"name": HOSTILE, "steps": 1, "metadata": {"k": HOSTILE}})
    job.wait(timeout_s=20, poll_s=0.05)
    for words in (("list",), ("get", job.id), ("events", job.id), ("list", "--search", "<b>a")):
        shown = run(*words).stdout
        assert "<b>a" in shown or words[0] == "events"
        assert all(letter.isprintable() or letter == "\n" for letter in shown)
    assert json.loads(run("get", job.id, "--json").stdout)["name"] == HOSTILE


def test_quiet_and_colourless(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("submit", "--steps", "1", "--watch", "-q").stderr == ""
    failed = run("get", "none", "-q")
    assert failed.exit_code == 3 and "no job" in failed.stderr
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[3" not in run("list", "--no-color").stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(run: Run, shell: str) -> None:
    assert "_D2FT_COMPLETE" in run("completion", shell).stdout
    assert run("completion", "tcsh").exit_code == 2


def test_completion_completes(env: dict[str, str]) -> None:
    asked = {**env, "_D2FT_COMPLETE": "complete_bash", "COMP_WORDS": "d2ft che", "COMP_CWORD": "1"}
    main = [sys.executable, "-c", "from service.cli import app; app(prog_name='d2ft')"]
    assert subprocess.run(main, env=asked, capture_output=True, text=True, timeout=20).stdout.strip() == "checkpoints"
