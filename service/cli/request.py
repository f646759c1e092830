"""From the flags of `submit` and `plan` to the body of the request: a spec file first, flags over it, nothing added."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from workers.contract import put
from workers.sources.address import address_of

# flag → where it goes in the body
_PLACES = {
    "name": ("name",),
    "priority": ("priority",),
    "queue_timeout": ("queue_timeout_s",),
    "model": ("model",),
    "img_size": ("img_size",),
    "images_per_class": ("images_per_class",),
    "strategy": ("method", "strategy"),
    "hold": ("method", "hold"),
    "grain": ("method", "grain"),
    "score": ("method", "score"),
    "skip_fill": ("method", "skip_fill"),
    "lora": ("method", "lora", "rank"),
    "freeze_blocks": ("method", "freeze", "blocks"),
    "freeze_trunk": ("method", "freeze", "trunk"),
    "head_only": ("method", "head_only"),
    "precision": ("precision", "compute"),
    "wire": ("precision", "wire"),
    "recompute": ("precision", "recompute"),
    "lr": ("optimiser", "learning_rate"),
    "workers": ("workers",),
    "micro_batches": ("micro_batches",),
    "micro_batch_size": ("micro_batch_size",),
    "epochs": ("epochs",),
    "steps": ("steps",),
    "window": ("window",),
    "onnx": ("export", "onnx"),
    "seed": ("seed",),
    "placement": ("placement",),
    "num_classes": ("num_classes",),
    "link": ("link",),
}


def job_body(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The body that the given flags ask for; flags that were not given are None."""
    body = read_spec(flags.get("spec"))
    for flag, place in _PLACES.items():
        if flags.get(flag) is not None:
            put(body, place, flags[flag])
    if flags.get("weights"):
        body["weights"] = weights_of(flags["weights"])
    if flags.get("dataset"):
        body["dataset"] = dataset_uri(flags["dataset"])
    if flags.get("model_arg"):
        body["model_args"] = {**body.get("model_args", {}), **_values(flags["model_arg"], "--model-arg")}
    if flags.get("augment"):
        body["augment"] = {**body.get("augment", {}), **_values(flags["augment"], "--augment")}
    if flags.get("label"):
        body["metadata"] = {**body.get("metadata", {}), **flags["label"]}
    _put_share(body, flags)
    return body


def preview_body(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a dry run: the flags of a job, and a fleet."""
    if bool(flags.get("device")) == bool(flags.get("live")):
        raise typer.BadParameter("give --device, or --live for the measured ones", param_hint="--device")
    return {**job_body(flags), "devices": "live" if flags.get("live") else list(flags["device"]), "gantt": True}


def _put_share(body: dict[str, Any], flags: Mapping[str, Any]) -> None:
    """Ratios, budgets or a schedule. The ratios' sum is the number of micro-batches where that is not given."""
    ratios = None
    if flags.get("ratios"):
        ratios = ratios_of(flags["ratios"], "--ratios")
        put(body, ("method", "ratios"), ratios)
    if flags.get("compute") is not None or flags.get("bytes") is not None:
        compute = 1.0 if flags.get("compute") is None else flags["compute"]
        budgets = {"compute": compute, **({} if flags.get("bytes") is None else {"bytes": flags["bytes"]})}
        put(body, ("method", "budgets"), budgets)
    if flags.get("schedule"):
        phases = [_phase(text) for text in flags["schedule"].split(";") if text.strip()]
        put(body, ("method", "schedule"), phases)
        ratios = ratios or next((phase["ratios"] for phase in phases if "ratios" in phase), None)
    if ratios and flags.get("micro_batches") is None and "micro_batches" not in body:
        body["micro_batches"] = sum(ratios.values())


def _phase(text: str) -> dict[str, Any]:
    """SHARE:full, SHARE:FULL,FORWARD,SKIP or SHARE:COMPUTE[/BYTES], like 0.5:1,0,4 and 0.5:0.6/0.5."""
    share, _, what = text.strip().partition(":")
    try:
        phase: dict[str, Any] = {"share": float(share)}
        if what == "full":
            return phase
        if "," in what:
            return {**phase, "ratios": ratios_of(what, "--schedule")}
        compute, slash, sent = what.partition("/")
        return {**phase, "budgets": {"compute": float(compute), **({"bytes": float(sent)} if slash else {})}}
    except ValueError:
        raise typer.BadParameter(
            f"'{text}' is not SHARE:full, SHARE:FULL,FORWARD,SKIP or SHARE:COMPUTE/BYTES, like 0.5:1,0,4;0.5:full",
            param_hint="--schedule",
        ) from None


def ratios_of(text: str, flag: str) -> dict[str, int]:
    """FULL,FORWARD,SKIP as a body has them."""
    try:
        full, forward, skip = (int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter("give three whole numbers, FULL,FORWARD,SKIP, like 3,0,2", param_hint=flag) from None
    return {"full": full, "forward": forward, "skip": skip}


def _values(texts: Sequence[str], flag: str) -> dict[str, Any]:
    """NAME=VALUE with a value in JSON, or a bare word."""
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise typer.BadParameter(f"'{text}' is not NAME=VALUE", param_hint=flag)
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def weights_of(text: str) -> str:
    """A plain path becomes absolute; "job:ID" and "hf-hub:…" go as they are."""
    return text if text.startswith(("job:", "hf-hub:")) else str(Path(text).expanduser().absolute())


def dataset_uri(text: str) -> str:
    """A plain path becomes an address; anything with a scheme, "digits" and "dataset:NAME" go as they are."""
    return address_of(text, ("dataset:", "torchvision:", "hf:"))


def read_spec(path: str | None) -> dict[str, Any]:
    """The JSON object of a file, of stdin for "-"."""
    if path is None:
        return {}
    try:
        body = json.loads(sys.stdin.read() if path == "-" else Path(path).read_text())
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{path} is not a readable JSON file: {error}", param_hint="--spec") from None
    if not isinstance(body, dict):
        raise typer.BadParameter(f"{path} does not hold a JSON object", param_hint="--spec")
    return body
