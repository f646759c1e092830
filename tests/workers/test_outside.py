"""Runs that no service has ordered: how one lists them, what its key opens, and how they end when it wants that."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from scheduler.errors import SystemFault, UserError
from tests.service.conftest import free_port
from tests.waiting import until
from tests.workers.taker import taking
from workers import attempt, control, loop, outside, poster, sweep
from workers.contract import JobSpec
from workers.events import EventLog, read_events
from workers.manifest import Manifest, fingerprint, write_manifest

KEY = "d2ft_a-key-of-somebodys"
RAY_JOB = json.dumps({"metadata": {"job_submission_id": "raysubmit_7"}, "runtime_env": {}})
SPEC = JobSpec(steps=4, export={"tensorboard": False})


@pytest.fixture
def service():
    with taking() as taker:
        yield taker


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def ask(run_dir, url, key=KEY, **environ):
    said = []
    context = outside.listed(outside.plain_context(SPEC, run_dir), url, key, said.append, environ)
    assert KEY not in "".join(said) and KEY not in context.model_dump_json()
    return context, said


def test_a_run_is_listed_with_what_it_is_and_where(run_dir, service):
    environ = {"RAY_JOB_CONFIG_JSON_ENV_VAR": RAY_JOB, "RAY_ADDRESS": "10.0.0.1:6379"}
    context, said = ask(run_dir, f"{service.url}/", **environ)
    ((headers, body),) = service.listed
    assert headers["Authorization"] == f"Bearer {KEY}" and headers["Idempotency-Key"]
    where = {"submission_id": "raysubmit_7", "run_dir": str(run_dir), "ray_address": "10.0.0.1:6379"}
    assert body == {"spec": SPEC.model_dump(mode="json"), "where": where}
    assert (context.job_id, context.attempt, context.post_token) == ("ftjob_1", 1, "run_of_this_attempt")
    assert context.post_url == f"{service.url}/v1/runs/events", "where it has been found, not where it thinks it is"
    assert said == [f"d2ft: this run is job ftjob_1 at {service.url}"]


@pytest.mark.parametrize(("url", "key"), [(None, KEY), ("", KEY), ("http://h", None), ("http://h", "")])
def test_without_a_service_or_a_key_it_is_not(run_dir, url, key):
    context, said = ask(run_dir, url, key)
    assert context == outside.plain_context(SPEC, run_dir) and not said


@pytest.mark.parametrize("answer", [404, 405, 422, 429, 500, 503, 302, b"no json", {"no": "token"}])
def test_a_service_that_does_not_list_it_is_said_in_one_line_and_done_without(run_dir, service, answer):
    service.answers = [answer]
    context, said = ask(run_dir, service.url)
    assert context == outside.plain_context(SPEC, run_dir)
    assert len(said) == 1 and "goes on without" in said[0] and "\n" not in said[0]
    assert all("elsewhere" not in str(post) for post in service.posts), "no redirect is followed with the key"


def test_one_that_is_away_is_tried_again_and_done_without(run_dir):
    context, said = ask(run_dir, f"http://127.0.0.1:{free_port()}")
    assert context.post_url is None and len(said) == 1 and "cannot be reached" in said[0]


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_refused_is_an_error(run_dir, service, status):
    service.answers = [status]
    with pytest.raises(UserError, match="refuses the key") as caught:
        ask(run_dir, service.url)
    assert KEY not in str(caught.value) and "D2FT_API_KEY" in caught.value.message


@pytest.mark.parametrize(
    ("url", "key"), [("host:7421", KEY), ("ftp://h", KEY), ("http://h", "a\nb"), ("http://h", "ä")]
)
def test_what_is_no_address_or_no_key_is_said(run_dir, url, key):
    with pytest.raises(UserError, match="D2FT_"):
        ask(run_dir, url, key)


def test_a_key_in_rays_runtime_environment_is_noticed():
    shown = json.dumps({"runtime_env": {"env_vars": {"D2FT_API_KEY": KEY}}})
    assert outside.shown_by_ray({"RAY_JOB_CONFIG_JSON_ENV_VAR": shown})
    assert not outside.shown_by_ray({"RAY_JOB_CONFIG_JSON_ENV_VAR": RAY_JOB}) and not outside.shown_by_ray({})


def test_a_run_that_was_never_started_is_given_up_with_its_own_token(service):
    outside.give_up(
        f"{service.url}/v1/runs/events", "run_of_this_attempt", 1, SystemFault("no room", code="not_submitted")
    )
    (event,) = service.events
    assert event["type"] == "outcome" and event["data"]["status"] == "failed" and event["seq"] == 1
    assert event["data"]["error"]["code"] == "not_submitted"


def ended(run_dir, status):
    with EventLog(run_dir) as log:
        log.emit("outcome", status=status)
    control.ask(run_dir, control.PAUSE)


def keep(run_dir, name, spec=SPEC):
    """A checkpoint, as far as it says what it is of."""
    folder = run_dir / "ray" / "checkpoints" / name / "step-00000002"
    folder.mkdir(parents=True)
    write_manifest(folder, Manifest(name, fingerprint(spec), 2, 4, 2, 2, 0, 9, {}, [], None, {}))
    return folder.parent


def anew(run_dir, spec=SPEC):
    return outside.begun_anew(outside.plain_context(spec, run_dir), lambda _: None)


def test_the_first_run_of_a_directory_finds_nothing(run_dir):
    assert anew(run_dir) == outside.plain_context(SPEC, run_dir)


@pytest.mark.parametrize("status", ["paused", "failed", None])
def test_a_run_that_comes_again_goes_on_where_it_was_with_an_event_file_of_its_own(run_dir, status):
    ended(run_dir, status)
    vault = keep(run_dir, "ftjob_0")
    assert anew(run_dir).resume_from == str(vault)
    assert control.asked(run_dir) is None and not (run_dir / "events.jsonl").exists()
    ended(run_dir, status)
    anew(run_dir)
    assert {path.name for path in run_dir.glob("events*")} == {"events-1.jsonl", "events-2.jsonl"}


def test_it_begins_at_the_beginning_after_a_success_or_with_another_job(run_dir):
    ended(run_dir, "succeeded")
    keep(run_dir, "run")
    assert anew(run_dir).resume_from is None
    ended(run_dir, "paused")
    assert anew(run_dir, SPEC.model_copy(update={"seed": 5})).resume_from is None
    ended(run_dir, "paused")
    (run_dir / "ray/checkpoints/run/step-00000002/manifest.json").write_text("{}")
    assert anew(run_dir).resume_from is None


@pytest.fixture
def no_cluster(monkeypatch):
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(poster, "PERIOD_S", 0.02)


def words(run_dir):
    return ["--steps", "4", "--set", "export.tensorboard=false", "--out", str(run_dir)]


def test_the_driver_posts_and_prints_and_hands_neither_key_nor_token_on(
    run_dir, service, monkeypatch, capfd, no_cluster
):
    seen = []

    def group(context):
        seen.append((context.post_url, context.post_token, dict(os.environ)))
        with EventLog(run_dir) as log:
            log.emit("evaluation", accuracy=0.5, when="after", loss=1.0, num_images=3)

    monkeypatch.setattr(attempt, "_group", group)
    monkeypatch.setenv("D2FT_URL", service.url)
    monkeypatch.setenv("D2FT_API_KEY", KEY)
    assert loop.main(words(run_dir)) == 0
    assert [(url, token) for url, token, _ in seen] == [(None, None)] and "D2FT_API_KEY" not in os.environ
    assert KEY not in str(seen) and "run_of_this_attempt" not in str(seen)
    in_file = [{**event, "seq": offset} for offset, event in read_events(run_dir / "events.jsonl", 0)]
    assert service.events == in_file and [each["type"] for each in in_file] == ["phase", "evaluation", "outcome"]
    err = capfd.readouterr().err
    assert "this run is job ftjob_1" in err and "test accuracy 0.5000 after" in err
    for path in run_dir.rglob("*"):
        assert not path.is_file() or KEY not in path.read_text(), path


def test_a_driver_that_breaks_off_says_so(run_dir, service, monkeypatch, no_cluster):
    monkeypatch.setenv("D2FT_URL", service.url)
    monkeypatch.setenv("D2FT_API_KEY", KEY)
    monkeypatch.setattr(loop, "attempt", lambda context: 1 / 0)
    assert loop.main(words(run_dir)) == 1
    assert service.events[-1]["data"]["error"]["code"] == "driver_failed"


def test_a_refused_key_ends_it_before_anything_is_done(run_dir, service, monkeypatch, capfd, no_cluster):
    service.answers = [401]
    monkeypatch.setenv("D2FT_URL", service.url)
    monkeypatch.setenv("D2FT_API_KEY", KEY)
    monkeypatch.setattr(attempt, "_group", lambda context: pytest.fail("it trains"))
    assert loop.main(words(run_dir)) == 2
    assert not (run_dir / "events.jsonl").exists() and "refuses the key" in capfd.readouterr().err


def test_a_service_that_takes_no_more_does_not_end_the_run(run_dir, service, monkeypatch, capfd, no_cluster):
    monkeypatch.setenv("D2FT_URL", service.url)
    monkeypatch.setenv("D2FT_API_KEY", KEY)

    def group(context):
        service.answers = [401]
        until(lambda: not service.answers)

    monkeypatch.setattr(poster, "SILENCE_S", 0.05)
    monkeypatch.setattr(attempt, "_group", group)
    assert loop.main(words(run_dir)) == 0


def test_ray_does_not_keep_the_signal_by_which_a_run_is_ended(monkeypatch):
    """Its `init` sets a handler of its own, under which the process would exit without a last word."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(ray, "init", lambda **_: signal.signal(signal.SIGTERM, lambda *_: None))
    attempt.join()
    assert signal.getsignal(signal.SIGTERM) == before


DRIVER = """
import signal, sys, time
import ray
from workers import attempt, loop, poster
ray.init = lambda **_: signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))
ray.cluster_resources = lambda: {"CPU": 2.0}
poster.SILENCE_S = 0.1
def group(context):
    print("it trains", flush=True)
    time.sleep(60)
attempt._group = group
sys.exit(loop.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("by", ["service", "machine"])
def test_a_cancel_ends_the_driver_at_once_with_a_last_word(run_dir, service, by):
    """A SIGTERM that nobody asked for is the machine's, and the run says that it can go on."""
    env = {**os.environ, "D2FT_URL": service.url, "D2FT_API_KEY": KEY}
    began = time.monotonic()
    command = [sys.executable, "-c", DRIVER, *words(run_dir)]
    driver = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, cwd=Path(__file__).parents[2])
    try:
        until(lambda: any(event["type"] == "phase" for event in service.events), 60)
        until(lambda: "it trains" in (run_dir / "logs" / "driver.log").read_text())
        if by == "service":
            service.want = "cancel"
        else:
            driver.send_signal(signal.SIGTERM)
        assert driver.wait(30) == (143 if by == "service" else 0)
    finally:
        driver.kill()
        driver.communicate()
    last = service.events[-1]
    told = (
        {"status": "cancelled", "error": None}
        if by == "service"
        else {"status": "paused", "error": None, "why": "drain"}
    )
    assert last["type"] == "outcome" and last["data"] == told and time.monotonic() - began < 60


@pytest.mark.parametrize("driver", [loop, sweep])
def test_a_second_driver_in_the_directory_of_one_at_work_is_refused_and_touches_nothing(
    run_dir, driver, monkeypatch, capfd
):
    monkeypatch.setattr(driver, "join", lambda: pytest.fail("it begins"))
    spec = run_dir.with_name("spec.json")
    spec.write_text(json.dumps({"job": {"steps": 2}, "space": {"seed": {"values": [1, 2]}}} if driver is sweep else {}))
    control.ask(run_dir, control.PAUSE)
    (run_dir / "events.jsonl").write_text("{}\n")
    with outside.alone(run_dir):
        assert driver.main(["--spec", str(spec), "--out", str(run_dir)]) == 2
    assert f"Another run is at work in {run_dir}" in capfd.readouterr().err
    assert control.asked(run_dir) == control.PAUSE and (run_dir / "events.jsonl").read_text() == "{}\n"


def test_a_directory_is_free_again_when_its_driver_is_killed(run_dir):
    code = f"""
import time
from pathlib import Path
from workers import outside
with outside.alone(Path({str(run_dir)!r})):
    print("mine", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "mine\n"
        with pytest.raises(UserError) as refused, outside.alone(run_dir):
            pass
        assert (refused.value.code, refused.value.param) == ("run_dir_busy", "out")
        child.kill()
    with outside.alone(run_dir):
        pass
