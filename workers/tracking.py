"""What other tools are told of a run while it goes on: threads in the driver read the event file and pass it on.

    events.jsonl ──► TensorBoard   <run_dir>/tensorboard/, where its package is installed    (`summaries`)
                 ├─► MLflow        the server of MLFLOW_TRACKING_URI, where that is set       (`mlflow_runs`)
                 └─► terminal      where no service shows the run                             (`progress`)

No step waits for this, and nothing that goes wrong here ends a run: what cannot be passed on is said once in the
driver's log and tried again, a last time when the run has ended. A run that is cut off has a moment for it, too.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from workers.contract import RunContext
from workers.events import EVENTS_FILE, read_events
from workers.progress import PERIOD_S as LINE_S
from workers.progress import Progress

PERIOD_S = 5.0
CLOSE_S = 15.0
CUT_S = 3.0  # of a run that is cut off; a cancel is to have given all back within ten
MAX_EVENTS = 1000  # handed over at once
TENSORBOARD_DIR = "tensorboard"
MLFLOW_URI = "MLFLOW_TRACKING_URI"
# What a step's metrics are called elsewhere, and what its evaluations.
STEP_NAMES = {
    "loss": "train/loss",
    "train_accuracy": "train/accuracy",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "step_seconds": "step/seconds",
    "idle_share": "step/idle_share",
    "compute_fraction": "step/compute_fraction",
    "bytes_fraction": "step/bytes_fraction",
}
TEST_NAMES = {"accuracy": "test/accuracy", "loss": "test/loss"}
Event = dict[str, Any]
_LOG = logging.getLogger(__name__)


class Tracker(Protocol):
    """Takes over events, in their order; some may come again after a failure."""

    def take(self, events: Sequence[Event]) -> None:
        """Pass these on, or raise."""

    def close(self) -> None:
        """No more will come."""


class Scalars:
    """Turns events into (name, value, step, Unix seconds); an evaluation counts for the step before it."""

    def __init__(self) -> None:
        self._step = 0

    def of(self, event: Event) -> list[tuple[str, float, int, float]]:
        data, names = event["data"], {"metrics": STEP_NAMES, "evaluation": TEST_NAMES}.get(event["type"], {})
        if event["type"] == "metrics":
            self._step = int(data["step"])
        found = [(name, data.get(key)) for key, name in names.items()]
        return [(name, float(value), self._step, event["at"]) for name, value in found if value is not None]


class Trackers:
    """The threads that follow one run."""

    def __init__(self, threads: Sequence[_Thread]) -> None:
        self._threads = threads

    def close(self, within_s: float) -> None:
        """Have them pass on what is left, and wait for that as long as is given."""
        deadline = time.monotonic() + within_s
        for thread in self._threads:
            thread.closing.set()
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def cut_off(self, status: str, within_s: float = CUT_S) -> None:
        """The process ends at once, with this as the outcome where the run has not told one; for a signal's handler.

        A thread of its own does it, since the one that the handler has interrupted may hold a lock.
        """
        for thread in self._threads:
            thread.status = status
        if self._threads:
            closing = threading.Thread(target=self.close, args=(within_s,), daemon=True)
            closing.start()
            closing.join(within_s)


@contextmanager
def tracked(
    context: RunContext,
    say: Callable[[str], None] | None = None,
    *,
    period_s: float = PERIOD_S,
    close_s: float = CLOSE_S,
) -> Iterator[Trackers]:
    """Pass on the run's events during the block, and what is left in the `close_s` behind it; never raises itself.

    To a terminal, too, where somebody gives `say` to print a line there.
    """
    path = Path(context.run_dir) / EVENTS_FILE
    threads = [_Thread(path, name, make, period_s) for name, make in _wanted(context)]
    if say is not None:
        threads.append(_Thread(path, "terminal", lambda: Progress(say), LINE_S))
    trackers = Trackers(threads)
    try:
        yield trackers
    finally:
        trackers.close(close_s)


def _wanted(context: RunContext) -> Iterator[tuple[str, Callable[[], Tracker]]]:
    # Modules by name, when they are needed: their packages may not be installed, and take a while to load.
    if context.spec.export.tensorboard and importlib.util.find_spec("tensorboard") is not None:
        directory = Path(context.run_dir) / TENSORBOARD_DIR
        yield "TensorBoard", lambda: importlib.import_module("workers.summaries").Summaries(directory)
    if os.environ.get(MLFLOW_URI):
        yield "MLflow", lambda: importlib.import_module("workers.mlflow_runs").MlflowRun(context)


class _Thread(threading.Thread):
    """Follows the file for one tracker, which it makes with the first events."""

    def __init__(self, path: Path, name: str, make: Callable[[], Tracker], period_s: float) -> None:
        super().__init__(name=f"tracking {name}", daemon=True)
        self.closing = threading.Event()
        self._path, self._make, self._period_s = path, make, period_s
        self.status: str | None = None  # the outcome of a run that is cut off
        self._tracker: Tracker | None = None
        self._told = False  # whether the run has said its outcome itself
        self._offset = 0
        self._warned = False
        self.start()

    def run(self) -> None:
        closing = False
        while not closing:
            closing = self.closing.wait(self._period_s)  # before the file: what was written before it is set is read
            try:
                self._pass_on()
                if closing and self._tracker is not None:
                    if self.status is not None and not self._told:
                        self._tracker.take([{"type": "outcome", "at": time.time(), "data": {"status": self.status}}])
                    self._tracker.close()
            except Exception as error:
                self._failed(error)

    def _pass_on(self) -> None:
        while batch := self._batch():
            self._tracker = self._tracker or self._make()
            self._tracker.take([event for _, event in batch])
            self._offset = batch[-1][0]
            self._told = self._told or any(event["type"] == "outcome" for _, event in batch)

    def _batch(self) -> list[tuple[int, Event]]:
        found: list[tuple[int, Event]] = []
        for behind, event in read_events(self._path, self._offset):
            found.append((behind, event))
            if len(found) == MAX_EVENTS:
                break
        return found

    def _failed(self, error: Exception) -> None:
        if not self._warned:
            _LOG.warning("%s; the run goes on without it, and it is tried again: %s", self.name, error)
        self._warned = True
