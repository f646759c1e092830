"""The ledger of a run: what compute and traffic it took, predicted beside measured, never mixed.

Predicted comes from the plans' forecasts, measured from what the executors ran and the transports sent. Fractions are
against an all-FULL step under the same placement: predicted against its forecast, measured against the all-FULL steps
that the run rehearsed before training, and again after heads have moved.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from scheduler.domain import Placement, Plan


@dataclass
class Measured:
    """Sums over steps; FLOPs and bytes over all workers, idle share the mean of the workers'."""

    steps: int = 0
    flops: float = 0.0
    sent_bytes: float = 0.0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    idle_share: float = 0.0

    def add(self, other: Measured) -> None:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)

    def of_steps(self, steps: int) -> Measured:
        """What so many steps of this kind would take."""
        return Measured(steps, *(self.per_step(name) * steps for name in list(asdict(self))[1:]))

    def per_step(self, name: str) -> float:
        return float(getattr(self, name)) / self.steps if self.steps else 0.0


@dataclass(frozen=True)
class Row:
    """One line: predicted and measured, and the same quantity of an all-FULL step, measured (None: not applicable).

    `unit` is "fraction", "s", "MB" or "GFLOP".
    """

    name: str
    unit: str
    predicted: float | None
    measured: float | None
    all_full: float | None


@dataclass
class Predicted:
    """Sums over steps of what was forecast: of their own op tables, and of all-FULL steps in their place."""

    steps: int = 0
    flops: int = 0
    sent_bytes: int = 0
    full_flops: int = 0
    full_bytes: int = 0
    step_s: float = 0.0
    busy_s: float = 0.0
    idle_share: float = 0.0

    def per_step(self, name: str) -> float | None:
        return float(getattr(self, name)) / self.steps if self.steps else None


@dataclass(frozen=True)
class WindowSeen:
    """A window's steps as measured, beside their forecast; `busy` has each worker's median seconds of a step."""

    window: int
    steps: int
    step_seconds_median: float
    forecast_seconds: float
    busy: list[float]

    @property
    def error(self) -> float:
        """By what fraction steps took longer than forecast."""
        return self.step_seconds_median / self.forecast_seconds - 1 if self.forecast_seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "error": self.error}


@dataclass
class Ledger:
    """Collects a run; `to_dict` is what users see.

    `rehearsal` has one all-FULL step for every training step, measured under that step's placement. `windows` begin
    with the rehearsal, `migrations` are {heads, bytes, seconds}. `peak_bytes` is the most memory that each worker's
    process held, `planned_bytes` what the plans said of it. `placements` are the kinds of placement in use
    (`kind_of`), in the order of their steps.
    """

    rehearsal: Measured = field(default_factory=Measured)
    training: Measured = field(default_factory=Measured)
    predicted: Predicted = field(default_factory=Predicted)
    windows: list[WindowSeen] = field(default_factory=list)
    migrations: list[dict[str, Any]] = field(default_factory=list)
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    phases: dict[str, float] = field(default_factory=dict)
    checkpoint: str | None = None
    planned_bytes: list[int] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)
    placements: list[str] = field(default_factory=list)

    def planned(self, plan: Plan, flops: int, sent_bytes: int) -> None:
        """A step ran under `plan`: FLOPs and bytes of its own op table, times as the mean over the plan's cycle."""
        told, step, full = self.predicted, plan.forecast, plan.all_full
        told.steps += 1
        told.flops += flops
        told.sent_bytes += sent_bytes
        told.full_flops += full.flops
        told.full_bytes += full.total_bytes
        told.step_s += step.step_us / 1e6
        told.busy_s += sum(step.busy_us) / 1e6
        told.idle_share += step.idle_share
        if (kind := kind_of(plan.placement)) not in self.placements[-1:]:
            self.placements.append(kind)
        before = self.planned_bytes if len(self.planned_bytes) == len(plan.memory_bytes) else plan.memory_bytes
        self.planned_bytes = [max(pair) for pair in zip(before, plan.memory_bytes, strict=True)]

    def rows(self) -> list[Row]:
        mine, full, told = self.training, self.rehearsal, self.predicted

        def row(name: str, unit: str, predicted: str, key: str, scale: float = 1.0) -> Row:
            before = told.per_step(predicted)
            return Row(name, unit, before and before * scale, mine.per_step(key) * scale, full.per_step(key) * scale)

        return [
            Row(
                "compute fraction",
                "fraction",
                _over(told.flops, told.full_flops),
                _over(mine.per_step("flops"), full.per_step("flops")),
                1.0,
            ),
            Row(
                "bytes fraction",
                "fraction",
                _over(told.sent_bytes, told.full_bytes),
                _over(mine.per_step("sent_bytes"), full.per_step("sent_bytes")),
                1.0,
            ),
            row("step seconds", "s", "step_s", "wall_s"),
            row("idle share", "fraction", "idle_share", "idle_share"),
            row("processor seconds per step", "s", "busy_s", "cpu_s"),
            row("traffic per step", "MB", "sent_bytes", "sent_bytes", 1e-6),
            row("compute per step", "GFLOP", "flops", "flops", 1e-9),
            self._forecast_row(),
            *self._memory_rows(),
        ]

    def _memory_rows(self) -> list[Row]:
        """Of the worker whose process held most."""
        if not self.peak_bytes:
            return []
        told = max(self.planned_bytes, default=None)
        return [Row("memory, fullest worker", "MB", told and told / 1e6, max(self.peak_bytes) / 1e6, None)]

    def _forecast_row(self) -> Row:
        """Median over the windows of how far off their forecasts were; of all-FULL steps, the rehearsal's."""
        trained = [abs(seen.error) for seen in self.windows if seen.window]
        rehearsed = [abs(seen.error) for seen in self.windows if not seen.window]
        return Row(
            "forecast error",
            "fraction",
            None,
            statistics.median(trained) if trained else None,
            rehearsed[0] if rehearsed else None,
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "rows": [asdict(row) for row in self.rows()],
            "accuracy": {"before": self.accuracy_before, "after": self.accuracy_after},
            "phases": self.phases,
            "steps": self.training.steps,
            "migrations": self.migrations,
            "placement": ", ".join(self.placements) or None,
            "memory": {"predicted_bytes": self.planned_bytes, "measured_bytes": self.peak_bytes},
            "checkpoint": self.checkpoint,
        }

    def sums(self) -> dict[str, Any]:
        """All that a run which goes on from here has to know, as JSON."""
        return asdict(self)

    @classmethod
    def from_sums(cls, sums: dict[str, Any]) -> Ledger:
        """The ledger behind `sums`."""
        told = {
            "rehearsal": Measured(**sums["rehearsal"]),
            "training": Measured(**sums["training"]),
            "predicted": Predicted(**sums["predicted"]),
            "windows": [WindowSeen(**seen) for seen in sums["windows"]],
        }
        return cls(**{**sums, **told})


def kind_of(placement: Placement) -> str:
    """Where blocks lie: "whole" each on one worker, "split" over the same ones, or "mixed"; "single" on one in all."""
    teams = {placement.holders(block) for block in range(len(placement.owner_LH))}
    if placement.num_workers == 1:
        return "single"
    if all(len(team) == 1 for team in teams):
        return "whole"
    return "split" if len(teams) == 1 else "mixed"


def _over(above: float, below: float) -> float | None:
    return above / below if below else None
