"""The catalogue: which of timm's models can be cut into heads and their sizes, for those who do not import torch.

    python -m workers.catalog --out FILE
    python -m workers.catalog --table

The first writes {"format": 3, "timm": "1.0.31", "models": {"vit_small_patch16_224": {"img_size": 224, …}, "resnet50":
"architecture resnet is not …", …}}: how `shapes` counts the model where it works, else the reason why it does not. The
second prints a summary for a README.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from workers import bundled
from workers.anatomy import foreign_architecture, refusal
from workers.contract import DIGITS_MODEL
from workers.partition import model_shape
from workers.shapes import Measured, Sizes, resized, shape_of

FORMAT = 3  # of the file; a reader makes a file of another format anew
NUM_CLASSES = 2  # of the models that are built to be counted


def main() -> None:
    """Write the catalogue and print how much of it works."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="file to write")
    what.add_argument("--table", action="store_true", help="print a summary in Markdown")
    path, catalog = parser.parse_args().out, build_catalog()
    if path is None:
        print(table(catalog["models"]), end="")
        return
    write_atomically(path, json.dumps(catalog, indent=1) + "\n")
    supported = sum(isinstance(entry, dict) for entry in catalog["models"].values())
    print(f"{supported} of {len(catalog['models'])} models work; wrote {path}")


def table(models: Mapping[str, Any]) -> str:
    """What works of those modules of timm whose models may, in Markdown: counts, and why the others do not."""
    by_module: dict[str, list[Any]] = {}
    for name, entry in models.items():
        if name != DIGITS_MODEL and foreign_architecture(name) is None:
            by_module.setdefault(timm.models.model_entrypoint(name).__module__.rpartition(".")[2], []).append(entry)
    lines = ["| timm's module | models | work | the others |", "|---|---|---|---|"]
    for module, entries in sorted(by_module.items()):
        reasons = Counter(entry for entry in entries if isinstance(entry, str))
        why = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        lines.append(f"| `{module}` | {len(entries)} | {len(entries) - reasons.total()} | {why} |")
    return "\n".join(lines) + "\n"


def build_catalog() -> dict[str, Any]:
    """The catalogue as it is written: its format, timm's version, and sizes or a reason for each name."""
    digits = sizes_of(bundled.TIMM_NAME, **bundled.MODEL_ARGS).to_dict()
    models = {DIGITS_MODEL: digits, **{name: _entry(name) for name in timm.list_models()}}
    return {"format": FORMAT, "timm": timm.__version__, "models": models}


def sizes_of(timm_name: str, **model_args: Any) -> Sizes:
    """The sizes of a model that works, read from the call by which timm would build it; nothing is built."""
    seen = _arguments(VisionTransformer, timm_name, **model_args)
    seen["img_size"], seen["patch_size"] = (_side(seen[name]) for name in ("img_size", "patch_size"))
    seen["init_values"] = float(seen["init_values"] or 0)
    return Sizes(**{field.name: seen[field.name] for field in fields(Sizes)})


def write_atomically(path: Path, text: str) -> None:
    """Write `text` so that a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(draft).chmod(0o644)  # mkstemp lets only the owner in
        Path(draft).replace(path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise


class _Noted(Exception):
    """Ends the building of a model once its arguments are known."""


def _entry(name: str) -> dict[str, Any] | str:
    foreign = foreign_architecture(name)
    return foreign if foreign is not None else entry_of(name)


def entry_of(name: str) -> dict[str, Any] | str:
    """What the catalogue says of a model whose module is known: how to count it, or why it cannot be run."""
    model = _built(name)
    reason = refusal(model)
    if reason is not None:
        return reason
    shape = model_shape(model)
    if isinstance(model, VisionTransformer):
        sizes = sizes_of(name)
        if shape_of(resized(sizes, {"depth": shape.num_blocks}), shape.num_classes) == shape:
            return sizes.to_dict()
    position = getattr(model, "pos_embed", None)
    measured = Measured(
        img_size=_side(model.patch_embed.img_size),
        patch_size=_side(model.patch_embed.patch_size),
        in_chans=shape.patch_dim // _side(model.patch_embed.patch_size) ** 2,
        position_params=0 if position is None else shape.dim,
        has_tables=getattr(model.blocks[0].attn, "relative_position_bias_table", None) is not None,
        shape=replace(shape, num_blocks=_arguments(type(model), name)["depth"]),
    )
    return measured.to_dict()


def _arguments(architecture: type, timm_name: str, **model_args: Any) -> dict[str, Any]:
    """What timm would build an architecture with."""
    signature, seen = inspect.signature(architecture.__init__), dict[str, Any]()  # type: ignore[misc]

    def note(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        seen.update(bound.arguments)
        raise _Noted

    with mock.patch.object(architecture, "__init__", note), suppress(_Noted):
        timm.create_model(timm_name, pretrained=False, **model_args)
    return seen


def _built(name: str, **model_args: Any) -> Any:
    """Without memory; of one block where timm can, since a model's are alike or refused."""
    with torch.device("meta"):
        try:
            return timm.create_model(name, pretrained=False, num_classes=NUM_CLASSES, depth=1, **model_args)
        except AssertionError:
            return timm.create_model(name, pretrained=False, num_classes=NUM_CLASSES, **model_args)


def _side(size: Any) -> int:
    return int(size if isinstance(size, int) else size[0])


if __name__ == "__main__":
    main()
