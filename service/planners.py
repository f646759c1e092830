"""Planner processes: dry runs are solved off the event loop, a bounded number at once and a bounded number waiting.

Each planner is a child that speaks lines of JSON (`planner_child`): no torch, no web, no pickle. One that dies, takes
too long or is let go of by its client is killed, and the next request starts another: what it was doing cannot be
stopped otherwise. A process pool would load the whole server into its children, and ends as a whole when one dies.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from pathlib import Path
from typing import Any

from scheduler.errors import D2ftError, from_dict
from service.errors import TooManyError, UnavailableError
from service.processes import child_env
from service.settings import Settings

log = logging.getLogger(__name__)
MAX_ANSWER_BYTES = 256 << 20


class Planners:
    """`plan_workers` children, made when they are first needed, and the queue before them."""

    def __init__(self, settings: Settings, command: list[str] | None = None) -> None:
        command = command or [sys.executable, "-m", "service.planner_child"]
        self._timeout_s = settings.plan_timeout_s
        self._room = settings.plan_workers + settings.plan_queue
        self._inside = 0
        self._all = [_Child(command, settings.logs_dir / "planner.log") for _ in range(settings.plan_workers)]
        self._free: asyncio.LifoQueue[_Child] = asyncio.LifoQueue()  # the one used last is warm
        for child in reversed(self._all):
            self._free.put_nowait(child)

    @property
    def num_busy(self) -> int:
        return len(self._all) - self._free.qsize()

    @property
    def num_waiting(self) -> int:
        return self._inside - self.num_busy

    async def what_if(self, request: dict[str, Any]) -> dict[str, Any]:
        """The planner's answer. Raises its errors; TooManyError when the queue is full; UnavailableError."""
        if self._inside >= self._room:
            message = f"{self._inside} dry runs are being planned or wait for it, as many as may."
            raise TooManyError(message, code="too_many_plans", remedy="Try again soon, or raise D2FT_PLAN_QUEUE.")
        self._inside += 1
        try:
            child = await self._free.get()
            try:
                return await self._ask(child, request)
            finally:
                self._free.put_nowait(child)
        finally:
            self._inside -= 1

    async def close(self) -> None:
        """End the children."""
        for child in self._all:
            await child.kill()

    async def _ask(self, child: _Child, request: dict[str, Any]) -> dict[str, Any]:
        """One exchange, after which the child is idle or gone."""
        try:
            async with asyncio.timeout(self._timeout_s):
                line = await child.exchange(json.dumps(request).encode() + b"\n")
            told = json.loads(line)
        except TimeoutError:
            await child.kill()
            message = f"The planner took longer than {self._timeout_s:g} s."
            remedy = "Ask for a smaller model or fleet, or raise D2FT_PLAN_TIMEOUT_S."
            raise UnavailableError(message, code="plan_timeout", remedy=remedy) from None
        except (OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            log.warning("a planner process ended within a request: %r", error)
            await child.kill()
            message = "The planner's process ended while it worked on this."
            raise UnavailableError(message, code="planner_died", remedy="Try again.") from error
        except asyncio.CancelledError:
            await child.kill()
            raise
        if "error" in told:
            raise _in_our_words(from_dict(told["error"]))
        answer: dict[str, Any] = told["answer"]
        return answer


class _Child:
    """One planner process, started by its first exchange and after each end."""

    def __init__(self, command: list[str], log_file: Path) -> None:
        self._command = command
        self._log_file = log_file
        self._process: asyncio.subprocess.Process | None = None

    async def exchange(self, line: bytes) -> bytes:
        """Send a line, return the line that comes back. Raises IncompleteReadError when the process ends instead."""
        process = self._process
        if process is None or process.returncode is not None:
            process = self._process = await self._start()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(line)
        await process.stdin.drain()
        return await process.stdout.readuntil(b"\n")

    async def kill(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            await asyncio.shield(process.wait())

    async def _start(self) -> asyncio.subprocess.Process:
        with self._log_file.open("ab") as output:
            return await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=output,
                cwd=self._log_file.parent,
                env=child_env(),
                limit=MAX_ANSWER_BYTES,
            )


# what the planner calls a field → what the request calls it; of a method alone the fields below have the same names
_FIELDS = {"shape": "model", "step": "micro_batches", "records": "devices"}


def _in_our_words(error: D2ftError) -> D2ftError:
    """The planner's error with the field of the body that it is about."""
    head, dot, rest = (error.param or "").partition(".")
    error.param = f"method{dot}{rest}" if head == "plan" else _FIELDS.get(head, error.param)
    return error
