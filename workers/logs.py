"""What a process of a run prints, in a file of its own: `logs/rank0.log`, `logs/driver.log` in the run directory.

The file takes the place of descriptors 1 and 2, so that C libraries and the interpreter's own last words land in it as
well; Python's streams are flushed at every line. Records of `logging` get a time and a level.
"""

from __future__ import annotations

import ctypes
import io
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

LOGS_DIR = "logs"
FILE_MODE = 0o600  # what a library prints is not for others to read
FORMAT = "%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s: %(message)s"

Say = Callable[[str], None]


def log_path(run_dir: str | Path, who: str) -> Path:
    """Where the log of "driver" or "rank0" lies."""
    return Path(run_dir) / LOGS_DIR / f"{who}.log"


@contextmanager
def kept(path: Path) -> Iterator[Say]:
    """Append all that this process prints to a file, until the end of the block.

    What is yielded says a line on the stderr that was there before, and in the file. An exception that leaves the block
    is written to the file, too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as undo:
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, FILE_MODE)
        undo.callback(os.close, log)
        terminal = os.dup(2)
        undo.callback(os.close, terminal)
        for descriptor in (1, 2):
            _redirect(descriptor, log, undo)
        for stream in (sys.stdout, sys.stderr):
            _flush_by_line(stream, undo)
        _record(path, undo)

        def say(text: str) -> None:
            line = f"{text}\n".encode()
            os.write(log, line)
            os.write(terminal, line)

        try:
            yield say
        except BaseException:
            logging.getLogger(__name__).exception("this process ends with an error")
            raise


def _redirect(descriptor: int, log: int, undo: ExitStack) -> None:
    before = os.dup(descriptor)

    def back() -> None:
        _flush()
        os.dup2(before, descriptor)
        os.close(before)

    _flush()
    os.dup2(log, descriptor)
    undo.callback(back)


def _flush() -> None:
    """What is still in buffers belongs to where the descriptors point now; C's own buffers are the process's."""
    sys.stdout.flush()
    sys.stderr.flush()
    ctypes.CDLL(None).fflush(None)


def _flush_by_line(stream: object, undo: ExitStack) -> None:
    if isinstance(stream, io.TextIOWrapper):
        undo.callback(stream.reconfigure, line_buffering=stream.line_buffering)
        stream.reconfigure(line_buffering=True)


def _record(path: Path, undo: ExitStack) -> None:
    """Have `logging` write to the file, and no longer to the streams, as each record would be there twice."""
    root, streams = logging.getLogger(), (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(FORMAT, datefmt="%Y-%m-%dT%H:%M:%S"))
    handler.formatter.converter = time.gmtime  # type: ignore[union-attr]
    replaced = [other for other in root.handlers if getattr(other, "stream", None) in streams]

    def back(level: int = root.level) -> None:
        root.setLevel(level)
        root.removeHandler(handler)
        handler.close()
        for other in replaced:
            root.addHandler(other)

    undo.callback(back)
    for other in replaced:
        root.removeHandler(other)
    root.addHandler(handler)
    root.setLevel(logging.INFO)
