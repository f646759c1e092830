"""The model catalogue: which timm models can be trained, without importing timm or torch here.

A child process (`python -m workers.catalog`) writes it to `models.json` at first start; a submit waits for it. It is
made anew when timm's version, or the file's format, has changed. Where timm is not installed, as in the image of the
API, `D2FT_CATALOGUE_FILE` names one that was made beside the workers' timm; it is taken as it is.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import logging
import sys
from pathlib import Path
from typing import Any

from service.errors import UnavailableError
from service.processes import child_env
from service.settings import Settings
from workers.shapes import Entry, read_entry

log = logging.getLogger(__name__)
FORMAT = 4  # of the file, as workers.catalog writes it
Models = dict[str, Entry | str]  # name → its sizes, or why it cannot be trained


class Catalogue:
    """Makes the file when it is missing, and reads it once."""

    def __init__(self, settings: Settings, command: list[str] | None = None) -> None:
        self._file = settings.models_file
        self._given = settings.catalogue_file is not None
        self._log_file = settings.logs_dir / "catalogue.log"
        self._wait_s = settings.catalogue_wait_s
        self._command = command or [sys.executable, "-m", "workers.catalog", "--out", str(self._file)]
        self._models: Models | None = None
        self._making: asyncio.Task[Models] | None = None

    def start(self) -> None:
        """Begin to read or make the file, in the background; a failed making is begun again at the next call."""
        if self._models is None and (self._making is None or self._making.done()):
            self._making = asyncio.create_task(self._make())
            self._making.add_done_callback(_log_failure)

    async def models(self) -> Models:
        """The catalogue. Raises UnavailableError while it is being made, and when making it failed."""
        if self._models is not None:
            return self._models
        self.start()
        assert self._making is not None
        try:
            async with asyncio.timeout(self._wait_s):
                self._models = await asyncio.shield(self._making)
        except TimeoutError:
            message = "The model catalogue is still being made."
            raise UnavailableError(
                message, code="catalogue_not_ready", param="model", remedy="Try again soon."
            ) from None
        return self._models

    async def close(self) -> None:
        if self._making is not None and not self._making.done():
            self._making.cancel()
            await asyncio.gather(self._making, return_exceptions=True)

    async def _make(self) -> Models:
        found = await asyncio.to_thread(_read, self._file, any_timm=self._given)
        if found is None and self._given:
            message = f"The model catalogue {self._file} is missing, torn or of another format."
            remedy = f"Make it by this version (format {FORMAT}): python -m workers.catalog --out FILE."
            raise UnavailableError(message, code="catalogue_failed", param="model", remedy=remedy)
        if found is None:
            await self._run_child()
            found = await asyncio.to_thread(_read, self._file)
        if found is None:
            raise self._failed("it wrote no readable file")
        return found

    async def _run_child(self) -> None:
        with self._log_file.open("ab") as output:
            child = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self._file.parent,
                env=child_env(),
            )
        try:
            code = await child.wait()
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()
        if code:
            raise self._failed(f"it exited with {code}")

    def _failed(self, why: str) -> UnavailableError:
        message = f"The model catalogue could not be made: {why}."
        return UnavailableError(message, code="catalogue_failed", param="model", remedy=f"See {self._log_file}.")


def _read(path: Path, *, any_timm: bool = False) -> Models | None:
    """The file's models, or None where it is missing, torn, of another format, or of another timm."""
    try:
        content = json.loads(path.read_text())
        timm = content["timm"] if any_timm else importlib.metadata.version("timm")
        if (content["format"], content["timm"]) != (FORMAT, timm):
            return None
        models: dict[str, Any] = content["models"]
        return {name: entry if isinstance(entry, str) else read_entry(entry) for name, entry in models.items()}
    except (OSError, ValueError, LookupError, TypeError, importlib.metadata.PackageNotFoundError):
        return None


def _log_failure(making: asyncio.Task[Models]) -> None:
    if not making.cancelled() and making.exception() is not None:
        log.warning("%s", making.exception())
