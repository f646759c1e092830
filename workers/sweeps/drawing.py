"""The fronts of a sweep as one picture of three panels: accuracy against compute, bytes and seconds. No display.

Colours are Okabe and Ito's, which everybody tells apart; what matters has a shape of its own as well.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workers.sweeps.children import FULL
from workers.sweeps.outcome import COSTS
from workers.sweeps.points import Point, Points

FILES = ("front.svg", "front.png")
TRIAL, BEATEN, BASELINE, KNEE, LINE = "#0072B2", "#999999", "#D55E00", "#009E73", "#56B4E9"
TITLES = {"compute": "compute", "bytes": "bytes sent", "seconds": "seconds of training"}
DOTS_PER_INCH = 150
LABEL = 60  # characters of a setting that still have room; a longer one is called by its key


def draw(points: Points, directory: Path) -> list[Path]:
    """Write the picture in both forms; where they lie. Raises ImportError without matplotlib."""
    figure_of = importlib.import_module("matplotlib.figure").Figure  # loads no display; takes a second, so by name
    figure = figure_of(figsize=(13, 4.4), layout="constrained")
    of = "full fine-tuning" if points.of == FULL else "the largest"
    for axes, cost in zip(figure.subplots(1, len(COSTS), sharey=True), COSTS, strict=True):
        _panel(axes, points, cost)
        axes.set_xlabel(
            f"{TITLES[cost]}, as a fraction of {of}'s" if of != "the largest" else f"{TITLES[cost]}, of {of}"
        )
    figure.axes[0].set_ylabel("accuracy on test images")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    paths = [directory / name for name in FILES]
    for path in paths:
        figure.savefig(path, dpi=DOTS_PER_INCH)
    return paths


def _panel(axes: Any, points: Points, cost: str) -> None:
    shown = [point for point in points.points if point.accuracy is not None and getattr(point, cost) is not None]
    front = [point for point in shown if point.key in points.fronts[cost]]
    trials = [point for point in shown if point.baseline is None]

    def dots(chosen: Sequence[Point], label: str, **style: Any) -> None:
        axes.scatter([getattr(p, cost) for p in chosen], [p.accuracy for p in chosen], label=label, **style)

    line = sorted(front, key=lambda point: (getattr(point, cost), point.accuracy or 0.0))
    axes.plot([getattr(p, cost) for p in line], [p.accuracy for p in line], color=LINE, lw=1.5, label="front", zorder=1)
    dots([p for p in trials if p not in front], "trials", color=BEATEN, marker="o", s=36)
    dots([p for p in trials if p in front], "trials on the front", color=TRIAL, marker="o", s=44, zorder=2)
    dots([p for p in shown if p.baseline == FULL], "full fine-tuning", color=BASELINE, marker="s", s=64, zorder=3)
    stopped = [p for p in shown if p.baseline and p.baseline != FULL]
    dots(stopped, "full fine-tuning, stopped", color=BASELINE, marker="X", s=70, zorder=3)
    knee = [p for p in shown if p.key == points.knee]
    dots(knee, "knee", facecolors="none", edgecolors=KNEE, marker="o", s=190, linewidths=2.2, zorder=4)
    costs = [getattr(p, cost) for p in shown]
    for point in knee:
        spent = getattr(point, cost)
        on_the_right = spent > (min(costs) + max(costs)) / 2
        axes.annotate(
            point.label if len(point.label) <= LABEL else point.key, (spent, point.accuracy),
            (-8 if on_the_right else 8, -18), textcoords="offset points", color=KNEE, fontsize=8,
            ha="right" if on_the_right else "left",
        )  # fmt: skip
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(0.12)
