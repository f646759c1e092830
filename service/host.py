"""`up` and `down`: the processes of a service on this machine, by the note in server.json.

    up     home, key, token ─► Ray head (or another's address) ─► API ─► /readyz
    down   API, then Ray: each only if pid and creation time are those noted

What is found alive is kept: after a crash of the API alone, `up` starts it again and the running jobs never notice.
After a crash of Ray it starts both; jobs that ran there go on as new attempts, those that waited as if nothing were.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from scheduler.errors import SystemFault
from service import cluster
from service.errors import ConflictError
from service.exposure import check_exposure, trust_of
from service.home import ensure_key, ensure_ray_token, forget_server, make_home, read_server, write_server
from service.processes import child_env, end_tree, find, identify
from service.settings import Settings

Say = Callable[[str], None]
API_START_S = 30.0
API_GRACE_S = 8.0
RAY_GRACE_S = 10.0


@dataclass(frozen=True)
class Machine:
    """What Ray is told of this machine; None of GPUs means that Ray counts them itself."""

    num_cpus: int
    num_gpus: int | None = None


def up(settings: Settings, machine: Machine, say: Say) -> tuple[str, bool]:
    """Bring the service up; (its URL, False) when it was up before.

    Raises UserError when keys would travel in clear, ConflictError when the port is taken or another `up` is at work,
    SystemFault when a part does not start.
    """
    check_exposure(settings)
    os.umask(0o077)
    make_home(settings.home)
    with _alone(settings.home):
        noted = read_server(settings.home)
        if _is_whole(noted):
            return noted["url"], False
        _end(noted.get("api"), API_GRACE_S)
        _check_port(settings)
        ensure_key(settings.home)
        noted = {**_address(settings), "api": None, **_bring_ray(settings, machine, noted, say)}
        write_server(settings.home, noted)
        api = _start_api(settings, noted["ray_address"])
        write_server(settings.home, {**noted, "api": identify(api.pid)})
        _wait_api(settings, api)
    return settings.url, True


def down(home: Path, say: Say) -> bool:
    """End what `up` started. False when nothing was up."""
    if not home.is_dir():
        return False
    with _alone(home):
        noted = read_server(home)
        was_up = [_end(noted.get("api"), API_GRACE_S)]
        if find(noted.get("ray")):
            say("stopping Ray")
        was_up.append(_end(noted.get("ray"), RAY_GRACE_S))
        forget_server(home)
    return any(was_up)


def hold(home: Path, say: Say) -> None:
    """Stay until the API ends or a signal comes, then bring everything down: what a container wants."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        while find(read_server(home).get("api")):
            time.sleep(0.5)
        say("the API has ended")
    except KeyboardInterrupt:
        say("stopping")
    finally:
        down(home, say)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _bring_ray(settings: Settings, machine: Machine, noted: dict[str, Any], say: Say) -> dict[str, Any]:
    """A Ray that answers: another's, the one that is still alive, or a new head."""
    if settings.ray_address:
        cluster.wait_ready(settings.ray_address, settings.token_file, gone=lambda: False, timeout_s=20.0)
        return {"ray": None, "ray_address": settings.ray_address}
    ensure_ray_token(settings.token_file)
    alive = find(noted.get("ray"))
    if alive and noted.get("ray_address"):
        say("using the Ray that is still running")
        cluster.wait_ready(noted["ray_address"], settings.token_file, gone=lambda: not alive.is_running())
        return {"ray": noted["ray"], "ray_address": noted["ray_address"]}
    _end(noted.get("ray"), RAY_GRACE_S)
    say("starting Ray (about 10 s)")
    head = cluster.start_head(settings.home, settings.token_file, num_cpus=machine.num_cpus, num_gpus=machine.num_gpus)
    found: dict[str, Any] = {"ray": identify(head.process.pid), "ray_address": head.address}
    # Noted before it is ready, so that `down` finds it when this process is killed meanwhile.
    write_server(settings.home, {**_address(settings), "api": None, **found})
    try:
        cluster.wait_ready(head.address, settings.token_file, gone=lambda: head.process.poll() is not None)
    except SystemFault:
        _end(found["ray"], RAY_GRACE_S)
        forget_server(settings.home)
        raise
    return found


def _start_api(settings: Settings, ray_address: str) -> subprocess.Popen[bytes]:
    env = {**child_env(), **settings.as_env(), "D2FT_RAY_ADDRESS": ray_address}
    with (settings.logs_dir / "api.log").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "service.app"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=settings.home,
            env=env,
            start_new_session=True,
        )


def _wait_api(settings: Settings, api: subprocess.Popen[bytes]) -> None:
    log = settings.logs_dir / "api.log"
    deadline = time.monotonic() + API_START_S
    while time.monotonic() < deadline:
        if api.poll() is not None:
            message = f"The API ended at once with {api.returncode}: {_last_line(log)}"
            raise SystemFault(message, code="api_not_ready", remedy=f"See {log}.")
        if _answers(**_address(settings)):
            return
        time.sleep(0.1)
    raise SystemFault(f"The API at {settings.url} did not get ready.", code="api_not_ready", remedy=f"See {log}.")


def _is_whole(noted: dict[str, Any]) -> bool:
    """Whether all that was started is still up. An API whose Ray has died is not: it would wait for ever."""
    ray_lives = noted.get("ray") is None or find(noted["ray"]) is not None
    return ray_lives and find(noted.get("api")) is not None and _answers(noted["url"], noted.get("tls_cert"))


def _address(settings: Settings) -> dict[str, Any]:
    """Where the API is, and by which certificate it is known."""
    return {"url": settings.url, "tls_cert": str(settings.tls_cert) if settings.tls_cert else None}


def _answers(url: str, tls_cert: str | None = None) -> bool:
    try:
        return httpx2.get(f"{url}/readyz", timeout=5.0, trust_env=False, verify=trust_of(tls_cert)).is_success
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError):  # the last where the certificate is gone
        return False


def _check_port(settings: Settings) -> None:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            message = f"Port {settings.port} of {settings.host} cannot be used: {error.strerror}."
            remedy = "Take another with --port, or end what holds it (another home's service: D2FT_HOME=... d2ft down)."
            raise ConflictError(message, code="port_in_use", param="port", remedy=remedy) from error


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    """Only one `up` or `down` works on a home at a time."""
    with (home / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"Another 'up' or 'down' is at work on {home}."
            raise ConflictError(message, code="home_busy", remedy="Wait for it.") from None
        yield


def _end(noted: dict[str, Any] | None, grace_s: float) -> bool:
    process = find(noted)
    if process is not None:
        end_tree(process, grace_s)
    return process is not None


def _last_line(path: Path) -> str:
    """The last thing that was said: in plain text, as a traceback is, or as an error in the log."""
    lines = path.read_text(errors="replace").strip().splitlines()[-50:]
    told = [said for said in map(_said, lines) if said]
    return told[-1][-300:] if told else "it printed nothing"


def _said(line: str) -> str:
    """A line in plain text as it is; of one of the log the end of its message, where it tells of an error."""
    try:
        entry = json.loads(line)
    except ValueError:
        return line.strip()
    if not isinstance(entry, dict):
        return line.strip()
    text = str(entry.get("message", "")).strip() if entry.get("level") in ("ERROR", "CRITICAL") else ""
    return text.splitlines()[-1] if text else ""
