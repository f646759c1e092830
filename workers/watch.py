"""Finds the worker that a group hangs on: the driver reads all pulses once a beat, and ends what Ray still holds alive.

    stopped   no beat for a while: the process, its interpreter's lock or its machine stands still
    hung      it beats, and says that its work has been silent for longer than its phase allows

All of a group fall silent when one hangs. Each says whose message it is blocked on, so the culprit is where these
chains end; one that ends at a worker within its limit accuses nobody yet. On the verdict every worker writes its
stacks, the failure is recorded, the culprit is killed, and after a while the others, should they still be there.

Seconds are counted by the looks of this process, so that neither the clocks of two machines nor a pause of the driver
itself condemn anybody. A dead process on this machine is Ray's to see. No torch, no Ray.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL, SIGUSR1
from types import TracebackType

import psutil

from scheduler.errors import SystemFault
from workers.failures import record_stall
from workers.pulse import PATIENCE, PULSE_DIR, Account, Patience, created, pulse_path, read, stacks_path

STACKS_S = 3.0  # for stacks to be written
STRIKE_S = 5.0  # for a signal to reach its process, which on a dead machine it never does
OTHERS_S = 5.0  # for the others to end by themselves once the culprit is gone
SAME_S = 0.05  # two times of creation that differ by less are one
STACKS_TOLD = 20_000  # characters of stacks in a failure record
_LOG = logging.getLogger(__name__)

Strike = Callable[[Account, int], object]


@dataclass(frozen=True)
class Stall:
    """The verdict on a worker."""

    rank: int
    kind: str  # "stopped" or "hung"
    phase: str
    step: int | None
    instruction: int | None
    silent_s: float
    stacks: list[Path]  # of all workers that wrote theirs


@dataclass(frozen=True)
class Seen:
    """What the driver knows of a worker: its last account, how long its beat has not moved, whether it is dead."""

    account: Account
    frozen_s: float = 0.0
    dead: bool = False

    @property
    def silent(self) -> bool:
        return self.account.silent_s > self.account.limit_s


class Watchdog:
    """Watches one group, from before it starts until `close`; the next group gets another one.

    `strike(account, signal)` sends a signal to a worker's process, as `strike_here` does; it may block or raise.
    """

    def __init__(
        self,
        run_dir: str | Path,
        size: int,
        strike: Strike,
        clock: Callable[[], float] = time.monotonic,
        patience: Patience = PATIENCE,
    ) -> None:
        self.verdict: Stall | None = None
        self._run_dir, self._size, self._strike = Path(run_dir), size, strike
        self._clock, self._patience = clock, patience
        self._seen: dict[int, Seen] = {}
        self._before = clock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        for path in (self._run_dir / PULSE_DIR).glob("*.json"):
            path.unlink(missing_ok=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop watching; a verdict that is being carried out gets as far as the culprit's end."""
        self._closed.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=STACKS_S + STRIKE_S + 2)

    def __enter__(self) -> Watchdog:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def suspects(self, seconds: float) -> bool:
        """Whether some worker has by now been silent or without a beat for so long, be it allowed or not."""
        return any(max(seen.frozen_s, seen.account.silent_s) >= seconds for seen in self._seen.values())

    def look(self) -> list[Seen]:
        """Read all pulses; those that the group hangs on, if it does."""
        now = self._clock()
        passed_s, self._before = min(now - self._before, 2 * self._patience.beat_s), now
        found = {rank: self._again(rank, passed_s) for rank in range(self._size)}
        self._seen = {rank: seen for rank, seen in found.items() if seen is not None}
        return judge(self._seen, self._patience.frozen_s)

    def _again(self, rank: int, passed_s: float) -> Seen | None:
        path, before = pulse_path(self._run_dir, rank), self._seen.get(rank)
        account = read(path)
        if account is None:
            if before is None or not path.exists():
                return None  # it has not begun, or has ended as it should
            account = before.account  # half written
        if before is None or _life(account) != _life(before.account):
            return Seen(account)
        frozen_s = before.frozen_s + passed_s
        return Seen(account, frozen_s, frozen_s > 2 * self._patience.beat_s and _is_dead_here(account))

    def _watch(self) -> None:
        while not self._closed.wait(self._patience.beat_s):
            try:
                culprits = self.look()
            except Exception:
                _LOG.exception("the pulses cannot be read")
                continue
            if culprits:
                self._end(culprits)
                return

    def _end(self, culprits: list[Seen]) -> None:
        """Carry out the verdict, once per group."""
        group = [seen.account for seen in self._seen.values() if not seen.dead]
        stacks = self._stacks(group)
        for culprit in culprits:
            rank = culprit.account.rank
            fault = told(culprit, self._patience.frozen_s, stacks_path(self._run_dir, rank) if rank in stacks else None)
            _LOG.error("%s", fault)
            with contextlib.suppress(OSError):
                record_stall(self._run_dir, rank, fault, stacks.get(rank, ""))
        self.verdict = verdict_on(
            culprits[0], self._patience.frozen_s, [stacks_path(self._run_dir, rank) for rank in stacks]
        )
        self._send([culprit.account for culprit in culprits], SIGKILL, STRIKE_S)
        left = [account for account in map(self._now, group) if account is not None]
        if not self._closed.wait(OTHERS_S):
            self._send([account for account in left if self._beats_on(account)], SIGKILL, STRIKE_S)

    def _stacks(self, accounts: list[Account]) -> dict[int, str]:
        """Have all write where they are; what those wrote that could, by rank."""
        paths = {account.rank: stacks_path(self._run_dir, account.rank) for account in accounts}
        before = {rank: _size(path) for rank, path in paths.items()}
        self._send(accounts, SIGUSR1, 0.0)
        deadline, grown, last = time.monotonic() + STACKS_S, False, before
        while time.monotonic() < deadline:
            time.sleep(0.1)
            sizes = {rank: _size(path) for rank, path in paths.items()}
            if grown and sizes == last:
                break
            grown, last = all(sizes[rank] > before[rank] for rank in sizes), sizes
        return {rank: _tail(path, before[rank]) for rank, path in paths.items() if _size(path) > before[rank]}

    def _send(self, accounts: Iterable[Account], sig: int, wait_s: float) -> None:
        """Strike all at once, since one that is out of reach must not hold up the others."""
        threads = [threading.Thread(target=self._try, args=(account, sig), daemon=True) for account in accounts]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + wait_s
        for thread in threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))

    def _try(self, account: Account, sig: int) -> None:
        try:
            self._strike(account, sig)
        except Exception as error:
            _LOG.warning("signal %d does not reach worker %d: %s", sig, account.rank, error)

    def _now(self, account: Account) -> Account | None:
        """The last account of the same process."""
        now = read(pulse_path(self._run_dir, account.rank))
        return now if now is not None and (now.pid, now.created) == (account.pid, account.created) else None

    def _beats_on(self, account: Account) -> bool:
        now = self._now(account)
        return now is not None and now.beat > account.beat


def judge(seen: Mapping[int, Seen], frozen_s: float) -> list[Seen]:
    """Those that a group hangs on; none while there may be another reason, or somebody is within his limit."""
    stopped = [one for one in seen.values() if one.frozen_s > frozen_s and not one.dead]
    if stopped:
        return stopped
    silent = [one for one in seen.values() if one.silent and not one.dead]
    ends = [_end_of_chain(one, seen) for one in silent]
    blamed = {end.account.rank for end in ends if end is not None and end.silent and not end.dead}
    if blamed:
        return [one for one in silent if one.account.rank in blamed]
    return silent if None in ends else []


def told(seen: Seen, frozen_s: float, stacks: Path | None) -> SystemFault:
    """A stall as an error."""
    stall, account = verdict_on(seen, frozen_s, []), seen.account
    what = "has given no sign of life" if stall.kind == "stopped" else "has made no progress"
    where = f"phase {stall.phase}"
    if stall.step is not None:
        where += f", step {stall.step + 1}"
    if stall.instruction is not None:
        where += f", instruction {stall.instruction}"
    return SystemFault(
        f"Worker {stall.rank} (process {account.pid} on {account.host}) {what} for {stall.silent_s:.0f} s in {where}; "
        + (f"its stacks are in {stacks}." if stacks else "it wrote no stacks."),
        code="worker_stalled",
    )


def verdict_on(seen: Seen, frozen_s: float, stacks: list[Path]) -> Stall:
    account, stopped = seen.account, seen.frozen_s > frozen_s
    silent_s = seen.frozen_s if stopped else account.silent_s
    kind = "stopped" if stopped else "hung"
    return Stall(account.rank, kind, account.phase, account.step, account.instruction, silent_s, stacks)


def strike_here(account: Account, sig: int) -> bool:
    """Signal a worker's process on this machine, if it is still the one that wrote the account; whether it was.

    For another machine the driver has it run there, as a task of Ray on the account's node.
    """
    process = _process_of(account)
    if process is None:
        return False
    try:
        process.send_signal(sig)
    except psutil.NoSuchProcess:
        return False
    return True


def _end_of_chain(one: Seen, seen: Mapping[int, Seen]) -> Seen | None:
    """Who it waits for in the end; None where that is a circle, or somebody who has no pulse.

    A circle with a member within its limit ends there.
    """
    passed: list[int] = []
    while one.account.waiting_for is not None:
        rank = one.account.rank
        if rank in passed:
            circle = [seen[member] for member in passed[passed.index(rank) :]]
            return next((member for member in circle if not member.silent), None)
        passed.append(rank)
        following = seen.get(one.account.waiting_for)
        if following is None or following.dead:
            return following
        one = following
    return one


def _process_of(account: Account) -> psutil.Process | None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(account.pid)
        if abs(created(process) - account.created) < SAME_S:
            return process
    return None


def _is_dead_here(account: Account) -> bool:
    """Whether the process is known to be over; of one on another machine nothing is known."""
    if account.host != socket.gethostname():
        return False
    process = _process_of(account)
    with contextlib.suppress(psutil.NoSuchProcess):
        return process is None or process.status() == psutil.STATUS_ZOMBIE
    return True


def _life(account: Account) -> tuple[int, float, int]:
    return account.pid, account.created, account.beat


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def _tail(path: Path, begin: int) -> str:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        file.seek(begin)
        return file.read(STACKS_TOLD).decode(errors="replace")
    return ""
