"""Draws sweeps: a table of the trials, and accuracy against compute with the front and its knee.

accuracy
 0.91 |                                       F
      |               K            ●
      |     ●              ·
 0.62 |  ●
      +------------------------------------------
       0.2                                    1.0   compute, as a share of full fine-tuning's
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from service.cli import talk
from service.schemas import Point, Sweep, Trial

WIDTH, HEIGHT = 60, 14
FRONT, OTHER, KNEE, BASELINES = "●", "·", "K", {"full": "F", "stopped": "S"}
_STYLES = {FRONT: "green", KNEE: "bold cyan", "F": "yellow", "S": "yellow"}
_AGAINST = {"full": "of full fine-tuning's", "largest": "of the dearest trial's"}


def put_sweep(sweep: Sweep) -> None:
    """A sweep as label and value, its trials as a table, its front."""
    progress = sweep.progress
    failed = f", {progress.failed} of them without a result" if progress.failed else ""
    talk.put_fields(
        {
            "id": sweep.id,
            "name": sweep.name,
            "status": f"{sweep.status}{f' ({sweep.status_reason})' if sweep.status_reason else ''}",
            "model": sweep.model,
            "dataset": sweep.dataset,
            "owner": sweep.owner,
            "attempt": sweep.attempt,
            "labels": " ".join(f"{key}={value}" for key, value in sweep.metadata.items()),
            "trials": f"{progress.done} of {progress.total} are over{failed}",
            "error": f"{sweep.error.code} ({sweep.error.fault}): {sweep.error.message}" if sweep.error else "",
        }
    )
    if sweep.trials:
        put_trials(sweep)
    put_front(sweep)


def put_sweeps(sweeps: Sequence[Sweep]) -> None:
    """Sweeps as a table."""
    table = talk.make_table("id", "name", "status", "model", "trials", "age")
    for sweep in sweeps:
        trials = f"{sweep.progress.done}/{sweep.progress.total}"
        name, model = talk.line(sweep.name or ""), talk.line(sweep.model)
        table.add_row(sweep.id, name, talk.status_text(sweep.status), model, trials, talk.age(sweep.created_at))
    talk.put_table(table)


def put_trials(sweep: Sweep) -> None:
    """What was tried and what came of it; costs are shares."""
    points, front = {point.key: point for point in sweep.points}, set(sweep.fronts.compute)
    table = talk.make_table("trial", "setting", "status", "accuracy", "compute", "bytes", "seconds", "", "job")
    for trial in sweep.trials:
        point = points.get(trial.key)
        table.add_row(
            talk.line(trial.key),
            talk.line(setting_words(trial)),
            talk.status_text(trial.status),
            talk.percent(point.accuracy if point else trial.accuracy),
            *(talk.percent(getattr(point, cost, None)) for cost in ("compute", "bytes", "seconds")),
            "knee" if trial.key == sweep.knee else "front" if trial.key in front else "",
            trial.job_id,
        )
    talk.put_table(table)
    for trial in sweep.trials:
        if trial.error and trial.status == "failed":
            talk.put(f"{trial.key} failed: {trial.error.code}: {talk.line(trial.error.message)}")


def setting_words(trial: Trial) -> str:
    """What was tried, by the last part of each path; of a baseline what it is."""
    if trial.baseline:
        return {"full": "full fine-tuning", "stopped": "full, stopped at the knee's compute"}[trial.baseline]
    return " ".join(f"{path.rpartition('.')[2]}={_short(value)}" for path, value in trial.setting.items())


def put_front(sweep: Sweep) -> None:
    """Accuracy against compute; nothing while fewer than two trials have come to an end."""
    points = [point for point in sweep.points if point.compute is not None]
    if len(points) < 2:
        return
    for row in front_rows(points, _marks(sweep)):
        talk.out.print(row)
    talk.put(
        f"compute is a share {_AGAINST.get(sweep.against or '', '')}; {FRONT} front, {OTHER} beaten, F full, S stopped"
    )
    knee = next((point for point in points if point.key == sweep.knee), None)
    if knee is not None:
        trial = next(trial for trial in sweep.trials if trial.key == knee.key)
        words = f"{talk.percent(knee.accuracy)} accuracy at {talk.percent(knee.compute)} of the compute"
        talk.put(f"knee {KNEE}: {knee.key} ({talk.line(setting_words(trial))}), {words}")


def front_rows(points: Sequence[Point], marks: Mapping[str, str]) -> list[Text]:
    """The picture, line by line; of points in one cell the last that `marks` names is seen."""
    xs, ys = [float(point.compute or 0) for point in points], [point.accuracy for point in points]
    cells = [[" "] * WIDTH for _ in range(HEIGHT)]
    order = list(marks)
    for point in sorted(points, key=lambda point: order.index(point.key)):
        column = _place(float(point.compute or 0), min(xs), max(xs), WIDTH)
        line = HEIGHT - 1 - _place(point.accuracy, min(ys), max(ys), HEIGHT)
        cells[line][column] = marks[point.key]
    labels = {0: f"{max(ys):.3f}", HEIGHT - 1: f"{min(ys):.3f}"}
    rows = [Text("accuracy")]
    for number, cell in enumerate(cells):
        row = Text(f"{labels.get(number, ''):>7} |")
        for mark in "".join(cell).rstrip():
            row.append(mark, _STYLES.get(mark, ""))
        rows.append(row)
    right = f"{max(xs):.3g} compute"
    axis = f"{min(xs):<.3g}".ljust(WIDTH - len(right)) + right
    return [*rows, Text(" " * 8 + "+" + "-" * WIDTH), Text(" " * 9 + axis)]


def _marks(sweep: Sweep) -> dict[str, str]:
    """By key, those that are to be seen last."""
    front = set(sweep.fronts.compute)
    marks = {trial.key: FRONT if trial.key in front else OTHER for trial in sweep.trials}
    marks |= {trial.key: BASELINES[trial.baseline] for trial in sweep.trials if trial.baseline in BASELINES}
    if sweep.knee in marks:
        marks[sweep.knee] = KNEE
    rank = {OTHER: 0, FRONT: 1, "F": 2, "S": 2, KNEE: 3}
    return dict(sorted(marks.items(), key=lambda item: rank[item[1]]))


def _place(value: float, low: float, high: float, cells: int) -> int:
    return 0 if high <= low else round((value - low) / (high - low) * (cells - 1))


def _short(value: Any) -> str:
    if isinstance(value, dict) and set(value) == {"full", "forward", "skip"}:
        return f"{value['full']},{value['forward']},{value['skip']}"
    if isinstance(value, list):
        return ",".join(map(_short, value))
    if isinstance(value, float):
        return f"{value:.3g}"
    return value if isinstance(value, str) else json.dumps(value)
