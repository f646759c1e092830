"""The planner's answer, and what it changes: said in the event that tells of a new plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scheduler.domain import DeviceProfile, Op, Plan


@dataclass(frozen=True)
class Planned:
    """The planner's answer: the plan, the profiles in rank order that it rests on, and why it is what it is.

    `told` is what the plan's event says besides: `heads` and `devices` with reasons, and the forecast's `gantt`.
    """

    plan: Plan
    profiles: list[DeviceProfile]
    change: dict[str, Any] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_answer(cls, answer: dict[str, Any]) -> Planned:
        """From the scheduler actor's answer, or from what a checkpoint says of the plan that it was trained under."""
        profiles = [DeviceProfile.from_dict(profile) for profile in answer["profiles"]]
        plan = Plan.from_dict(answer.get("plan") or answer)
        return cls(plan, profiles, answer.get("change") or {}, answer.get("told") or {})

    def shown(self) -> dict[str, Any]:
        """The data of the plan's event."""
        return {**self.plan.to_dict(), **self.told}


def changed(before: Plan, planned: Planned, migration: dict[str, Any] | None) -> dict[str, Any]:
    """What a new plan changes, for the event; the planner's own words where it has some."""
    told, plan = planned.change, planned.plan
    old, new = (
        {
            "version": p.version,
            "step_us": p.forecast.step_us,
            "heads": p.placement.heads_owned.tolist(),
            "full_heads": full_heads_of(p),
        }
        for p in (before, plan)
    )
    return {
        "migrated": migration is not None,
        "moved_heads": migration["heads"] if migration else 0,
        "migration": migration,
        "cause": told.get("cause") or "the planner does not say",
        "reason": told.get("reason") or "the planner does not say",
        # Of a move the planner has forecast the old placement under today's profiles: that is what the new one beats.
        "before": {**old, **(_known(told.get("before")) if migration else {})},
        "after": new,
    }


def full_heads_of(plan: Plan) -> list[float]:
    """FULL heads of each worker: the mean over micro-batches and the plan's cycle."""
    full_LH = np.mean([(ops_LHM == Op.FULL).mean(axis=2) for ops_LHM in plan.cycle], axis=0)
    counts = np.bincount(plan.placement.owner_LH.ravel(), full_LH.ravel(), plan.placement.num_workers)
    return counts.round(2).tolist()


def _known(figures: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (figures or {}).items() if value is not None}


def owners(plan: Plan) -> tuple[Any, int]:
    return plan.placement.owner_LH.tolist(), plan.placement.classifier


def look(plan: Plan) -> tuple[Any, ...]:
    """What makes a plan another one to its reader: who owns what, which heads train, how much; not which SKIPs fell."""
    trained_LH = np.any([(ops_LHM == Op.FULL).any(axis=2) for ops_LHM in plan.cycle], axis=0)
    fractions = round(plan.compute_fraction, 3), round(plan.bytes_fraction, 3)
    return owners(plan), trained_LH.tolist(), [round(n, 1) for n in full_heads_of(plan)], fractions
