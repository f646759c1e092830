"""Optuna's search as Ray Tune calls it, told what it can use: a proposal that was stopped or failed has no worth."""

from __future__ import annotations

from typing import Any

from ray.tune.search.optuna import OptunaSearch


class Proposals(OptunaSearch):
    """Goes by what children have reached at their end; of one objective it hears on the way, too."""

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if isinstance(self.metric, str) and self.metric in result:
            super().on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Without a result: pruned, or failed where `error` says so."""
        status = ((result or {}).get("child/status")) or ((result or {}).get("child") or {}).get("status")
        super().on_trial_complete(trial_id, result if status == "succeeded" else None, error or status == "failed")
