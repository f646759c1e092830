"""Thumbnails of images that nobody vouches for: each request has a child of its own (`thumbnail_child`).

A child is killed after `TIMEOUT_S`, and a decoder that breaks takes only its child along: the images that it leaves
get an `error` in place of a picture. It inherits nothing of the environment but where Python finds its modules.
"""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from service.errors import TooManyError
from service.processes import bare_env
from service.settings import Settings

TIMEOUT_S = 10
SIDE = 96
MAX_CHILDREN = 2
MAX_WAITING = 32
MAX_LINE_BYTES = 1 << 20
_LATE = f"There was no time left for this image: all together have {TIMEOUT_S} s."
_ARROW = {"ARROW_DEFAULT_MEMORY_POOL": "system"}  # its own would reserve more than the child may have
_DIED = "The decoder ended at this image or at one before it."


class Thumbnails:
    """At most `MAX_CHILDREN` children, and a bounded number of requests that wait for one."""

    def __init__(self, settings: Settings, command: Sequence[str] | None = None, timeout_s: float = TIMEOUT_S) -> None:
        self._command = command or (sys.executable, "-m", "service.thumbnail_child")
        self._timeout_s = timeout_s
        self._max_pixels = settings.max_image_pixels
        self._cwd = settings.logs_dir
        self._turn = asyncio.Semaphore(MAX_CHILDREN)
        self._inside = 0

    async def make(self, root: Path, files: Sequence[str]) -> list[dict[str, Any]]:
        """For each file of `root`, which is resolved, the child's answer. Raises TooManyError when too many wait."""
        return await self._in_turn({"root": str(root), "files": list(files)})

    async def make_of(self, uri: str, roots: Sequence[str | Path], names: Sequence[str]) -> list[dict[str, Any]]:
        """The same for images of a dataset, which the child opens."""
        return await self._in_turn({"uri": uri, "roots": [str(root) for root in roots], "files": list(names)})

    async def _in_turn(self, wanted: dict[str, Any]) -> list[dict[str, Any]]:
        if self._inside >= MAX_CHILDREN + MAX_WAITING:
            message = f"{self._inside} requests for thumbnails are being worked on, as many as may."
            raise TooManyError(message, code="too_many_thumbnails", remedy="Try again soon.")
        self._inside += 1
        try:
            async with self._turn:
                return await self._ask(wanted)
        finally:
            self._inside -= 1

    async def _ask(self, wanted: dict[str, Any]) -> list[dict[str, Any]]:
        limits = {"side": SIDE, "max_pixels": self._max_pixels, "seconds": TIMEOUT_S}
        request, count = json.dumps({**wanted, **limits}).encode() + b"\n", len(wanted["files"])
        child = await asyncio.create_subprocess_exec(
            *self._command, stdin=PIPE, stdout=PIPE, cwd=self._cwd, env={**bare_env(), **_ARROW}, limit=MAX_LINE_BYTES
        )
        answers: list[dict[str, Any]] = []
        missing = _DIED
        try:
            async with asyncio.timeout(self._timeout_s):
                await _exchange(child, request, count, answers)
        except TimeoutError:
            missing = _LATE
        except (OSError, ValueError):  # it died while it was written to, or wrote what is no line of ours
            pass
        finally:
            if child.returncode is None:
                child.kill()
            await asyncio.shield(child.wait())
        return answers + [{"error": missing}] * (count - len(answers))


async def _exchange(child: Process, request: bytes, count: int, answers: list[dict[str, Any]]) -> None:
    """Send the request and take answers as they come: those of a child that is killed later are kept."""
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write(request)
    await child.stdin.drain()
    child.stdin.close()
    while len(answers) < count and (line := await child.stdout.readline()):
        answers.append(json.loads(line))
