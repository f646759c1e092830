"""The runbook rehearsed on one machine by its own commands: backup while jobs run, restore, the first key rotated."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pgserver
import pytest
from click.testing import Result
from sqlalchemy import make_url

from service.client import ApiNotFoundError, Client
from service.home import read_secret
from service.settings import Settings
from tests.deploy.files import RUNBOOK as RUNBOOK_FILE
from tests.service.conftest import (
    FakeRay,
    database,
    free_port,
    home,
    models,
    postgres,
    run,
    server,
    serving,
    settings,
    write_catalogue,
)
from tests.waiting import until

__all__ = ["database", "home", "models", "postgres", "run", "server", "settings"]
RUNBOOK = RUNBOOK_FILE.read_text()
BINARIES = Path(pgserver.__file__).parent / "pginstall" / "bin"
ENDLESS = {"steps": 10_000, "metadata": {"pause_s": "0.1"}}


def command(begin: str) -> list[str]:
    """The words of the one command of the runbook that has this in it."""
    (line,) = [line for line in RUNBOOK.splitlines() if begin in line and line.startswith("    ")]
    return shlex.split(line)


@dataclass
class Tables:
    """How the runbook has the tables of one kind of store kept and put back."""

    url: str | None
    backup: Callable[[Path, Path], None]
    restore: Callable[[Path, Path], None]


def sqlite(_: str) -> Tables:
    def backup(home: Path, kept: Path) -> None:
        _, _, code = command("sqlite3.connect(")
        code = code.replace("/var/lib/d2ft", str(home)).replace("/backup", str(kept))
        subprocess.run([sys.executable, "-c", code], check=True)

    def restore(home: Path, kept: Path) -> None:
        shutil.copy(kept / "d2ft.db", home / "d2ft.db")
        assert not (home / "d2ft.db-wal").exists()

    return Tables(None, backup, restore)


def in_postgres(url: str) -> Tables:
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)

    def backup(home: Path, kept: Path) -> None:
        words = command("dc exec -T postgres pg_dump")
        flags = [word for word in words if word.startswith("--format")]
        dumped = subprocess.run([BINARIES / "pg_dump", *flags, plain], check=True, capture_output=True)
        (kept / "d2ft.dump").write_bytes(dumped.stdout)

    def restore(home: Path, kept: Path) -> None:
        told = re.search(r"pg_restore ([^`]*)`", RUNBOOK)
        assert told is not None
        flags = [word for word in told.group(1).split() if not word.startswith(("--username", "--dbname", "/"))]
        subprocess.run([BINARIES / "pg_restore", *flags, "--dbname", plain, kept / "d2ft.dump"], check=True)

    return Tables(url, backup, restore)


def keep_files(home: Path, kept: Path) -> None:
    """What its rsync takes, by the names that it leaves out."""
    words = command("rsync --archive")
    left_out = [words[i + 1] for i, word in enumerate(words) if word == "--exclude"]
    assert left_out
    shutil.copytree(home, kept / "home", symlinks=True, ignore=shutil.ignore_patterns(*left_out))


@contextmanager
def service(settings: Settings) -> Iterator[tuple[Client, FakeRay]]:
    ray = FakeRay(drives=True)
    with serving(settings, ray) as url, Client(url, read_secret(settings.home / "key") or "") as client:
        yield client, ray
        ray.join()


@pytest.mark.parametrize("kind", [sqlite, in_postgres], ids=["sqlite", "postgres"])
def test_what_was_backed_up_while_jobs_ran_goes_on_after_a_restore(
    kind: Callable[[str], Tables], settings: Settings, models: dict[str, object], database: str, tmp_path: Path
) -> None:
    tables, kept = kind(database), tmp_path / "backup"
    kept.mkdir()
    settings = settings.model_copy(update={"port": free_port(), "database_url": tables.url, "max_running": 2})
    with service(settings) as (client, _):
        done = client.submit({"steps": 4})
        done.wait(timeout_s=20)
        going = client.submit(ENDLESS)
        until(lambda: client.get(going.id).progress.step)
        tables.backup(settings.home, kept)
        later = client.submit({"steps": 4})
        later.wait(timeout_s=20)
        keep_files(settings.home, kept)
        key = read_secret(settings.home / "key")
    shutil.rmtree(settings.home)  # the disk is lost
    shutil.copytree(kept / "home", settings.home, symlinks=True)
    tables.restore(settings.home, kept)
    write_catalogue(settings.home, models)  # type: ignore[arg-type]
    with service(settings) as (client, ray):
        assert read_secret(settings.home / "key") == key
        names = {path.name for path in client.job(done.id).download(tmp_path / "found")}
        assert "model.safetensors" in names
        with pytest.raises(ApiNotFoundError):
            client.get(later.id)
        until(lambda: client.get(going.id).attempt >= 2 and ray.submits)
        assert client.get(going.id).attempt == 2 and client.get(going.id).status not in ("failed", "cancelled")
        client.cancel(going.id)
        assert len(ray.submits) >= 1


def test_the_first_key_is_rotated_as_it_says(run: Callable[..., Result], server: str, home: Path) -> None:
    told = next(line for line in RUNBOOK.splitlines() if line.startswith("| the first key"))
    assert "--scope admin" in told and "revoke the first" in told and "mode 0600" in told
    first = read_secret(home / "key") or ""
    with Client(server, first) as client:
        first_id = client.me().key_id or ""
    new = run("keys", "add", "operator", "--scope", "read", "--scope", "write", "--scope", "admin").stdout.strip()
    (home / "key").write_text(new)
    (home / "key").chmod(0o600)
    assert run("keys", "revoke", first_id, "--yes").exit_code == 0
    assert run("users", "list").exit_code == 0
    (home / "key").write_text(first)
    assert run("list").exit_code == 4
