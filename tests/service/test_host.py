"""`up` and `down` without a real Ray: ports, second starts, pids that are no longer ours."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from service import cluster, host
from service.cli import app
from service.errors import ConflictError
from service.home import ensure_key, forget_server, make_home, read_server, write_server
from service.processes import end_tree, find, identify
from service.settings import Settings

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture
def taken_port():  # type: ignore[no-untyped-def]
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


def test_a_port_in_use_is_named_with_its_remedies(home: Path, taken_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D2FT_HOME", str(home))
    done = CliRunner().invoke(app, ["up", "--port", str(taken_port)])
    assert done.exit_code == 6, done.output
    assert str(taken_port) in done.stderr and "--port" in done.stderr and "down" in done.stderr
    assert read_server(home) == {}


def test_two_ups_on_one_home_do_not_meet(home: Path) -> None:
    make_home(home)
    with host._alone(home), pytest.raises(ConflictError, match="at work"):
        host.up(Settings(home=home), host.Machine(1), print)


def test_down_ends_the_noted_tree_and_nothing_else(home: Path) -> None:
    make_home(home)
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess, time; subprocess.Popen({SLEEP!r}); time.sleep(60)"],
        start_new_session=True,
    )
    while not (children := psutil.Process(parent.pid).children()):
        time.sleep(0.02)
    stranger = subprocess.Popen(SLEEP)
    recycled = {**identify(stranger.pid), "created": identify(stranger.pid)["created"] - 5}
    write_server(home, {"url": "http://x", "api": identify(parent.pid), "ray": recycled})
    assert host.down(home, print)
    parent.wait(5)
    assert not children[0].is_running() or children[0].status() == psutil.STATUS_ZOMBIE
    assert stranger.poll() is None and read_server(home) == {}
    stranger.kill()
    stranger.wait()
    assert not host.down(home, print)


def test_a_process_that_ignores_sigterm_is_killed() -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline()
        end_tree(psutil.Process(process.pid), grace_s=0.3)
        assert not psutil.pid_exists(process.pid)
    assert find({"pid": process.pid, "created": 0.0}) is None and find(None) is None and find({"pid": "x"}) is None


def test_an_api_whose_ray_has_died_is_not_up(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_answers", lambda *_: True)
    me = identify(psutil.Process().pid)
    gone = {**me, "created": me["created"] - 5}
    assert host._is_whole({"url": "u", "api": me, "ray": me})
    assert host._is_whole({"url": "u", "api": me, "ray": None})  # another's cluster
    assert not host._is_whole({"url": "u", "api": me, "ray": gone})
    assert not host._is_whole({"url": "u", "api": gone, "ray": me})
    assert not host._is_whole({})


def test_secrets_are_made_once_and_private(home: Path) -> None:
    make_home(home)
    key = ensure_key(home)
    assert ensure_key(home) == key and key.startswith("d2ft_") and len(key) > 40
    assert (home / "key").stat().st_mode & 0o777 == 0o600
    (home / "key").chmod(0o644)
    ensure_key(home)
    assert (home / "key").stat().st_mode & 0o777 == 0o600


def test_a_torn_note_counts_as_none(home: Path) -> None:
    make_home(home)
    (home / "server.json").write_text('{"url": ')
    assert read_server(home) == {}
    forget_server(home)


def test_a_long_home_gets_a_short_temp_directory_for_ray(tmp_path: Path) -> None:
    home = tmp_path / ("x" * 60)
    home.mkdir()
    first = cluster.temp_dir(home)
    assert len(str(first)) <= cluster.MAX_TEMP_PATH and (home / "ray").readlink() == first
    assert first.parent.stat().st_mode & 0o077 == 0
    assert cluster.temp_dir(home) == first
    shutil.rmtree(first.parent)
    second = cluster.temp_dir(home)
    assert second != first and second.is_dir()
    shutil.rmtree(second.parent)


def test_the_api_child_gets_the_same_settings(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = Settings(
        home=home,
        port=7999,
        roots=(Path("/a"), Path("/b")),
        allowed_hosts=("x", "y"),
        resources_per_worker={"CPU": 0.25},
        use_gpu=False,
        ray_address="http://127.0.0.1:1",
    )
    for name, value in given.as_env().items():
        monkeypatch.setenv(name, value)
    assert Settings() == given


def test_a_ray_that_does_not_come_up_is_said_with_its_log(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_RAY", (sys.executable, "-c", "raise SystemExit(3)"))
    monkeypatch.setenv("D2FT_HOME", str(home))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = CliRunner().invoke(app, ["up", "--port", str(port)])
    assert done.exit_code == 1 and "ray.log" in done.stderr and "it exited" in done.stderr
    assert read_server(home) == {}
