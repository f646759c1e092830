"""From the flags of `sweep` to the body of the request.

What is given once all trials have, of what is given more often each value is tried.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import typer

from service.cli.request import job_body, ratios_of, read_spec
from workers.contract import put


@dataclass(frozen=True)
class _Field:
    """Where a flag goes, how a word of it is read, and whether LOW:HIGH is spread by the logarithm."""

    path: str
    read: Callable[[str], Any] = str
    is_log: bool = False


_SEARCHED = {
    "ratios": _Field("method.ratios", lambda text: ratios_of(text, "--ratios")),
    "compute": _Field("method.budgets.compute", float),
    "bytes": _Field("method.budgets.bytes", float),
    "strategy": _Field("method.strategy"),
    "score": _Field("method.score"),
    "skip_fill": _Field("method.skip_fill"),
    "lora": _Field("method.lora.rank", int),
    "lr": _Field("optimiser.learning_rate", float, is_log=True),
}
_SPANS = ("compute", "bytes", "lr")


def sweep_body(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The body that the given flags ask for: a spec file first, flags over it."""
    body = read_spec(flags.get("spec"))
    job, space = _merged(body.get("job"), job_body(_common(flags))), dict(body.get("space") or {})
    for flag, field in _SEARCHED.items():
        words: Sequence[str] = flags.get(flag) or ()
        if len(words) == 1 and not (flag in _SPANS and ":" in words[0]):
            put(job, field.path.split("."), _read(field.read, words[0], flag))
        elif words:
            space[field.path] = _choice(flag, words, field)
    for text in flags.get("try_") or ():
        path, values = _tried(text)
        space[path] = {"values": values}
    _fit_micro_batches(job, space)
    body |= {"job": job, "space": space} if job else {"space": space}
    body |= _search(flags)
    if flags.get("name"):
        body["name"] = flags["name"]
    if flags.get("label"):
        body["metadata"] = {**body.get("metadata", {}), **flags["label"]}
    if flags.get("asha") is not None:
        body["asha"] = {"grace_steps": flags["asha"]}
        job.setdefault("checkpoint", {"evaluate": True, "every_steps": flags["asha"]})
        body["job"] = job
    return body


def _common(flags: Mapping[str, Any]) -> dict[str, Any]:
    own = {"spec", "name", "label", *_SEARCHED}
    return {flag: value for flag, value in flags.items() if flag not in own}


def _search(flags: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if flags.get("random") is not None and flags.get("optuna") is not None:
        raise typer.BadParameter("give --random or --optuna, not both", param_hint="--random")
    for kind in ("random", "optuna"):
        if flags.get(kind) is not None:
            found["search"] = {"type": kind, "samples": flags[kind], "seed": flags.get("search_seed") or 0}
    if flags.get("objective"):
        found["objectives"] = dict(_objective(text) for text in flags["objective"])
    if flags.get("at_once") is not None:
        found["at_once"] = flags["at_once"]
    if flags.get("baselines") is not None:
        found["baselines"] = flags["baselines"]
    return found


def _choice(flag: str, words: Sequence[str], field: _Field) -> dict[str, Any]:
    """All the values, or of one word LOW:HIGH all numbers between."""
    if len(words) == 1:
        low, _, high = words[0].partition(":")
        span = {"low": _read(float, low, flag), "high": _read(float, high, flag)}
        return {**span, "log": True} if field.is_log else span
    return {"values": [_read(field.read, word, flag) for word in words]}


def _read(read: Callable[[str], Any], word: str, flag: str) -> Any:
    try:
        return read(word)
    except ValueError:
        name = f"--{flag.replace('_', '-')}"
        raise typer.BadParameter(f"'{word}' cannot be read as a number", param_hint=name) from None


def _tried(text: str) -> tuple[str, list[Any]]:
    path, equals, values = text.partition("=")
    try:
        found = json.loads(values)
    except ValueError:
        found = None
    if not equals or not isinstance(found, list):
        raise typer.BadParameter(f"'{text}' is not PATH=[VALUE, …] in JSON, like seed=[1,2]", param_hint="--try")
    return path, found


def _objective(text: str) -> tuple[str, str]:
    metric, equals, goal = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"'{text}' is not METRIC=max or METRIC=min", param_hint="--objective")
    return metric, goal


def _fit_micro_batches(job: dict[str, Any], space: Mapping[str, Any]) -> None:
    """Ratios of one sum are of a step with so many micro-batches, where that is not given."""
    asked = [job["method"]["ratios"]] if job.get("method", {}).get("ratios") else []
    asked += space.get("method.ratios", {}).get("values", [])
    sums = {sum(ratios.values()) for ratios in asked if isinstance(ratios, dict)}
    if "micro_batches" not in job and len(sums) == 1:
        job["micro_batches"] = sums.pop()


def _merged(under: dict[str, Any] | None, over: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(under or {})
    for name, value in over.items():
        inner = found.get(name)
        found[name] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return found
