"""TensorBoard event files, by TensorBoard's own writer: no torch and no TensorFlow. Shown by `tensorboard --logdir`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event as Record
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from workers.tracking import Event, Scalars


class Summaries:
    """Writes the scalars of steps and evaluations into a directory, with the times at which they were measured."""

    def __init__(self, directory: Path) -> None:
        self._writer = EventFileWriter(str(directory))
        self._scalars = Scalars()

    def take(self, events: Sequence[Event]) -> None:
        for event in events:
            for name, value, step, at in self._scalars.of(event):
                summary = Summary(value=[Summary.Value(tag=name, simple_value=value)])
                self._writer.add_event(Record(wall_time=at, step=step, summary=summary))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
