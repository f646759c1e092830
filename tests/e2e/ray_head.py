"""A head of Ray for tests: two cores, a token, a short directory, and nothing left of it."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.service.conftest import free_port

ROOT = Path(__file__).parents[2]
START_S = 90.0


@dataclass
class Head:
    """Where it is; `env` is what a process needs to speak to it."""

    folder: Path
    address: str
    dashboard: str
    env: dict[str, str]


@contextmanager
def ray_head(*, dashboard: bool = False) -> Iterator[Head]:
    """Start one and yield it; its processes are ended by their own ids."""
    folder = Path(tempfile.mkdtemp(prefix="d2r", dir="/tmp"))
    (folder / "token").write_text(secrets.token_hex(32))
    port, shown = free_port(), free_port()
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2", f"--port={port}",
        "--node-ip-address=127.0.0.1", f"--temp-dir={folder / 'r'}", f"--include-dashboard={str(dashboard).lower()}",
        f"--dashboard-port={shown}", "--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats",
        "--object-store-memory=200000000",
    ]  # fmt: skip
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen(command, env=env, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait_for(head, folder / "head.log")
        address = f"127.0.0.1:{port}"
        yield Head(folder, address, f"http://127.0.0.1:{shown}", {**env, "RAY_ADDRESS": address})
    finally:
        _end(head)
        shutil.rmtree(folder, ignore_errors=True)


def run(head: Head, *words: str, timeout_s: float = 300, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a module of the house against the head."""
    return subprocess.run(
        [sys.executable, "-m", *words],
        env={**head.env, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), **env},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def _wait_for(head: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while "block forever" not in log.read_text():
        if head.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(log.read_text())
        time.sleep(0.1)


def _end(head: subprocess.Popen[bytes]) -> None:
    try:
        processes = psutil.Process(head.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        processes = []
    head.send_signal(signal.SIGTERM)
    try:
        head.wait(20)
    except subprocess.TimeoutExpired:
        head.kill()
        head.wait()
    for process in psutil.wait_procs(processes, timeout=5)[1]:
        process.kill()
