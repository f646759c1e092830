"""What a sweep knows of its children, the jobs behind its points, and how it follows one to its end. No torch, no Ray.

Two kinds of them do the same (`hosted`, `direct`). To start a child is idempotent by its key: whoever asks for a key
again, after a lost driver or a lost answer, gets the same child, whatever became of it. So every setting is run once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from workers.contract import JobSpec
from workers.sweeps.outcome import Figures

SUCCEEDED, FAILED, CANCELLED, STOPPED = "succeeded", "failed", "cancelled", "stopped"
OVER = frozenset({SUCCEEDED, FAILED, CANCELLED, STOPPED})
FULL, SHORT = "full", "stopped"  # the keys of the two baselines, and their kinds


@dataclass(frozen=True)
class Child:
    """A child as it was when last looked at.

    `accuracy` is the newest on test images, `loss` the newest of training. `figures` are there once the job has its
    ledger: accuracy, gflop and mb of all steps together, seconds of training, steps. `error` is {code, message}.
    `status` is the job's, or `stopped` where the sweep has ended it early.
    """

    key: str
    setting: Mapping[str, Any] = field(default_factory=dict)
    baseline: str | None = None
    job_id: str | None = None
    status: str = "queued"
    step: int | None = None
    total_steps: int | None = None
    accuracy: float | None = None
    loss: float | None = None
    figures: Figures | None = None
    error: Mapping[str, Any] | None = None

    @property
    def is_over(self) -> bool:
        return self.status in OVER

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Child:
        """The child behind what the service answers; what it says beside that is passed over."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in data.items() if name in known})


class Children(Protocol):
    """Where children run."""

    def start(self, key: str, setting: Mapping[str, Any], spec: JobSpec, baseline: str | None = None) -> Child:
        """The child of this key, made if there is none. Raises UserError where there can be none."""

    def look(self, key: str) -> Child:
        """How it is now."""

    def cancel(self, key: str) -> None:
        """End it, and keep nothing of it; harmless where it is over or has never begun."""

    def all(self) -> Sequence[Child]:
        """All of this sweep, oldest first."""


def follow(
    children: Children, child: Child, poll_s: float, seen: Callable[[Child], None] = lambda child: None
) -> Child:
    """Look at a child until it is over, and have each change `seen`, the last one too; how it ended."""
    last = None
    while True:
        if child != last:
            seen(child)
            last = child
        if child.is_over:
            return child
        time.sleep(poll_s)
        child = children.look(child.key)
