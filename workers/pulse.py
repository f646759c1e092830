"""The pulse of a worker: its own account of how far it is, written once a beat into a file of its own.

    <run_dir>/pulse/rank003.json    the account; gone once the worker has ended as it should
    <run_dir>/stacks/rank003.txt    where each of its threads is, appended whenever SIGUSR1 arrives

The thread that works only sets attributes; another one writes. So a worker that hangs still says that it is silent, and
one that is stopped, or holds the interpreter's lock in C, stops beating. Seconds are counted here by beats: time in
which this process did not run is not silence. No torch, no Ray.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import psutil

from workers.disk import leave

PULSE_DIR, STACKS_DIR = "pulse", "stacks"
STEPS_KEPT = 200  # whose durations say how long a step may take
STEPS_KNOWN = 5  # fewer say too little
SLACK = 5.0  # times the p99 of the steps before
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patience:
    """How long a worker may be silent, by what it does; and when a beat counts as stopped."""

    step_s: float = 30.0  # in training, or SLACK × p99 of its own steps
    first_step_s: float = 120.0  # while fewer than STEPS_KNOWN steps are known
    start_s: float = 300.0  # what comes before training, and between its windows
    evaluate_s: float = 600.0
    checkpoint_s: float = 300.0
    frozen_s: float = 15.0  # without a beat, by the reader's clock
    beat_s: float = 1.0

    def limit(self, phase: str, durations: Collection[float]) -> float:
        """Seconds of silence allowed in a phase, after training steps of these durations."""
        kind = phase.partition(" ")[0]  # "evaluate before" is an evaluation
        if kind == "train":
            floor = self.first_step_s if len(durations) < STEPS_KNOWN else self.step_s
            return max(floor, SLACK * p99(durations))
        limits = {"evaluate": self.evaluate_s, "checkpoint": self.checkpoint_s, "export": self.checkpoint_s}
        return limits.get(kind, self.start_s)


PATIENCE = Patience()


@dataclass(frozen=True)
class Account:
    """What a pulse file says. `created` are seconds since the machine's boot: they mean something there alone."""

    rank: int
    pid: int
    created: float
    host: str
    node: str  # as Ray calls it
    phase: str
    step: int | None
    instruction: int | None
    waiting_for: int | None  # the peer whose message it is blocked on
    beat: int
    silent_s: float
    limit_s: float


class Pulse:
    """A worker's pulse, until `close`; the notes are for one thread, which need not be the main one."""

    def __init__(self, run_dir: str | Path, rank: int, node: str = "", patience: Patience = PATIENCE) -> None:
        self._path, self._stacks_path = pulse_path(run_dir, rank), stacks_path(run_dir, rank)
        self._rank, self._node, self._patience = rank, node, patience
        self._pid, self._host = os.getpid(), socket.gethostname()
        self._created = created(psutil.Process())
        self._phase = "prepare"
        self._step: int | None = None
        self._instruction: int | None = None
        self._waiting_for: int | None = None
        self._notes = 0
        self._durations_s: deque[float] = deque(maxlen=STEPS_KEPT)
        self._step_began: float | None = None
        for path in (self._path, self._stacks_path):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._stacks = open(self._stacks_path, "a")  # noqa: SIM115 - the signal handler writes to it until `close`
        faulthandler.register(signal.SIGUSR1, file=self._stacks, all_threads=True, chain=False)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
        self._thread.start()

    def phase(self, name: str) -> None:
        """A phase begins; what comes before its first step is no step."""
        self._end_step()
        self._phase, self._step, self._instruction, self._waiting_for = name, None, None, None
        self._notes += 1

    def step(self, step: int) -> None:
        """A step begins, and the one before it has ended."""
        self._end_step()
        self._step, self._instruction, self._waiting_for = step, None, None
        self._step_began = time.monotonic()
        self._notes += 1

    def at(self, index: int) -> None:
        """The instruction that begins: hundreds of times a step, so it is two writes."""
        self._instruction = index
        self._notes += 1

    def waits(self, peer: int | None) -> None:
        """Blocked on a message of this peer; None when it is here."""
        self._waiting_for = peer
        self._notes += 1

    def close(self) -> None:
        """The worker ends as it should: nobody is to miss its beats."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._thread.join(timeout=5.0)
        self._path.unlink(missing_ok=True)
        faulthandler.unregister(signal.SIGUSR1)
        self._stacks.close()

    def __enter__(self) -> Pulse:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _end_step(self) -> None:
        if self._step_began is not None and self._phase == "train":
            self._durations_s.append(time.monotonic() - self._step_began)
        self._step_began = None

    def _beat(self) -> None:
        beat, notes, silent_s, before = 0, self._notes, 0.0, time.monotonic()
        while True:
            try:
                self._write(self._account(beat, silent_s))
            except OSError as error:
                _LOG.warning("the pulse cannot be written: %s", error)
            if self._closed.wait(self._patience.beat_s):
                return
            beat, now = beat + 1, time.monotonic()
            # A gap of many beats is one in which the whole process stood still.
            silent_s = silent_s + min(now - before, 2 * self._patience.beat_s) if notes == self._notes else 0.0
            notes, before = self._notes, now

    def _account(self, beat: int, silent_s: float) -> Account:
        return Account(
            rank=self._rank,
            pid=self._pid,
            created=self._created,
            host=self._host,
            node=self._node,
            phase=self._phase,
            step=self._step,
            instruction=self._instruction,
            waiting_for=self._waiting_for,
            beat=beat,
            silent_s=round(silent_s, 3),
            limit_s=self._patience.limit(self._phase, list(self._durations_s)),
        )

    def _write(self, account: Account) -> None:
        """By renaming; where the disk is full, over the old text, since a worker with a full disk is not a dead one."""
        told = json.dumps(asdict(account))
        try:
            leave(self._path, told)
        except OSError:
            with open(self._path, "r+b") as old:
                old.write(told.encode().ljust(self._path.stat().st_size))


class Quiet(Pulse):
    """A pulse that nobody listens to, and that leaves no file."""

    def __init__(self) -> None:
        self._phase, self._step, self._instruction, self._waiting_for = "", None, None, None
        self._notes, self._step_began = 0, None

    def step(self, step: int) -> None:
        pass

    def close(self) -> None:
        pass

    def _end_step(self) -> None:
        pass


def accounts(run_dir: str | Path) -> list[Account]:
    """What the workers of a run tell of themselves now."""
    found = (read(path) for path in sorted((Path(run_dir) / PULSE_DIR).glob("rank*.json")))
    return [account for account in found if account is not None]


def pulse_path(run_dir: str | Path, rank: int) -> Path:
    return Path(run_dir) / PULSE_DIR / f"rank{rank:03d}.json"


def stacks_path(run_dir: str | Path, rank: int) -> Path:
    return Path(run_dir) / STACKS_DIR / f"rank{rank:03d}.txt"


def read(path: Path) -> Account | None:
    """The account in a file; None where there is none, or only half of one."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Account(**json.loads(path.read_bytes()))
    return None


def created(process: psutil.Process) -> float:
    """When a process began, in seconds since boot, which no change of the clock moves."""
    boot = psutil.boot_time()
    return process.create_time() - boot


def p99(durations: Collection[float]) -> float:
    ranked = sorted(durations)
    return ranked[-1 - len(ranked) // 100] if ranked else 0.0
