"""What every benchmark prints and writes: a table, targets, `.bench/NAME.json`; which rows it has, over which seeds."""

from __future__ import annotations

import fnmatch
import itertools
import json
import operator
import os
import platform
import statistics
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_HOLDS = {"<=": operator.le, ">=": operator.ge, "==": operator.eq}


def matching(names, patterns):
    """Those of the names that match some pattern, in their order."""
    return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def mean_and_std(values):
    """The mean and the standard deviation; 0 of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def target(name, value, comparison, limit):
    """One number that was asked for, and whether it was reached."""
    holds = bool(_HOLDS[comparison](value, limit))
    return {"name": name, "value": value, "limit": f"{comparison} {limit}", "holds": holds}


def publish(name, rows, targets, note=""):
    """Print rows, a table for each run of the same columns, and targets; write them with the machine's name as JSON."""
    console = Console(width=140)
    for part, alike in itertools.groupby(rows, key=tuple):
        table = Table(*map(str, part), title=name)
        for row in alike:
            table.add_row(*(f"{v:.3f}" if isinstance(v, float) else escape(str(v)) for v in row.values()))
        console.print(table)
    checks = Table("target", "value", "limit", "holds", title="targets")
    for t in targets:
        value = f"{t['value']:.3f}" if isinstance(t["value"], float) else str(t["value"])
        checks.add_row(t["name"], value, t["limit"], "yes" if t["holds"] else "NO")
    console.print(checks)
    if note:
        console.print(note)
    folder = Path(".bench")
    folder.mkdir(exist_ok=True)
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    content = {"name": name, "machine": machine, "note": note, "rows": rows, "targets": targets}
    (folder / f"{name}.json").write_text(json.dumps(content, indent=2))
    console.print(f"written to {folder / f'{name}.json'}")
