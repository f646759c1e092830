"""The ledger of a run: what compute and traffic it took, predicted beside measured, never mixed.

Predicted comes from the plans' forecasts, measured from what the executors ran and the transports sent. Fractions are against an
all-FULL step under the same placement: predicted against its forecast, measured against the all-FULL steps that the run
rehearsed before training.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from scheduler.domain import Forecast, Plan


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

    def per_step(self, name: str) -> float:
        return float(getattr(self, name)) / self.steps if self.steps else 0.0


@dataclass(frozen=True)
class Row:
    """One line: predicted and measured, and the same quantity of an all-FULL step, measured (None: not applicable)."""

    name: str
    predicted: float | None
    measured: float | None
    all_full: float | None


@dataclass
class Ledger:
    """Collects a run; `to_dict` is what users see."""

    rehearsal: Measured = field(default_factory=Measured)
    training: Measured = field(default_factory=Measured)
    forecasts: list[tuple[Forecast, Forecast]] = field(default_factory=list)
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    phases: dict[str, float] = field(default_factory=dict)
    checkpoint: str | None = None

    def planned(self, plan: Plan, steps: int) -> None:
        """`steps` steps ran under `plan`."""
        self.forecasts += [(plan.forecast, plan.all_full)] * steps

    def rows(self) -> list[Row]:
        mine, full = self.training, self.rehearsal
        return [
            Row(
                "compute fraction",
                _ratio((f.flops for f, _ in self.forecasts), (a.flops for _, a in self.forecasts)),
                _over(mine.per_step("flops"), full.per_step("flops")),
                1.0,
            ),
            Row(
                "bytes fraction",
                _ratio((f.total_bytes for f, _ in self.forecasts), (a.total_bytes for _, a in self.forecasts)),
                _over(mine.per_step("sent_bytes"), full.per_step("sent_bytes")),
                1.0,
            ),
            Row("step seconds", _mean(f.step_us / 1e6 for f, _ in self.forecasts), mine.per_step("wall_s"), full.per_step("wall_s")),
            Row("idle share", _mean(f.idle_share for f, _ in self.forecasts), mine.per_step("idle_share"), full.per_step("idle_share")),
            Row("processor seconds per step", _mean(sum(f.busy_us) / 1e6 for f, _ in self.forecasts), mine.per_step("cpu_s"), full.per_step("cpu_s")),
            Row("bytes per step", _mean(float(f.total_bytes) for f, _ in self.forecasts), mine.per_step("sent_bytes"), full.per_step("sent_bytes")),
            Row("GFLOP per step", _mean(f.flops / 1e9 for f, _ in self.forecasts), mine.per_step("flops") / 1e9, full.per_step("flops") / 1e9),
        ]  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        return {
            "rows": [asdict(row) for row in self.rows()],
            "accuracy": {"before": self.accuracy_before, "after": self.accuracy_after},
            "phases": self.phases,
            "steps": self.training.steps,
            "checkpoint": self.checkpoint,
        }


def _ratio(above: Iterable[float], below: Iterable[float]) -> float | None:
    return _over(float(sum(above)), float(sum(below)))


def _over(above: float, below: float) -> float | None:
    return above / below if below else None


def _mean(values: Iterable[float]) -> float | None:
    items = list(values)
    return sum(items) / len(items) if items else None
