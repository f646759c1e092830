"""The command lines of `workers.loop` and `workers.sweep`: from flags to a job's spec, and where a run goes. No Ray.

The flags are those of `d2ft submit`, for clusters without a service; `--set PATH=VALUE` reaches every other field.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workers.contract import JobSpec, put
from workers.sources.address import address_of

HOME_VARIABLE = "D2FT_HOME"
IN_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for the entry point of a job
# flag → (where it goes in the spec, its type, what it says)
_FLAGS: dict[str, tuple[str, type, str]] = {
    "model": ("model", str, "timm name, or d2ft_digits"),
    "weights": ("weights", str, "a .safetensors file, or hf-hub:ORG/NAME@COMMIT"),
    "img-size": ("img_size", int, "side of the images in pixels"),
    "images-per-class": ("images_per_class", int, "use only so many of each class"),
    "strategy": ("method.strategy", str, "how the work is chosen"),
    "hold": ("method.hold", str, "for how long a choice is held"),
    "grain": ("method.grain", str, "coherent or head"),
    "score": ("method.score", str, "what a head is worth"),
    "skip-fill": ("method.skip_fill", str, "zero, mean or rescale"),
    "lora": ("method.lora.rank", int, "train adapters of this rank instead"),
    "lr": ("optimiser.learning_rate", float, "peak learning rate"),
    "workers": ("workers", int, "how many workers share the heads"),
    "micro-batches": ("micro_batches", int, "micro-batches of a step"),
    "micro-batch-size": ("micro_batch_size", int, "images of each"),
    "epochs": ("epochs", float, "passes over the training images"),
    "steps": ("steps", int, "optimiser steps, instead of epochs"),
    "window": ("window", int, "steps that one plan covers"),
    "placement": ("placement", str, "auto, split or whole"),
    "seed": ("seed", int, "everything drawn follows from it"),
    "name": ("name", str, "a name for people"),
}  # fmt: skip


def add_places(parser: argparse.ArgumentParser, spec: str) -> None:
    """--context, --spec and --out."""
    parser.add_argument("--context", type=Path, help="a run context, as the service writes it")
    parser.add_argument("--spec", type=Path, help=spec)
    parser.add_argument("--out", type=Path, help=f"where the run goes (default: {HOME_VARIABLE}/runs/TIME)")


def add_job_flags(parser: argparse.ArgumentParser) -> None:
    """What a job can be told without a file."""
    for flag, (_, type_, said) in _FLAGS.items():
        parser.add_argument(f"--{flag}", type=type_, help=said)
    parser.add_argument("--dataset", help="digits, a folder, or an address like parquet:///path")
    parser.add_argument("--ratios", type=_ratios, metavar="FULL,FORWARD,SKIP", help="of a step's micro-batches")
    parser.add_argument("--compute", type=float, help="budget: at most this fraction of the compute")
    parser.add_argument("--bytes", type=float, help="budget: at most this fraction of the bytes")
    parser.add_argument("--set", action="append", type=_setting, metavar="PATH=VALUE", help="any field, by its path")


def job_spec(args: argparse.Namespace) -> JobSpec:
    """The job that the flags ask for, over the file of --spec. Raises ValueError (pydantic's among them), OSError."""
    body: dict[str, Any] = {}
    if args.spec is not None:
        try:
            body = json.loads(args.spec.read_bytes())
        except json.JSONDecodeError as error:
            raise ValueError(f"{args.spec}: Invalid JSON: {error}") from None
        if not isinstance(body, dict):
            raise ValueError(f"{args.spec} does not hold a JSON object")
    given = {place: getattr(args, flag.replace("-", "_")) for flag, (place, _, _) in _FLAGS.items()}
    given |= {"method.budgets.compute": args.compute, "method.budgets.bytes": args.bytes, "method.ratios": args.ratios}
    if args.bytes is not None and args.compute is None:
        given["method.budgets.compute"] = 1.0
    if args.dataset is not None:
        given["dataset"] = address_of(args.dataset)
    if args.ratios is not None and "micro_batches" not in body:
        given["micro_batches"] = given["micro_batches"] or sum(args.ratios.values())
    for place, value in given.items():
        if value is not None:
            put(body, place.split("."), value)
    for place, value in args.set or ():
        put(body, place.split("."), value)
    return JobSpec.model_validate(body)


def run_dir_of(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> Path:
    """Where the run goes: `--out`, or a directory of its own in the home. Raises ValueError where it would be lost."""
    if args.out is None:
        home = Path(environ.get(HOME_VARIABLE, "~/.d2ft")).expanduser()
        return (home / "runs" / time.strftime("%Y%m%d-%H%M%S")).absolute()
    if not args.out.is_absolute() and IN_RAY_JOB in environ:
        raise ValueError(
            f"--out {args.out}: a Ray job's own directory is removed after it, with what lies there; give a whole path"
        )
    return Path(args.out).absolute()


def _ratios(text: str) -> dict[str, int]:
    try:
        full, forward, skip = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not FULL,FORWARD,SKIP, like 3,0,2") from None
    return {"full": full, "forward": forward, "skip": skip}


def _setting(text: str) -> tuple[str, Any]:
    """PATH=VALUE with a value in JSON, or a bare word."""
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise argparse.ArgumentTypeError(f"'{text}' is not PATH=VALUE, like window=50 or method.hold=none")
    try:
        return path, json.loads(value)
    except ValueError:
        return path, value
