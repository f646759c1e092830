"""`--ray-address`: what is uploaded, what Ray's command is asked, and what becomes of its words. Ray is a stand-in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from service.cli import app, elsewhere
from service.client import Client
from service.home import read_secret
from service.settings import Settings
from tests.service.conftest import FakeRay, free_port, serving
from workers.contract import RunContext

ADDRESS = "http://head:8265"
# Says what Ray's command says, and keeps what it was given.
FAKE = """#!{python}
import json, os, pathlib, shutil, sys, time
words, kept = sys.argv[1:], pathlib.Path(os.environ["FAKE_KEEPS"])
given = dict(zip(words, words[1:]))
shutil.copytree(given["--working-dir"], kept / "upload")
(kept / "call.json").write_text(json.dumps({{"words": words, "env": dict(os.environ)}}))
says = os.environ.get("FAKE_SAYS", "")
if says == "hangs": time.sleep(60)
if says and says not in ("failed", "lost", "follows"):
    print(says, file=sys.stderr); sys.exit(1)
print("Job submission server address: http://head:8265")
print(f"Job '{{given['--submission-id']}}' submitted successfully", flush=True)
print("Query the logs of the job:")
if "--no-wait" in words: sys.exit(0)
print("Tailing logs until the job exits (disable with --no-wait):")
print("step 3/3  loss \\x1b[31m0.5", flush=True)
if says == "follows": time.sleep(60)
if says == "lost": sys.exit(1)
print(f"Job '{{given['--submission-id']}}' " + ("failed" if says == "failed" else "succeeded"))
sys.exit(1 if says == "failed" else 0)
"""


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the stand-in of Ray's command keeps what it was given."""
    script = tmp_path / "ray"
    script.write_text(FAKE.format(python=sys.executable))
    script.chmod(0o700)
    monkeypatch.setattr(elsewhere, "ray_command", lambda: str(script))
    (tmp_path / "kept").mkdir()
    monkeypatch.setenv("FAKE_KEEPS", str(tmp_path / "kept"))
    monkeypatch.setenv("D2FT_HOME", str(tmp_path / "nobody"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in ("D2FT_URL", "D2FT_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "kept"


@pytest.fixture
def send(kept: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    def invoke(*words: str, says: str = "") -> Result:
        monkeypatch.setenv("FAKE_SAYS", says)
        return CliRunner().invoke(app, [*words, "--ray-address", ADDRESS])

    return invoke


def call(kept: Path) -> Any:
    return json.loads((kept / "call.json").read_text())


def test_a_job_is_submitted_in_one_word(send: Callable[..., Result], kept: Path) -> None:
    done = send("submit", "--ratios", "3,0,2", "--steps", "3", "--dataset", "/data/my pets", "--out", "/shared/run 1")
    assert done.exit_code == 0, done.output
    words = call(kept)["words"]
    before, after = words[: words.index("--")], words[words.index("--") + 1 :]
    submission = before[before.index("--submission-id") + 1]
    assert after == ["python", "-m", "workers.loop", "--spec", "spec.json", "--out", "/shared/run 1"]
    assert before[:4] == ["job", "submit", "--address", ADDRESS] and "--no-wait" in before
    assert done.stdout == f"{submission}\n"
    assert f"ray job logs --follow --address {ADDRESS} {submission}" in done.stderr and "ray job stop" in done.stderr
    spec = json.loads((kept / "upload" / "spec.json").read_text())
    assert spec["method"]["ratios"]["skip"] == 2 and spec["dataset"] == "folder:///data/my%20pets"


def test_the_upload_has_all_that_a_run_needs_and_nothing_else(
    send: Callable[..., Result], kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".env").write_text("hush")
    monkeypatch.chdir(tmp_path / "mine")
    monkeypatch.setenv("D2FT_API_KEY", "d2ft_my-own-key")
    assert send("submit", "--steps", "3").exit_code == 0
    upload = kept / "upload"
    assert {path.name for path in upload.iterdir()} == {"workers", "scheduler", "spec.json"}
    names = [path for path in upload.rglob("*") if path.is_file()]
    assert {path.suffix for path in names} == {".py", ".safetensors", ".json"}
    assert not any("__pycache__" in path.parts for path in names)
    assert not any(b"d2ft_my-own-key" in path.read_bytes() for path in names)
    assert "D2FT_API_KEY" not in call(kept)["env"] and "d2ft_my-own-key" not in str(call(kept))
    code = "import sys, workers.loop, workers.bundled; print(workers.loop.__file__)"
    env = {**os.environ, "PYTHONPATH": str(upload)}
    ran = subprocess.run([sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True, check=True)
    assert ran.stdout.startswith(str(upload))


def test_a_sweep_goes_the_same_way(send: Callable[..., Result], kept: Path) -> None:
    done = send("sweep", "--ratios", "3,0,2", "--ratios", "2,3,0", "--steps", "4", "--out", "/shared/s")
    assert done.exit_code == 0, done.output
    assert call(kept)["words"][-6:] == ["-m", "workers.sweep", "--spec", "spec.json", "--out", "/shared/s"]
    spec = json.loads((kept / "upload" / "spec.json").read_text())
    assert len(spec["space"]["method.ratios"]["values"]) == 2 and spec["job"]["steps"] == 4


@pytest.mark.parametrize(("says", "code"), [("", 0), ("failed", 1), ("lost", 5)])
def test_watching_shows_the_log_and_ends_as_the_run_does(send: Callable[..., Result], says: str, code: int) -> None:
    done = send("submit", "--steps", "3", "--watch", says=says)
    assert done.exit_code == code
    assert done.stdout.startswith("step 3/3  loss \\x1b[31m0.5\n") and "Query" not in done.stdout
    assert ("ray job logs" in done.stderr) == (code == 5)


@pytest.mark.parametrize("as_json", [("--json",), ("--json", "--watch")])
def test_json_says_what_it_is_called(send: Callable[..., Result], as_json: tuple[str, ...]) -> None:
    told = json.loads(send("submit", "--steps", "3", "--out", "/o", *as_json).stdout)
    assert told["submission_id"].startswith("d2ft-") and (told["ray_address"], told["out"]) == (ADDRESS, "/o")
    assert told["job_id"] is None


MISSING = "ray.exceptions.AuthenticationError: Authentication required: Unauthorized: Missing authentication token"
WRONG = "ray.exceptions.AuthenticationError: Authentication failed: Forbidden: Invalid authentication token"
NONE = "RuntimeError: Token authentication is enabled but no authentication token was found"


@pytest.mark.parametrize(
    ("says", "code", "said"),
    [
        (MISSING, 4, "RAY_AUTH_TOKEN_PATH"),
        (WRONG, 4, "RAY_AUTH_MODE=token"),
        (NONE, 4, "RAY_AUTH_TOKEN"),
        ("ConnectionError: Failed to connect to Ray at address: http://head:8265.", 5, "No cluster of Ray answers"),
        ("RuntimeError: Request failed with status code 500: no room", 1, "status code 500: no room"),
    ],
)
def test_what_ray_refuses_is_said_in_words_with_a_code(
    send: Callable[..., Result], says: str, code: int, said: str
) -> None:
    done = send("submit", "--steps", "3", says=says)
    assert done.exit_code == code and said in done.stderr and not done.stdout


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (("--priority", "3"), "--priority"),
        (("--queue-timeout", "3"), "--queue-timeout"),
        (("--idempotency-key", "k"), "--idempotency-key"),
        (("--dataset", "dataset:pets"), "--dataset"),
        (("--dataset", "pets"), "--dataset"),
        (("--weights", "job:ftjob_1"), "--weights"),
        (("--weights", "w.safetensors"), "--weights"),
        (("--out", "run1"), "--out"),
        (("--steps", "0"), "steps"),
        (("--url", "http://127.0.0.1:9"), "--out"),
    ],
)
def test_flags_that_make_no_sense_are_refused_by_name(
    send: Callable[..., Result], kept: Path, words: tuple[str, ...], flag: str
) -> None:
    done = send("submit", *words)
    assert done.exit_code == 2 and flag in done.stderr and not list(kept.iterdir())


def test_what_the_spec_says_of_a_queue_is_refused_too(send: Callable[..., Result], tmp_path: Path) -> None:
    for name, body in (
        ("submit", {"priority": 3}),
        ("sweep", {"job": {"priority": 3}, "space": {"seed": {"values": [1]}}}),
    ):
        (tmp_path / "spec.json").write_text(json.dumps(body))
        done = send(name, "--spec", str(tmp_path / "spec.json"))
        assert done.exit_code == 2 and "priority" in done.stderr


@pytest.mark.parametrize(
    "address", ["head:8265", "http://head", "ray://head:10001", "http://h:1/x", "http://u:p@h:1", "http://h:x"]
)
def test_an_address_that_is_none_is_refused(kept: Path, address: str) -> None:
    done = CliRunner().invoke(app, ["submit", "--ray-address", address])
    assert done.exit_code == 2 and "--ray-address" in done.stderr


def test_out_is_for_ones_own_cluster_only(kept: Path) -> None:
    for words in (["submit"], ["sweep", "--lr", "1e-4"]):
        done = CliRunner().invoke(app, [*words, "--out", "/o"])
        assert done.exit_code == 2 and "--ray-address" in done.stderr


def test_without_rays_command_nothing_is_asked_of_anybody(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(elsewhere.sys, "executable", "/nowhere/python")
    monkeypatch.setenv("PATH", "/nowhere")
    done = CliRunner().invoke(app, ["submit", "--ray-address", ADDRESS, "--out", "/o", "--url", "http://127.0.0.1:9"])
    assert done.exit_code == 2 and "pip install" in done.stderr


def test_letting_go_says_how_to_follow_again(kept: Path, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from service.cli import elsewhere, main; "
        f"elsewhere.ray_command = lambda: {str(tmp_path / 'ray')!r}; main()"
    )
    words = [sys.executable, "-c", code, "submit", "--steps", "3", "--ray-address", ADDRESS, "--watch"]
    child = subprocess.Popen(
        words, env={**os.environ, "FAKE_SAYS": "follows"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout and "step 3/3" in child.stdout.readline()
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=20)
    finally:
        child.kill()
        child.communicate()
    assert child.returncode == 130 and "it goes on" in err and "ray job logs --follow" in err and "Traceback" not in err


@pytest.fixture
def service(home: Path, settings: Settings, models: object) -> Iterator[str]:
    ray = FakeRay(drives=True)
    with serving(settings.model_copy(update={"port": free_port()}), ray) as url:
        yield url


@pytest.fixture
def client(service: str, home: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    key = read_secret(home / "key")
    monkeypatch.setenv("D2FT_API_KEY", str(key))
    with Client(service, key) as client:
        yield client


def test_a_service_lists_the_run_and_only_its_token_goes_to_the_cluster(
    service: str, client: Client, send: Callable[..., Result], kept: Path, home: Path
) -> None:
    done = send("submit", "--steps", "3", "--name", "far", "--out", "/shared/run1", "--url", service)
    assert done.exit_code == 0, done.output
    (job,) = client.list().data
    assert (job.status, job.name, job.outside) == ("starting", "far", True) and job.id in done.stderr
    where = {"submission_id": done.stdout.strip(), "run_dir": "/shared/run1", "ray_address": ADDRESS}
    assert job.where == where
    path = kept / "upload" / "context.json"
    context = RunContext.model_validate_json(path.read_text())
    assert context.job_id == job.id and context.run_dir == "/shared/run1" and context.outside
    assert context.post_url == f"{service}/v1/runs/events" and context.spec.steps == 3
    assert path.stat().st_mode & 0o077 == 0 and call(kept)["words"][-2:] == ["--context", "context.json"]
    key = str(read_secret(home / "key"))
    assert key not in str(call(kept)) and key not in path.read_text()
    assert context.post_token and context.post_token not in str(call(kept)) + done.output
    shown, listed = (CliRunner().invoke(app, [*words, "--url", service]) for words in (["get", job.id], ["list"]))
    assert "outside" in shown.stdout and "/shared/run1" in shown.stdout and "starting (outside)" in listed.stdout


def test_a_run_that_ray_refuses_leaves_no_job_that_waits_for_it(
    service: str, client: Client, send: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D2FT_URL", service)
    done = send("submit", "--steps", "3", "--out", "/shared/run1", says=WRONG)
    (job,) = client.list().data
    assert done.exit_code == 4 and job.status == "failed"
    assert job.error and job.error.code == "not_submitted" and "RAY_AUTH_TOKEN_PATH" in job.error.message


def test_a_key_that_the_service_refuses_submits_nothing(
    service: str, client: Client, send: Callable[..., Result], kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D2FT_API_KEY", "d2ft_wrong")
    assert send("submit", "--out", "/o", "--url", service).exit_code == 4 and not list(kept.iterdir())


def test_a_sweep_is_not_listed_and_says_so(
    service: str, client: Client, send: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = send("sweep", "--lr", "1e-4", "--lr", "2e-4", "--url", service)
    assert done.exit_code == 0 and "not listed" in done.stderr and client.list().data == []
