"""What scripts and people rely on: the help of every command, and the shape of what `--json` prints.

After a change that is meant: D2FT_SNAPSHOTS=write python -m pytest tests/service/test_snapshots.py
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from service.cli import app

DATA = Path(__file__).parent / "data"
_WRITING = os.environ.get("D2FT_SNAPSHOTS") == "write"


def test_the_help_of_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 100)
    monkeypatch.setattr("typer.rich_utils.FORCE_TERMINAL", False)
    pages = []
    for words in _commands(typer.main.get_command(app), ()):
        done = CliRunner().invoke(app, [*words, "--help"], prog_name="d2ft")
        assert done.exit_code == 0
        pages.append("\n".join(line.rstrip() for line in done.stdout.splitlines()))
    text, path = "\n".join(pages) + "\n", DATA / "help.txt"
    if _WRITING:
        path.write_text(text)
    assert text.splitlines() == path.read_text().splitlines()


def _commands(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    yield words
    for name, inner in sorted(getattr(command, "commands", {}).items()):
        yield from _commands(inner, (*words, name))


def test_the_shape_of_json(server: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D2FT_HOME", str(home))
    monkeypatch.setenv("D2FT_URL", server)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))

    def run(*words: str) -> list[Any]:
        done = CliRunner().invoke(app, [*words, "--json"])
        assert done.exit_code == 0, done.output
        return [json.loads(line) for line in done.stdout.splitlines()]

    [job] = run("submit", "--steps", "2", "--name", "n", "--label", "a=b")
    run("watch", job["id"])
    asked: list[tuple[str, ...]] = [(name, job["id"]) for name in _OF_A_JOB]
    asked += [(name,) for name in ("list", "status", "doctor", "devices", "models")]
    asked += [(name, "list") for name in ("keys", "users", "datasets", "webhooks")]
    asked += [("keys", "add"), ("users", "add", "ada"), ("logout",), ("list", "--all")]
    shapes = {" ".join(words).replace(job["id"], "JOB"): _shape(run(*words)[0]) for words in asked}
    if _WRITING:
        (DATA / "json_shapes.json").write_text(json.dumps(shapes, indent=1, sort_keys=True) + "\n")
    assert list(_lost(json.loads((DATA / "json_shapes.json").read_text()), shapes, "")) == []


_OF_A_JOB = ("get", "events", "logs", "metrics", "checkpoints", "artifacts", "ledger", "plan", "timeline")


def _shape(value: Any, name: str = "") -> Any:
    """Types instead of values; of a list its first item, of what is free in form nothing."""
    if isinstance(value, dict) and name not in _FREE:
        return {key: _shape(inner, key) for key, inner in value.items()}
    if isinstance(value, list) and value:
        return [_shape(value[0])]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "number"
    return type(value).__name__


def _lost(before: Any, now: Any, place: str) -> Iterator[str]:
    """What scripts may rely on and is no longer so; that there is more is no harm."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key, inner in before.items():
            yield from _lost(inner, now[key], f"{place}.{key}") if key in now else [f"{place}.{key} is gone"]
    elif isinstance(before, list) and isinstance(now, list):
        yield from _lost(before[0], now[0], f"{place}[]")
    elif before != now and "NoneType" not in (before, now):
        yield f"{place} was {before} and is {now}"


_FREE = ("spec", "method", "data", "metrics", "metadata")
