"""`doctor` on machines that are well, ill, and not there yet."""

from __future__ import annotations

import importlib.metadata
import json
import sqlite3
import subprocess
import time
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any

import httpx2
import pytest
from typer.testing import CliRunner, Result

from service.cli import app, doctor
from service.cli.doctor import Finding, Patient
from service.home import write_server
from service.settings import Settings
from service.store import Store
from tests.service.conftest import FakeRay, free_port

Check = Callable[[Patient], Any]


@pytest.fixture(autouse=True)
def here(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("D2FT_HOME", str(home))
    monkeypatch.setenv("D2FT_PORT", str(free_port()))
    monkeypatch.delenv("D2FT_URL", raising=False)


def examined(*words: str) -> tuple[Result, dict[str, dict[str, Any]]]:
    done = CliRunner().invoke(app, ["doctor", "--json", *words])
    return done, {found["name"]: found for found in json.loads(done.stdout)["data"]}


def only(check: Check, settings: Settings, url: str = "http://127.0.0.1:9") -> Finding:
    [found] = check(Patient(settings, url, asked=False))
    assert isinstance(found, Finding)
    return found


def test_a_fresh_machine_is_well_and_is_told_to_bring_it_up() -> None:
    done, found = examined()
    assert done.exit_code == 0 and found["service"]["state"] == "warn" and found["service"]["fix"] == "d2ft up"
    for name in ("python", "packages", "disk", "secrets", "store", "port", "ray"):
        assert found[name]["state"] == "ok", found[name]
    assert not Settings().home.exists()


def test_a_service_that_is_up_is_well(server: str, home: Path) -> None:
    home.chmod(0o700)
    done, found = examined("--url", server)
    assert done.exit_code == 0, done.output
    for name in ("home", "store", "secrets", "service", "key", "clock"):
        assert found[name]["state"] == "ok", found[name]
    shown = CliRunner().invoke(app, ["doctor", "--url", server]).stdout
    assert (home / "key").read_text().strip() not in shown and "admin" in shown


def test_what_is_named_and_does_not_answer_is_a_fail(home: Path) -> None:
    done, found = examined("--url", f"http://127.0.0.1:{free_port()}")
    assert done.exit_code == 1 and found["service"]["state"] == "fail" and found["service"]["fix"]


def test_a_key_that_is_refused_is_a_fail(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D2FT_API_KEY", "d2ft_wrong")
    done, found = examined("--url", server)
    assert done.exit_code == 1 and found["key"]["state"] == "fail" and "d2ft_wrong" not in done.output


def test_open_files_are_named(settings: Settings) -> None:
    settings.home.mkdir(mode=0o755)
    settings.home.chmod(0o755)
    assert only(doctor.check_home, settings).state == "warn"
    for name in ("key", "ray_token"):
        (settings.home / name).write_text("x")
        (settings.home / name).chmod(0o644)
    found = list(doctor.check_secrets(Patient(settings, "", asked=False)))
    assert [each.state for each in found] == ["fail", "fail"] and "chmod 600" in str(found[0].fix)


def test_a_full_disk_is_a_fail(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 10**8})
    monkeypatch.setattr("service.cli.doctor.shutil.disk_usage", lambda path: usage)
    assert only(doctor.check_disk, settings).state == "fail"


@pytest.mark.parametrize(("revision", "state"), [(None, "warn"), ("0001", "warn"), ("9999", "fail")])
def test_the_age_of_the_tables(settings: Settings, revision: str | None, state: str) -> None:
    settings.home.mkdir()
    Store(settings.store_url).close()
    assert only(doctor.check_store, settings).state == "ok"
    with sqlite3.connect(settings.home / "d2ft.db") as database:
        database.execute("DELETE FROM alembic_version")
        if revision:
            database.execute("INSERT INTO alembic_version VALUES (?)", (revision,))
    database.close()
    found = only(doctor.check_store, settings)
    assert found.state == state and found.fix


def test_a_store_that_is_none_is_a_finding_and_not_the_end(settings: Settings) -> None:
    settings.home.mkdir()
    (settings.home / "d2ft.db").write_text("no database" * 100)
    found = {each.name: each for each in doctor.examine(Patient(settings, "http://127.0.0.1:9", asked=False))}
    assert found["store"].state == "fail" and "gpu" in found


def test_a_port_that_is_taken(server: str, settings: Settings, home: Path) -> None:
    taken = settings.model_copy(update={"port": int(server.rpartition(":")[2])})
    assert only(doctor.check_port, taken).state == "warn"
    assert only(doctor.check_port, settings.model_copy(update={"port": free_port()})).state == "ok"


@pytest.mark.parametrize(("status", "state"), [(200, "ok"), (401, "fail"), (500, "fail"), (None, "fail")])
def test_ray_and_its_token(
    settings: Settings, ray: FakeRay, monkeypatch: pytest.MonkeyPatch, status: int | None, state: str
) -> None:
    settings.home.mkdir()
    settings.token_file.write_text("token")
    write_server(settings.home, {"ray_address": "http://127.0.0.1:8265"})

    def get(url: str, **given: Any) -> httpx2.Response:
        assert given["headers"]["Authorization"] == "Bearer token"
        if status is None:
            raise httpx2.ConnectError("refused")
        return httpx2.Response(status)

    monkeypatch.setattr("service.cli.doctor.httpx2.get", get)
    assert only(doctor.check_ray, settings).state == state


@pytest.mark.parametrize(("ahead_s", "state"), [(0, "ok"), (60, "warn"), (-4000, "fail")])
def test_a_clock_that_is_off(settings: Settings, monkeypatch: pytest.MonkeyPatch, ahead_s: int, state: str) -> None:
    date = formatdate(time.time() + ahead_s, usegmt=True)
    monkeypatch.setattr("service.cli.doctor.httpx2.get", lambda *_, **__: httpx2.Response(200, headers={"Date": date}))
    assert only(doctor.check_clock, settings).state == state


@pytest.mark.parametrize(
    ("code", "output", "state"), [(0, "H100, 81559 MiB\n", "ok"), (9, "", "warn"), (0, "", "warn"), (None, "", "ok")]
)
def test_gpus(settings: Settings, monkeypatch: pytest.MonkeyPatch, code: int | None, output: str, state: str) -> None:
    done = subprocess.CompletedProcess([], code or 0, output, "no driver\n")
    monkeypatch.setattr("service.cli.doctor.shutil.which", lambda name: None if code is None else "/bin/x")
    monkeypatch.setattr("service.cli.doctor.subprocess.run", lambda *_, **__: done)
    assert only(doctor.check_gpu, settings).state == state


def test_requirements_that_are_not_met(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["typer>=999", "rich<1", "d2ft-none>=1", "typer<999,>=0.1", 'pytest>=999; extra == "dev"', "ray[train]>=1"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wanted)
    found = only(doctor.check_packages, settings)
    assert found.state == "fail" and found.detail.count(";") == 2
    assert all(name in found.detail for name in ("typer", "rich", "d2ft-none")) and "pytest" not in found.detail
