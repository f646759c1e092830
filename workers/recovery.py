"""Whether an attempt goes on when it has lost a group of workers, and why not. No Ray, no torch.

| the group ended by | |
|---|---|
| a fault of the user's, too little room, a loss that is no number, a checkpoint of another job | the end |
| any other fault | a new group goes on from the newest checkpoint, `max_losses` times |
| the same three times in a row, no step further | the end: "poisoned" |
| a wish for another size, a machine that is switched off | no fault, and not counted |
"""

from __future__ import annotations

from pathlib import Path

from scheduler.errors import D2ftError, SystemFault
from workers.events import EVENTS_FILE, read_events

FINAL_CODES = frozenset({"not_finite", "checkpoint_mismatch", "cluster_too_small", "out_of_memory"})
POISONED_AFTER = 3


class Losses:
    """Counts the groups that an attempt has lost."""

    def __init__(self, allowed: int) -> None:
        self.allowed, self.count = allowed, 0
        self._furthest, self._in_vain = -1, 0

    def end(self, error: D2ftError, step: int) -> D2ftError | None:
        """Count a group that ended with `error` after the attempt's step `step`; what ends the attempt, or None."""
        if error.fault == "user" or error.code in FINAL_CODES:
            return error
        self.count += 1
        self._in_vain = self._in_vain + 1 if step <= self._furthest else 1
        self._furthest = max(step, self._furthest)
        if self._in_vain >= POISONED_AFTER:
            return SystemFault(
                f"{self._in_vain} groups of workers in a row came no further than step {step}; the last ended with: "
                f"{error.message}",
                code="poisoned",
                remedy="Look into the logs of the ranks: what stops them there will stop them again.",
            )
        if self.count > self.allowed:
            lost = f"{self.count} groups of workers were lost, of {self.allowed} that may be"
            return SystemFault(f"{lost}; the last ended with: {error.message}", code=error.code, remedy=error.remedy)
        return None


def last_step(run_dir: str | Path) -> int:
    """The furthest step that the run's events tell of; 0 before the first."""
    steps = (
        event["data"].get("step")
        for _, event in read_events(Path(run_dir) / EVENTS_FILE, 0)
        if event.get("type") == "metrics"
    )
    return max((step for step in steps if isinstance(step, int)), default=0)
