"""`d2ft up` and `down` with a real Ray: a stand-in driver runs, the API is killed and comes back, nothing is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
MAIN = "from service.cli import main; main()"


class Machine:
    """One home, and the command line on it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.env = {
            **os.environ,
            "D2FT_HOME": str(home),
            "D2FT_DRIVER_MODULE": "tests.service.fake_driver",
            "D2FT_POLL_S": "0.2",
            "PYTHONPATH": str(ROOT),
        }

    def run(self, *words: str, timeout_s: float = 100) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", MAIN, *words],
            env=self.env,
            cwd=self.home.parent,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def note(self) -> dict[str, dict[str, int]]:
        return json.loads((self.home / "server.json").read_text())  # type: ignore[no-any-return]

    def processes(self) -> list[psutil.Process]:
        """Everything that names the home in its command line."""
        return [
            p for p in psutil.process_iter(["cmdline"]) if any(str(self.home) in a for a in p.info["cmdline"] or [])
        ]


@pytest.fixture
def machine() -> Iterator[Machine]:
    parent = Path(tempfile.mkdtemp(prefix="d2-", dir="/tmp"))
    machine = Machine(parent / "h")
    yield machine
    machine.run("down")
    shutil.rmtree(parent, ignore_errors=True)


def test_up_runs_a_job_survives_the_api_and_goes_down_whole(machine: Machine) -> None:
    port = "7497"
    began = machine.run("up", "--port", port)
    assert began.returncode == 0, began.stderr + (machine.home / "logs" / "ray.log").read_text()[-2000:]
    url = began.stdout.strip()
    assert url == f"http://127.0.0.1:{port}"

    again = machine.run("up", "--port", port)
    assert again.returncode == 0 and "already up" in again.stderr and again.stdout.strip() == url

    elsewhere = Machine(machine.home.with_name("other"))
    taken = elsewhere.run("up", "--port", port)
    assert taken.returncode == 6 and port in taken.stderr

    job_id = _submit(machine, pause_s="0.1")
    _until(machine, job_id, "running")
    os.kill(machine.note()["api"]["pid"], signal.SIGKILL)
    assert machine.run("get", job_id).returncode == 5
    assert machine.run("up", "--port", port).returncode == 0
    watched = machine.run("watch", job_id)
    assert watched.returncode == 0 and "compute fraction" in watched.stdout, watched.stderr

    hanging = _submit(machine, outcome="hang")
    _until(machine, hanging, "running")
    machine.run("cancel", hanging)
    began_at = time.monotonic()
    assert machine.run("watch", hanging).returncode == 1
    assert json.loads(machine.run("get", hanging, "--json").stdout)["status"] == "cancelled"
    assert time.monotonic() - began_at < 20

    assert machine.run("down").returncode == 0
    assert machine.processes() == []
    assert not (machine.home / "server.json").exists()


def _submit(machine: Machine, **metadata: str) -> str:
    spec = machine.home.parent / "spec.json"
    spec.write_text(json.dumps({"steps": 60, "metadata": metadata}))
    made = machine.run("submit", "--spec", str(spec))
    assert made.returncode == 0, made.stderr
    return made.stdout.strip()


def _until(machine: Machine, job_id: str, status: str) -> None:
    for _ in range(60):
        job = json.loads(machine.run("get", job_id, "--json").stdout)
        if job["status"] == status:
            return
        assert job["status"] not in ("failed", "succeeded"), job
        time.sleep(0.3)
    raise AssertionError(f"{job_id} did not get to {status}: {job}")
