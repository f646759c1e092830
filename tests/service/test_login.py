"""`login`: where the key comes from, where it is kept, to whom it is sent."""

from __future__ import annotations

import json
import os
import pty
import select
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from service.cli import app
from service.cli.frame import key_for, service_url
from service.cli.profile import Profile, profile_path, read_profile, same_service, write_profile
from service.home import read_secret, write_server
from service.settings import ClientSettings

Run = Callable[..., Result]
HERE, THERE = "http://127.0.0.1:1", "https://gpu.example:7421"


@pytest.fixture(autouse=True)
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who has logged in nowhere."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("D2FT_HOME", str(tmp_path / "elsewhere"))
    for name in ("D2FT_URL", "D2FT_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run() -> Run:
    runner = CliRunner()
    return lambda *words, **given: runner.invoke(app, list(words), **given)


def test_a_key_from_stdin_is_tried_and_kept_for_its_owner_alone(run: Run, server: str, home: Path) -> None:
    key = read_secret(home / "key") or ""
    done = run("login", server, input=f"{key}\nrest\n")
    assert done.exit_code == 0 and "admin" in done.stderr and key not in done.output
    assert stat.S_IMODE(profile_path().stat().st_mode) == 0o600
    assert stat.S_IMODE(profile_path().parent.stat().st_mode) == 0o700
    assert run("list").exit_code == 0 and json.loads(run("login", server, "--json", input=key).stdout)["user"]
    assert run("logout").exit_code == 0 and read_profile() is None
    assert json.loads(run("logout", "--json").stdout)["was_there"] is False


def test_a_key_that_is_refused_is_not_kept(run: Run, server: str) -> None:
    for wrong, code in (("d2ft_wrong\n", 4), ("", 2), ("\n", 2), ("smörgås\n", 2)):
        done = run("login", server, input=wrong)
        assert done.exit_code == code and "d2ft_wrong" not in done.output
    assert run("login", "gpu.example", input="d2ft_x").exit_code == 2
    assert not profile_path().exists()


def test_at_a_terminal_the_key_is_asked_for_and_not_shown(server: str, home: Path) -> None:
    key = read_secret(home / "key") or ""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", "from service.cli import main; main()", "login", server]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True) as child:
        os.close(theirs)
        shown = _read_until(ours, b"API key: ")
        os.write(ours, f"{key}\n".encode())
        shown += _read_until(ours, b"kept in")
        assert child.wait(20) == 0
    os.close(ours)
    assert key.encode() not in shown
    assert read_profile() == Profile(server, key) and key not in repr(read_profile())


def _read_until(terminal: int, mark: bytes) -> bytes:
    shown = b""
    while mark not in shown:
        assert select.select([terminal], [], [], 20)[0], shown
        shown += os.read(terminal, 4096)
    return shown


def test_flags_go_before_the_environment_the_login_and_this_machine(home: Path) -> None:
    home.mkdir()
    (home / "key").write_text("d2ft_home")
    plain = ClientSettings(home=home)
    assert service_url(None, plain) == "http://127.0.0.1:7421"
    write_server(home, {"url": HERE})
    assert service_url(None, plain) == HERE and key_for(HERE, plain) == "d2ft_home"
    write_profile(Profile(THERE, "d2ft_there"))
    assert service_url(None, plain) == THERE and key_for(THERE, plain) == "d2ft_there"
    given = ClientSettings(home=home, url="https://env.example", api_key="d2ft_env")
    assert service_url(None, given) == "https://env.example" and key_for(THERE, given) == "d2ft_env"
    assert service_url("http://flag.example", given) == "http://flag.example"


def test_a_kept_key_goes_to_its_own_service_alone(home: Path) -> None:
    home.mkdir()
    (home / "key").write_text("d2ft_home")
    settings = ClientSettings(home=home)
    write_profile(Profile(THERE, "d2ft_there"))
    assert key_for(f"{THERE}/", settings) == "d2ft_there" and key_for(HERE, settings) == "d2ft_home"
    for other in ("http://gpu.example:7421", "https://gpu.example", "https://gpu.example.evil:7421", f"{THERE}/x"):
        assert key_for(other, settings) is None
    assert same_service("https://GPU.example", "https://gpu.example:443/")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"url": "x"}'])
def test_a_torn_file_is_as_none(content: str) -> None:
    write_profile(Profile(THERE, "k"))
    profile_path().write_text(content)
    assert read_profile() is None


def test_a_key_is_not_sent_in_clear_without_a_word(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.cli.access.LOOPBACK", ())
    monkeypatch.setattr("service.cli.access.Client.me", lambda self: _Me())
    assert "in clear" in run("login", HERE, input="d2ft_x").stderr


class _Me:
    scopes = ("read",)

    class user:  # noqa: N801
        name = "ada"
