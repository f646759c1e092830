"""Checkpoints while training goes on: the workers stop for a copy of their tensors, threads write it.

A worker whose memory does not hold a copy stops until its thread has written the tensors themselves.

    rank 0 wishes (time or steps) ─ step's tally ─► all copy ─► each thread: rank003.safetensors, rank003.json ─┐
                                                     rank 0's thread: all receipts there? manifest, rename ◄────┘

The writers meet in the checkpoint's own folder and speak to nobody: a worker that has written leaves a receipt, one
that cannot says why. So no step waits for a disk, and a checkpoint that fails is a warning, not the end of the run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from scheduler.failpoints import passing
from workers.checkpoint import Group, Saved, Vault, drop_drafts, finish, write_part
from workers.contract import Checkpoints
from workers.disk import leave
from workers.manifest import File, Manifest, names, rank_file, read_manifest

WRITE_TIMEOUT_S = 300.0
POLL_S = 0.05
NICENESS = 10  # of a writer, beside the steps of the same machine
_LOG = logging.getLogger(__name__)
_WROTE, _FAILED = ".written", ".failed"


class Keeper:
    """Keeps an attempt's checkpoints; one on every worker. `emit` is heard of rank 0 alone, from its thread, too."""

    def __init__(
        self, vault: Vault, asked: Checkpoints, rank: int, size: int, emit: Callable[..., None],
        clock: Callable[[], float] = time.monotonic, fits: Callable[[int], bool] = lambda num_bytes: True,
    ) -> None:  # fmt: skip
        self._fits = fits
        self.vault, self.asked, self.rank, self.size, self.emit, self._clock = vault, asked, rank, size, emit, clock
        self._thread: threading.Thread | None = None
        self._given_up = threading.Event()
        self._last = clock()
        self.copy_s = 0.0  # that training waited for copies
        if rank == 0:
            drop_drafts(vault)

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is wanted behind so many steps; never while one is being written. Rank 0's to say."""
        if self._thread is not None and self._thread.is_alive():
            return False
        if self.asked.every_steps is not None and step % self.asked.every_steps == 0:
            return True
        return self.asked.every_s is not None and self._clock() - self._last >= self.asked.every_s

    def begin(self, manifest: Manifest, part: Mapping[str, Tensor], group: Group, plan: Any) -> None:
        """Copy what is to be written, and write it on a thread; between two steps, on every worker."""
        self.finish()
        began = self._clock()
        copied = self._fits(sum(tensor.nbytes for tensor in part.values()))
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in part.items()} if copied else part
        alike = {name: {key: t.detach().to("cpu", copy=True) for key, t in ts.items()} for name, ts in group.items()}
        writing = _Writing(self.vault, manifest, self.rank, self.size, self._given_up)
        self._thread = threading.Thread(
            target=self._write, args=(writing, copies, alike, plan), name="checkpoint", daemon=True
        )
        self._thread.start()
        if not copied:
            self._thread.join()
        self._last = self._clock()
        self.copy_s += self._last - began

    def finish(self) -> None:
        """Wait for what is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def give_up(self) -> None:
        """The run is over, whatever is being written: no waiting for workers that may be gone."""
        self._given_up.set()
        self.finish()

    def listed(self, saved: Saved, **more: Any) -> None:
        """Tell of a checkpoint that has its name; what it makes superfluous goes. Rank 0's to do, others pass by."""
        self._last = self._clock()
        if self.rank != 0:
            return
        with passing("checkpoint.listed"):
            self.emit("checkpoint.saved", f"checkpoint after step {saved.step}", **asdict(saved), **more)
        for name in surplus(self.vault.directory, self.asked.keep):
            shutil.rmtree(self.vault.directory / name, ignore_errors=True)
            self.emit("checkpoint.dropped", f"{name} made room", name=name)

    def _write(self, writing: _Writing, part: Mapping[str, Tensor], group: Group, plan: Any) -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        began = time.monotonic()
        try:
            saved = writing.run(part, group, plan)
        except Exception as error:
            _LOG.exception("checkpoint %s fails", writing.manifest.name)
            if self.rank == 0:
                step, why = writing.manifest.step, str(error)
                self.emit(
                    "checkpoint.failed", f"no checkpoint after step {step}: {why}", level="warning", step=step, why=why
                )
            return
        if saved is not None:
            self.listed(saved, seconds=round(time.monotonic() - began, 3))


@dataclass(frozen=True)
class _Writing:
    """One checkpoint as one worker's thread writes it."""

    vault: Vault
    manifest: Manifest
    rank: int
    size: int
    given_up: threading.Event

    def run(self, part: Mapping[str, Tensor], group: Group, plan: Any) -> Saved | None:
        """Write this worker's part; rank 0 completes the checkpoint and gives it back. Raises what goes wrong."""
        draft = self.vault.draft(self.manifest.name)
        try:
            draft.mkdir(parents=True, exist_ok=True)
            files = write_part(draft, self.rank, part, group, plan)
        except Exception as error:
            with contextlib.suppress(OSError):
                leave(draft / (rank_file(self.rank) + _FAILED), str(error))
            if self.rank == 0:
                shutil.rmtree(draft, ignore_errors=True)
            raise
        if self.rank != 0:
            leave(draft / (rank_file(self.rank) + _WROTE), json.dumps([asdict(file) for file in files]))
            return None
        try:
            for rank in range(1, self.size):
                files += self._receipt(draft, rank)
            return finish(draft, self.manifest, files)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise

    def _receipt(self, draft: Path, rank: int) -> list[File]:
        wrote, failed = (draft / (rank_file(rank) + end) for end in (_WROTE, _FAILED))
        self._await(lambda: wrote.exists() or failed.exists(), f"worker {rank} has not written")
        if failed.exists():
            raise OSError(f"worker {rank}: {failed.read_text()}")
        files = [File(**file) for file in json.loads(wrote.read_text())]
        wrote.unlink()
        return files

    def _await(self, done: Callable[[], bool], why: str) -> None:
        deadline = time.monotonic() + WRITE_TIMEOUT_S
        while not done():
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {WRITE_TIMEOUT_S:g} s {why}")
            if self.given_up.wait(POLL_S):
                raise TimeoutError(f"the run ended, and {why}")


def surplus(directory: Path, keep: int) -> list[str]:
    """Checkpoints that are neither among the newest nor the most accurate one; what cannot be read is left alone."""
    known: dict[str, float | None] = {}
    for name in names(directory):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            known[name] = read_manifest(directory / name)[0].accuracy
    kept = set(list(known)[:keep])
    measured = [name for name, accuracy in known.items() if accuracy is not None]
    if measured:
        kept.add(max(measured, key=lambda name: (known[name], name)))
    return [name for name in known if name not in kept]
