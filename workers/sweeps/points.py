"""Children as points: what each has reached and cost beside full fine-tuning, the fronts, the knee, the table.

    accuracy  on the test images, at the end
    compute   GFLOP of all training steps together \\
    bytes     sent by all workers together          | as fractions of the full baseline's
    seconds   of training                          /
    placement whole, split, mixed: how blocks lay on the workers; all points alike, if nobody asks for something else

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
from workers.sweeps.outcome import COSTS, Figures, front_of

BASELINE_WORDS = {FULL: "full fine-tuning", "stopped": "full fine-tuning, stopped at the knee's compute"}
HEADER = ("", "setting", "accuracy", "compute", "bytes", "seconds", "placed", "")


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
    placement: str | None
    figures: Figures | None
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
        if len({point.placement for point in self.points if point.placement}) > 1:
            lines.append("not all are placed alike: what they sent and how long they took differs by that, too")
        return [*lines, f"* on the front of accuracy against compute; costs are fractions of {costs}"]

    def _row(self, point: Point) -> tuple[str, ...]:
        figures = (_figure(getattr(point, name)) for name in ("accuracy", *COSTS))
        mark = "" if point.key not in self.fronts["compute"] else "* the knee" if point.key == self.knee else "*"
        if point.status != SUCCEEDED:
            said = (point.error or {}).get("message")
            mark = f"{point.status}: {said}" if said else point.status
        return (point.key, point.label, *figures, point.placement or "–", mark)


def points_of(children: Iterable[Child]) -> Points:
    """The points behind children that are over."""
    children = list(children)
    ended = [child for child in children if child.status == SUCCEEDED and child.figures]
    full = next((child.key for child in ended if child.baseline == FULL), "")
    found = front_of({child.key: child.figures for child in ended if child.figures}, full)
    points = [_point(child, found.points.get(child.key, {})) for child in children]
    # Where nothing was sent there is no share of it, and nothing to be on the front of.
    fronts = {
        cost: [key for key in found.fronts.get(cost, ()) if found.points[key][cost] is not None] for cost in COSTS
    }
    return Points(points, found.against, fronts, found.knee)


def share_of_knee(points: Points) -> float:
    """At which share of full fine-tuning's compute its shorter run ends: the knee's, that of the trials alone if it is
    no trial."""
    trials = [point for point in points.points if point.baseline is None]
    if found := next((point.compute for point in trials if point.key == points.knee), None):
        return min(1.0, found)
    key = front_of({point.key: point.figures for point in trials if point.figures}, "").knee
    return min(1.0, next((point.compute or 1.0 for point in trials if point.key == key), 1.0))


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


def _point(child: Child, reached: Mapping[str, float | None]) -> Point:
    figures = (child.figures if child.status == SUCCEEDED else None) or {}
    return Point(
        key=child.key,
        setting=child.setting,
        baseline=child.baseline,
        job_id=child.job_id,
        status=child.status,
        accuracy=reached.get("accuracy"),
        compute=reached.get("compute"),
        bytes=reached.get("bytes"),
        seconds=reached.get("seconds"),
        placement=figures.get("placement"),
        figures=figures or None,
        error=child.error,
    )


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
