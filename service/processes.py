"""Processes: a name for one that outlives its parent, and the environment of those we start.

A pid alone is no name, since it is given out again; pid and creation time together are. Nothing is ever signalled by
pid alone.
"""

from __future__ import annotations

import os
import site
from pathlib import Path
from typing import Any

import psutil

import service

_INHERITED = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "LC_CTYPE")
PACKAGE_ROOT = Path(service.__file__).parent.parent


def identify(pid: int) -> dict[str, Any]:
    """The process's name as it is noted in server.json."""
    return {"pid": pid, "created": psutil.Process(pid).create_time()}


def find(noted: dict[str, Any] | None) -> psutil.Process | None:
    """The process that was noted, or None when it is gone, even if its pid lives on in another."""
    try:
        process = psutil.Process(int((noted or {})["pid"]))
        same = abs(process.create_time() - float((noted or {})["created"])) < 0.01
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except (psutil.Error, LookupError, TypeError, ValueError):
        return None


def end_tree(root: psutil.Process, grace_s: float) -> None:
    """End a process and all its descendants: SIGTERM to the root, then to what it left behind, then SIGKILL."""
    tree = {root, *_descendants(root)}
    _signal([root], psutil.Process.terminate)
    psutil.wait_procs([root], timeout=grace_s)
    tree |= set(_descendants(root))
    left = [process for process in tree if process.is_running()]
    _signal(left, psutil.Process.terminate)
    _, alive = psutil.wait_procs(left, timeout=2.0 if root not in left else 0.2)
    _signal(alive, psutil.Process.kill)
    psutil.wait_procs(alive, timeout=5)


def child_env() -> dict[str, str]:
    """Our environment, with the packages importable where they are run from a checkout."""
    return {**os.environ, **package_env(os.environ.get("PYTHONPATH"))}


def bare_env() -> dict[str, str]:
    """An environment without secrets: where Python finds its modules, and how text is written."""
    inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    return {**inherited, **package_env(os.environ.get("PYTHONPATH"))}


def package_env(python_path: str | None = None) -> dict[str, str]:
    """PYTHONPATH for a child that must import our packages; empty where they are installed."""
    if str(PACKAGE_ROOT) in (*site.getsitepackages(), site.getusersitepackages()):
        return {}
    parts = [str(PACKAGE_ROOT), *(part for part in (python_path or "").split(os.pathsep) if part)]
    return {"PYTHONPATH": os.pathsep.join(dict.fromkeys(parts))}


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def _signal(processes: list[psutil.Process], send: Any) -> None:
    for process in processes:
        try:
            send(process)
        except psutil.NoSuchProcess:
            continue
