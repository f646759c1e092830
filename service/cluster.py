"""A Ray head on this machine, as a child in its own session: how it is started, and how one sees that it is ready.

Token authentication is always on: who reaches an open Jobs API owns the machine. The dashboard listens on loopback;
Ray's other ports listen on every interface whatever is asked, so the token is what guards them. Usage reports go
nowhere: switching them off still sends one, hence the address that refuses.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx2

from scheduler.errors import SystemFault
from service.home import read_secret
from service.processes import child_env

START_S = 90.0
# Ray makes sockets at TEMP/session_DATE_TIME_PID/sockets/NAME, about 66 more bytes; a socket's path has at most 107.
MAX_TEMP_PATH = 38


@dataclass(frozen=True)
class Head:
    """A started head: its process, its dashboard's address and its temp directory."""

    process: subprocess.Popen[bytes]
    address: str
    temp: Path


def start_head(home: Path, token_file: Path, *, num_cpus: int, num_gpus: int | None) -> Head:
    """Start a head; it is not ready yet. Raises SystemFault where this Python's Ray came without its Jobs API."""
    if importlib.util.find_spec("aiohttp") is None:
        remedy = "Install it whole: pip install 'ray[default,train,tune]'."
        raise SystemFault("Ray is installed without its dashboard and Jobs API.", code="ray_incomplete", remedy=remedy)
    temp = temp_dir(home)
    ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
    command = [
        *_RAY,
        "start",
        "--head",
        "--block",
        "--disable-usage-stats",
        "--dashboard-host=127.0.0.1",
        f"--num-cpus={num_cpus}",
        f"--temp-dir={temp}",
        *(f"--{name}={port}" for name, port in ports.items()),
        *([] if num_gpus is None else [f"--num-gpus={num_gpus}"]),
    ]
    with (home / "logs" / "ray.log").open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=home,
            env=_head_env(home, token_file),
            start_new_session=True,
        )
    return Head(process, f"http://127.0.0.1:{ports['dashboard-port']}", temp)


def wait_ready(address: str, token_file: Path, gone: Callable[[], bool], timeout_s: float = START_S) -> None:
    """Return once the Jobs API answers. Raises SystemFault when it does not in time, or when the head is `gone`."""
    headers = {"Authorization": f"Bearer {read_secret(token_file) or ''}"}
    deadline = time.monotonic() + timeout_s
    last = "no answer"
    while time.monotonic() < deadline:
        if gone():
            raise _not_ready(address, "it exited")
        try:
            answer = httpx2.get(f"{address}/api/jobs/", headers=headers, timeout=5.0, trust_env=False)
        except httpx2.TransportError as error:
            last = str(error)
        else:
            if answer.is_success:
                return
            last = f"HTTP {answer.status_code}"
            if answer.status_code in (401, 403):
                raise _not_ready(address, f"it refuses the token in {token_file}")
        time.sleep(0.3)
    raise _not_ready(address, last)


def temp_dir(home: Path) -> Path:
    """Ray's temp directory: `home`/ray, or a short one that it points to where that path is too long for sockets."""
    wanted = home / "ray"
    if len(os.fsencode(wanted)) <= MAX_TEMP_PATH:
        wanted.mkdir(mode=0o700, exist_ok=True)
        return wanted
    if wanted.is_symlink() and _is_ours(wanted.readlink().parent):
        return wanted.readlink()
    wanted.unlink(missing_ok=True)
    # Ray opens its temp directory to everybody; the private one around it (mkdtemp: 0700, a fresh name) keeps it shut.
    short = Path(tempfile.mkdtemp(prefix="d2ft-", dir="/tmp")) / "r"
    short.mkdir()
    wanted.symlink_to(short)
    return short


def _is_ours(path: Path) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    return path.is_dir() and not path.is_symlink() and status.st_uid == os.getuid()


_RAY = (sys.executable, "-m", "ray.scripts.scripts")  # this Python's Ray, whatever `ray` is on the path
_PORTS = (
    "port",
    "dashboard-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
)


def _free_ports(count: int) -> list[int]:
    """Ports that are free now, all different: the sockets are open together before any is closed."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _head_env(home: Path, token_file: Path) -> dict[str, str]:
    return {
        **child_env(),
        "D2FT_HOME": str(home),  # what runs on this machine keeps its copies of datasets there
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9/",
    }


def _not_ready(address: str, why: str) -> SystemFault:
    remedy = "See logs/ray.log in D2FT_HOME."
    return SystemFault(f"Ray's Jobs API at {address} did not get ready: {why}.", code="ray_not_ready", remedy=remedy)
