"""ASHA as Ray Tune has it, with a memory that outlives the driver.

Tune writes down its trials, its search and its callbacks, not its scheduler: after a lost driver the rungs would be
empty, and a poor trial would be compared with nobody. So what the rungs hold goes with a callback's state (`tuning`).
"""

from __future__ import annotations

from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, TrialScheduler


class Halving(ASHAScheduler):
    """Says what it has seen, and takes it back."""

    def __init__(self, **words: Any) -> None:
        super().__init__(**words)
        self._poor: set[str] = set()

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """A trial that was to be stopped when the driver died stands on that rung already, and stops now."""
        if trial.trial_id in self._poor:
            return TrialScheduler.STOP
        action = super().on_trial_result(tune_controller, trial, result)
        if action == TrialScheduler.STOP:
            self._poor.add(trial.trial_id)
        return action

    def seen(self) -> dict[str, Any]:
        """{rungs: {steps: {trial: worth}}, poor: trials that it has stopped}."""
        rungs = {steps: dict(worths) for steps, worths in self._brackets[0]._rungs if worths}
        return {"rungs": rungs, "poor": sorted(self._poor)}

    def remember(self, seen: dict[str, Any]) -> None:
        """Take back what `seen` has said, before any trial is added."""
        for steps, worths in self._brackets[0]._rungs:
            worths.update(seen["rungs"].get(steps, {}))
        self._poor.update(seen["poor"])
