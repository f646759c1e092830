"""Predictors: results of jobs tried on images, each in a child of its own (`workers.predictor`), a few at a time.

A child loads torch and one result, which takes seconds, so it stays for `predict_idle_s` and answers what comes next
about that result at once: it is never given another's. Where all places are taken, the one that was idle longest makes
room. What dies, takes too long or is let go of by its client is killed. It inherits nothing of the environment but
where Python finds its modules: an image that breaks its decoder finds no secret there.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import math
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from scheduler.errors import from_dict
from service.errors import ConflictError, InvalidRequestError, Issue, TooLargeError, TooManyError, UnavailableError
from service.processes import bare_env
from service.settings import Settings

MAX_ANSWER_BYTES = 16 << 20
TOO_LARGE = "image_too_large"
log = logging.getLogger(__name__)


class Predictors:
    """At most `predict_workers` children, and a bounded number of requests that wait for one."""

    def __init__(self, settings: Settings, command: Sequence[str] | None = None) -> None:
        self._command = command or (sys.executable, "-m", "workers.predictor")
        self._settings = settings
        self._has_torch = command is not None or importlib.util.find_spec("torch") is not None
        self._turn = asyncio.Semaphore(settings.predict_workers)
        self._room = settings.predict_workers + settings.predict_queue
        self._inside = 0
        self._children: dict[Path, _Child] = {}  # those used last are last

    async def predict(self, result: Path, images: Sequence[bytes], top: int) -> list[list[dict[str, Any]]]:
        """For each image the most probable classes, best first: {"index", "label", "probability"} each.

        Raises InvalidRequestError about `images` that cannot be decoded, TooLargeError for one of too many pixels,
        ConflictError for a result that cannot be loaded, TooManyError where too many wait, UnavailableError.
        """
        if not self._has_torch:
            message = "This service runs without torch, so that it cannot try results."
            remedy = "Download the result and try it where torch is, or run the API from the image worker-cpu."
            raise UnavailableError(message, code="predictions_need_torch", remedy=remedy)
        if self._inside >= self._room:
            message = f"{self._inside} requests for predictions are being worked on, as many as may."
            remedy = "Try again soon, or raise D2FT_PREDICT_QUEUE."
            raise TooManyError(message, code="too_many_predictions", remedy=remedy)
        self._inside += 1
        try:
            async with self._turn:
                child, surplus = self._choose(result)
                with child:
                    if surplus is not None:
                        await surplus.end()
                    return _judged(await self._ask(child, images, top))
        finally:
            self._inside -= 1

    async def close(self) -> None:
        """End the children."""
        for result in list(self._children):
            await self._children.pop(result).end()

    def _choose(self, result: Path) -> tuple[_Child, _Child | None]:
        """(the child of this result, of the others the one that has to make room for it)."""
        child, surplus = self._children.pop(result, None), None
        if child is None:
            child = _Child([*self._command, "--directory", str(result)], self._settings)
            if len(self._children) >= self._settings.predict_workers:
                idle = next(other for other, each in self._children.items() if not each.users)
                surplus = self._children.pop(idle)
        self._children[result] = child
        return child, surplus

    async def _ask(self, child: _Child, images: Sequence[bytes], top: int) -> dict[str, Any]:
        timeout_s = self._settings.predict_timeout_s
        try:
            return await child.exchange(images, top, timeout_s)
        except TimeoutError:
            message = f"The prediction took longer than {timeout_s:g} s."
            remedy = "Send fewer images, or raise D2FT_PREDICT_TIMEOUT_S."
            raise UnavailableError(message, code="predict_timeout", remedy=remedy) from None
        except (OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            log.warning("a predictor process ended within a request: %r", error)
            message = "The process that tries results ended while it worked on this."
            raise UnavailableError(message, code="predictor_died", remedy="Try again.") from error


class _Child:
    """One process for one result, started by its first exchange and after each end.

    A context that counts its users; the last one to leave has it ended after `predict_idle_s`.
    """

    def __init__(self, command: list[str], settings: Settings) -> None:
        self._command = [*command, "--max-pixels", str(settings.max_image_pixels)]
        self._cwd = settings.logs_dir
        self._idle_s = settings.predict_idle_s
        self._lock = asyncio.Lock()
        self._process: Process | None = None
        self._ending: asyncio.Task[None] | None = None
        self.users = 0

    def __enter__(self) -> None:
        self.users += 1
        if self._ending is not None:
            self._ending.cancel()
            self._ending = None

    def __exit__(self, *_: object) -> None:
        self.users -= 1
        if not self.users:
            self._ending = asyncio.create_task(self._end_later())

    async def exchange(self, images: Sequence[bytes], top: int, timeout_s: float) -> dict[str, Any]:
        """Send a request, return the answer. However it fails, the process is gone then."""
        async with self._lock:
            try:
                async with asyncio.timeout(timeout_s):
                    process = self._process or await self._start()
                    return await _exchange(process, images, top, math.ceil(timeout_s))
            except BaseException:
                await self._kill()
                raise

    async def end(self) -> None:
        """End the process, which nobody uses."""
        if self._ending is not None:
            self._ending.cancel()
            with suppress(asyncio.CancelledError):
                await self._ending
            self._ending = None
        await self._kill()

    async def _end_later(self) -> None:
        await asyncio.sleep(self._idle_s)
        await self._kill()

    async def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            await asyncio.shield(process.wait())

    async def _start(self) -> Process:
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=PIPE, stdout=PIPE, cwd=self._cwd, env=_lean_env(), limit=MAX_ANSWER_BYTES
        )
        return self._process


async def _exchange(process: Process, images: Sequence[bytes], top: int, seconds: int) -> dict[str, Any]:
    assert process.stdin is not None and process.stdout is not None
    asked = {"sizes": [len(image) for image in images], "top": top, "seconds": seconds}
    process.stdin.write(json.dumps(asked).encode() + b"\n")
    for image in images:
        process.stdin.write(image)
        await process.stdin.drain()
    told: dict[str, Any] = json.loads(await process.stdout.readuntil(b"\n"))
    return told


def _judged(told: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The classes of all images, or what is wrong with some of them."""
    if "error" in told:
        error = from_dict(told["error"])
        raise ConflictError(f"The result of this job cannot be used. {error.message}", code="bad_result")
    bad = [(number, image["error"]) for number, image in enumerate(told["images"]) if "error" in image]
    for number, error in bad:
        if error["code"] == TOO_LARGE:
            remedy = "Send a smaller image, or raise D2FT_MAX_IMAGE_PIXELS."
            raise TooLargeError(f"Image {number}: {error['message']}", code=TOO_LARGE, param="images", remedy=remedy)
    if bad:
        raise InvalidRequestError(
            [Issue(f"images.{number}", f"Image {number}: {error['message']}", error["code"]) for number, error in bad]
        )
    return [image["top"] for image in told["images"]]


def _lean_env() -> dict[str, str]:
    return {**bare_env(), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
