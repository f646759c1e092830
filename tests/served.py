"""A service with a real Ray on this machine and a home of its own, for programs."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from service.client import Client
from service.home import read_secret
from service.settings import Settings
from tests.service.conftest import free_port

D2FT = (sys.executable, "-c", "from service.cli import main; main()")


@dataclass(frozen=True)
class Served:
    """A service that is up; `env` is that of its commands."""

    home: Path
    url: str
    key: str
    env: dict[str, str]
    client: Client

    def up(self) -> None:
        """Bring up what is not."""
        subprocess.run([*D2FT, "up", "--num-cpus", "2"], env=self.env, check=True, capture_output=True)

    def run_dir(self, job_id: str) -> Path:
        """Where the first attempt of a job runs."""
        return Settings(home=self.home).attempt_dir(job_id, 1)


@contextlib.contextmanager
def served() -> Iterator[Served]:
    """Up during the block, gone afterwards."""
    home = Path(tempfile.mkdtemp(prefix="d2k", dir="/tmp"))  # short: sockets of Ray's lie below it
    port = free_port()
    env = {**os.environ, "D2FT_HOME": str(home), "D2FT_PORT": str(port), "OMP_NUM_THREADS": "1"}
    try:
        subprocess.run([*D2FT, "up", "--num-cpus", "2"], env=env, check=True, capture_output=True)
        key, url = read_secret(home / "key") or "", f"http://127.0.0.1:{port}"
        with Client(url, key) as client:
            yield Served(home, url, key, env, client)
    finally:
        subprocess.run([*D2FT, "down"], env=env, check=False, capture_output=True)
        shutil.rmtree(home, ignore_errors=True)
