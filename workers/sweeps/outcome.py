"""What the trials of a sweep came to: figures, points, fronts and the knee, as pure functions over values.

The service asks while a sweep goes on, its driver at the end.

A point's cost is a share of what plain full fine-tuning took; where that is not known, of the most that any trial took.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from workers.sweeps.front import knee, pareto

Figures = Mapping[str, Any]  # accuracy, gflop, mb, seconds, steps, and if known placement
COSTS = {"compute": "gflop", "bytes": "mb", "seconds": "seconds"}  # a point's cost, and the figure behind it
_PER_STEP = {"gflop": "compute per step", "mb": "traffic per step"}


@dataclass(frozen=True)
class Front:
    """The points of a sweep by key, {accuracy, compute, bytes, seconds}, and those that nothing beats.

    `fronts` has keys by the cost that accuracy is set against; `against` is "full" or "largest", what costs are shares
    of. `knee` is where the front over compute turns.
    """

    points: dict[str, dict[str, float | None]] = field(default_factory=dict)
    fronts: dict[str, list[str]] = field(default_factory=dict)
    knee: str | None = None
    against: str = "largest"


def figures_of(ledger: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a run cost in all and how well its model does; None where its ledger does not say."""
    measured = {row.get("name"): row.get("measured") for row in _items(ledger.get("rows")) if isinstance(row, dict)}
    accuracy, phases = ledger.get("accuracy"), ledger.get("phases")
    found = {
        "accuracy": accuracy.get("after") if isinstance(accuracy, dict) else None,
        "seconds": phases.get("train") if isinstance(phases, dict) else None,
        "steps": ledger.get("steps"),
    }
    per_step = {name: measured.get(row) for name, row in _PER_STEP.items()}
    if not all(map(_is_number, (*found.values(), *per_step.values()))):
        return None
    sums = {name: value * found["steps"] for name, value in per_step.items()}  # type: ignore[operator]
    placement = ledger.get("placement")
    return {**found, **sums, **({"placement": placement} if placement else {})}


def front_of(trials: Mapping[str, Figures], full: str) -> Front:
    """The points of trials that have figures; `full` is the key of plain full fine-tuning, which may lack them."""
    if not trials:
        return Front()
    whole_of = [trials[full]] if full in trials else list(trials.values())
    whole = {cost: max(each[name] for each in whole_of) for cost, name in COSTS.items()}
    points: dict[str, dict[str, float | None]] = {
        key: {
            "accuracy": each["accuracy"],
            **{cost: each[name] / whole[cost] if whole[cost] else None for cost, name in COSTS.items()},
        }
        for key, each in trials.items()
    }
    costs = {
        cost: {key: (each[name], each["accuracy"]) for key, each in trials.items()} for cost, name in COSTS.items()
    }
    fronts = {cost: pareto(of, rising=(False, True)) for cost, of in costs.items()}
    turn = knee({key: costs["compute"][key] for key in fronts["compute"]})
    return Front(points, fronts, turn, "full" if full in trials else "largest")


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
