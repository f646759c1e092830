"""Places where a test can make a process fail, each by its name: nothing but one look at a variable in every other run.

    D2FT_FAILPOINTS=checkpoint.rename:kill9@2,supervisor.submitted:error_after_ok

The action happens the n-th time that a process comes by (the first, where no @n is given). With D2FT_FAILPOINTS_DIR, a
directory that all processes see, it happens once in all of them together, however often they are started again.

| action | |
|---|---|
| kill9 | the process is gone, as by `kill -9` |
| hang | the thread never goes on |
| error | raises SystemFault "failpoint" before the thing is done |
| error_after_ok | raises it after the thing is done: who asked is told that it failed |
| enospc | raises OSError ENOSPC, as a full disk does |
"""

from __future__ import annotations

import errno
import functools
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scheduler.errors import SystemFault

VARIABLE, DIRECTORY = "D2FT_FAILPOINTS", "D2FT_FAILPOINTS_DIR"
ACTIONS = ("kill9", "hang", "error", "error_after_ok", "enospc")
# Every place, and what is about to happen there.
NAMES = {
    "checkpoint.begin": "a worker begins to write its part",
    "checkpoint.written": "a worker's part is on the disk, and says so",
    "checkpoint.manifest": "rank 0 writes the manifest",
    "checkpoint.rename": "the folder gets its name",
    "checkpoint.listed": "the event that lists it is written",
    "step.begin": "a worker begins a step",
    "result.write": "rank 0 writes the result folder",
    "scheduler.plan": "the scheduler actor answers with a plan",
    "store.commit": "the store commits a transaction that wrote",
    "supervisor.claimed": "an attempt is opened, and nobody has submitted it",
    "supervisor.submit": "an attempt is handed to Ray",
    "supervisor.absorb": "lines of a run are taken over",
    "supervisor.finish": "a job is decided",
    "supervisor.settle": "an attempt is let go of",
}
_seen: Counter[str] = Counter()
_lock = threading.Lock()


@contextmanager
def passing(name: str) -> Iterator[None]:
    """Around what the failpoint is named for."""
    action = _due(name)
    if action and action != "error_after_ok":
        _act(name, action)
    yield
    if action == "error_after_ok":
        _act(name, "error")


def hit(name: str) -> None:
    """At a place behind which nothing is: every action happens here."""
    if action := _due(name):
        _act(name, action)


def _due(name: str) -> str | None:
    """The action that is to happen at this place now."""
    if VARIABLE not in os.environ:
        return None
    assert name in NAMES, name
    wanted = _parse(os.environ[VARIABLE])
    with _lock:
        _seen[name] += 1
        return next((a for n, a, at in wanted if n == name and _seen[name] == at and _first(f"{n}-{a}-{at}")), None)


def _first(what: str) -> bool:
    """Whether no process has done this before, where they share a directory to know it by."""
    directory = os.environ.get(DIRECTORY)
    if directory is None:
        return True
    try:
        (Path(directory) / what).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _act(name: str, action: str) -> None:
    if action == "kill9":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "hang":
        while True:
            time.sleep(3600)
    if action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
    raise SystemFault(f"The failpoint {name} fails on purpose.", code="failpoint")


def told() -> dict[str, str]:
    """The variables, for processes that do not inherit them."""
    return {name: os.environ[name] for name in (VARIABLE, DIRECTORY) if name in os.environ}


@functools.lru_cache
def _parse(told: str) -> tuple[tuple[str, str, int], ...]:
    """(name, action, the time that it is to happen) of each part. Raises ValueError."""
    found = []
    for part in told.split(","):
        name, _, rest = part.strip().partition(":")
        action, _, at = rest.partition("@")
        if name not in NAMES or action not in ACTIONS or not (at or "1").isdigit():
            raise ValueError(f"{VARIABLE}: {part!r} is no NAME:ACTION@N; actions are {', '.join(ACTIONS)}")
        found.append((name, action, int(at or 1)))
    return tuple(found)
