"""What a run without a service prints while it goes on: a line a second, and the ledger at its end. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

PERIOD_S = 1.0
_FEW = {"artifact.ready": "result", "checkpoint.saved": "checkpoint"}


class Progress:
    """Takes a run's events (`tracking.Tracker`) and says of each batch what people follow: of its steps the newest."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def take(self, events: Sequence[Mapping[str, Any]]) -> None:
        newest = max((index for index, event in enumerate(events) if event["type"] == "metrics"), default=-1)
        for index, event in enumerate(events):
            if event["type"] != "metrics" or index == newest:
                for line in lines_of(event["type"], event.get("message", ""), event["data"]):
                    self._say(line)

    def close(self) -> None:
        """Nothing is held back."""


def lines_of(type: str, message: str, data: Mapping[str, Any]) -> list[str]:
    """What an event is to somebody who reads a terminal."""
    if type == "metrics":
        loss = "no loss" if data.get("loss") is None else f"loss {data['loss']:.4f}"
        return [f"step {data['step']}/{data['total_steps']}  {loss}  {data.get('step_seconds') or 0:.3f} s"]
    if type == "evaluation":
        return [f"test accuracy {data['accuracy']:.4f} {data['when']}"]
    if type == "phase":
        return [message or data["name"]]
    if type == "ledger":
        return table(data)
    if type in _FEW:
        return [f"{_FEW[type]} {data['path']}"]
    return []


def table(ledger: Mapping[str, Any]) -> list[str]:
    """The ledger as text: predicted, measured, and the same of an all-FULL step."""
    rows: list[tuple[str, ...]] = [("", "predicted", "measured", "all-FULL")]
    for row in ledger["rows"]:
        name = row["name"] if row["unit"] in ("fraction", "s") else f"{row['name']}, {row['unit']}"
        rows.append((name, *(_figure(row[key]) for key in ("predicted", "measured", "all_full"))))
    accuracy, phases = ledger["accuracy"], ledger["phases"]
    seconds = ", ".join(f"{name} {spent:.1f} s" for name, spent in phases.items())
    before, after = (_figure(accuracy[when]) for when in ("before", "after"))
    return [*aligned(rows), f"accuracy {before} before, {after} after {ledger['steps']} steps; {seconds}"]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines: the first column to the left, the others to the right, each as wide as its widest cell."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        return "  ".join([row[0].ljust(widths[0]), *cells]).rstrip()

    return [line(row) for row in rows]


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
