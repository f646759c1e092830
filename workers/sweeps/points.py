"""Children as points: what each has reached and cost beside full fine-tuning, the fronts, the knee, the table.

    accuracy  on the test images, at the end
    compute   GFLOP of all training steps together \\
    bytes     sent by all workers together          | as fractions of the full baseline's
    seconds   of training                          /

Without baselines they are fractions of the largest of the sweep. The front of each is of the points that no other beats
in both accuracy and that cost; "the" knee is that of compute.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from workers.progress import aligned
from workers.sweeps.children import FULL, STOPPED, SUCCEEDED, Child
from workers.sweeps.contract import words
from workers.sweeps.front import knee, pareto

COSTS = {"compute": "gflop", "bytes": "mb", "seconds": "seconds"}  # a point's cost, and the figure behind it
BASELINE_WORDS = {FULL: "full fine-tuning", "stopped": "full fine-tuning, stopped at the knee's compute"}
HEADER = ("", "setting", "accuracy", "compute", "bytes", "seconds", "")


@dataclass(frozen=True)
class Point:
    """A child, and its costs as fractions of what `Points.of` says; None where it has no result."""

    key: str
    setting: Mapping[str, Any]
    baseline: str | None
    job_id: str | None
    status: str
    accuracy: float | None
    compute: float | None
    bytes: float | None
    seconds: float | None
    figures: Mapping[str, float | None] | None
    error: Mapping[str, Any] | None

    @property
    def label(self) -> str:
        """What it is, for people."""
        return BASELINE_WORDS[self.baseline] if self.baseline else words(self.setting)


@dataclass(frozen=True)
class Points:
    """All points of a sweep; `of` says whether costs are fractions of the "full" baseline or of the "largest" point."""

    points: Sequence[Point]
    of: str
    fronts: Mapping[str, Sequence[str]]
    knee: str | None

    def to_dict(self) -> dict[str, Any]:
        points = [asdict(point) for point in self.points]
        return {"points": points, "of": self.of, "fronts": dict(self.fronts), "knee": self.knee}

    def table(self) -> list[str]:
        """As text: a star for each point on the front of accuracy against compute, and the knee named."""
        rows = [HEADER, *(self._row(point) for point in self.points)]
        width = max(len(row[1]) for row in rows)
        told = aligned([(row[0], row[1].ljust(width), *row[2:-1]) for row in rows])
        costs = "full fine-tuning" if self.of == FULL else "the largest of the sweep"
        lines = [f"{line}  {row[-1]}".rstrip() for line, row in zip(told, rows, strict=True)]
        return [*lines, f"* on the front of accuracy against compute; costs are fractions of {costs}"]

    def _row(self, point: Point) -> tuple[str, ...]:
        figures = (_figure(getattr(point, name)) for name in ("accuracy", *COSTS))
        mark = "" if point.key not in self.fronts["compute"] else "* the knee" if point.key == self.knee else "*"
        if point.status != SUCCEEDED:
            said = (point.error or {}).get("message")
            mark = f"{point.status}: {said}" if said else point.status
        return (point.key, point.label, *figures, mark)


def points_of(children: Iterable[Child]) -> Points:
    """The points behind children that are over."""
    children = list(children)
    ended = [child for child in children if child.status == SUCCEEDED and child.figures]
    full = next((child for child in ended if child.baseline == FULL), None)
    of = {figure: _largest(ended if full is None else [full], figure) for figure in COSTS.values()}
    points = [_point(child, of) for child in children]
    fronts = {cost: _front(points, cost) for cost in COSTS}
    by_key = {point.key: point for point in points}
    turns = {key: (by_key[key].compute or 0.0, by_key[key].accuracy or 0.0) for key in fronts["compute"]}
    return Points(points, FULL if full else "largest", fronts, knee(turns))


def share_of_knee(points: Points) -> float:
    """At which share of full fine-tuning's compute its shorter run ends: the knee's, that of the trials alone if it is
    no trial."""
    trials = [point for point in points.points if point.baseline is None]
    if found := next((point.compute for point in trials if point.key == points.knee), None):
        return min(1.0, found)
    front = [point for point in trials if point.key in _front(trials, "compute")]
    key = knee({point.key: (point.compute or 0.0, point.accuracy or 0.0) for point in front})
    return min(1.0, next((point.compute or 1.0 for point in front if point.key == key), 1.0))


def settled(heard: Iterable[Child], known: Iterable[Child]) -> list[Child]:
    """The trials of a search that is over: as Ray Tune has last `heard` of them, and as they are `known` to be by now.

    One that Tune saw no end of was stopped early, unless it came to its end all the same. One that Tune has forgotten,
    with a driver that died, is as it is.
    """
    now = {child.key: child for child in known if child.baseline is None}
    ended = []
    for child in heard:
        found = now.pop(child.key, child)
        if not child.is_over and found.status != SUCCEEDED:
            child = Child(child.key, child.setting, None, found.job_id, STOPPED, child.step, child.total_steps)
        ended.append(child if child.is_over else found)
    return [*ended, *now.values()]


def _point(child: Child, of: Mapping[str, float | None]) -> Point:
    figures = child.figures if child.status == SUCCEEDED else None
    shares = {cost: _share((figures or {}).get(figure), of[figure]) for cost, figure in COSTS.items()}
    return Point(
        child.key, child.setting, child.baseline, child.job_id, child.status, (figures or {}).get("accuracy"),
        shares["compute"], shares["bytes"], shares["seconds"], figures, child.error,
    )  # fmt: skip


def _largest(children: Sequence[Child], figure: str) -> float | None:
    found = [value for child in children if (value := (child.figures or {}).get(figure)) is not None]
    return max(found, default=None)


def _share(value: float | None, of: float | None) -> float | None:
    return None if value is None or not of else value / of


def _front(points: Sequence[Point], cost: str) -> list[str]:
    pairs: dict[str, tuple[float, float]] = {
        point.key: (point.accuracy, spent)
        for point in points
        if point.accuracy is not None and (spent := getattr(point, cost)) is not None
    }
    return pareto(pairs, (True, False))


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
