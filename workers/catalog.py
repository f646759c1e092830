"""The catalogue: which of timm's models can be cut into heads and their sizes, for those who do not import torch.

    python -m workers.catalog --out FILE

writes {"format": 2, "timm": "1.0.31", "models": {"vit_small_patch16_224": {"img_size": 224, …}, "resnet50":
"architecture resnet is not …", …}}: the model's `shapes.Sizes` where it works, else the reason why it does not.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import tempfile
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from workers import bundled
from workers.contract import DIGITS_MODEL
from workers.model import foreign_architecture, refusal
from workers.shapes import Sizes

FORMAT = 2  # of the file; a reader makes a file of another format anew
_ARGUMENTS = inspect.signature(VisionTransformer.__init__)


def main() -> None:
    """Write the catalogue and print how much of it works."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    path = parser.parse_args().out
    catalog = build_catalog()
    write_atomically(path, json.dumps(catalog, indent=1) + "\n")
    supported = sum(isinstance(entry, dict) for entry in catalog["models"].values())
    print(f"{supported} of {len(catalog['models'])} models work; wrote {path}")


def build_catalog() -> dict[str, Any]:
    """The catalogue as it is written: its format, timm's version, and sizes or a reason for each name."""
    digits = sizes_of(bundled.TIMM_NAME, **bundled.MODEL_ARGS).to_dict()
    models = {DIGITS_MODEL: digits, **{name: _entry(name) for name in timm.list_models()}}
    return {"format": FORMAT, "timm": timm.__version__, "models": models}


def sizes_of(timm_name: str, **model_args: Any) -> Sizes:
    """The sizes of a model that works, read from the call by which timm would build it; nothing is built."""
    seen: dict[str, Any] = {}

    def note(*args: Any, **kwargs: Any) -> None:
        bound = _ARGUMENTS.bind(*args, **kwargs)
        bound.apply_defaults()
        seen.update(bound.arguments)
        raise _Noted

    with mock.patch.object(VisionTransformer, "__init__", note), suppress(_Noted):
        timm.create_model(timm_name, pretrained=False, **model_args)
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
    reason = _reason(name)
    return sizes_of(name).to_dict() if reason is None else reason


def _reason(name: str) -> str | None:
    foreign = foreign_architecture(name)
    if foreign is not None:
        return foreign
    # One block and no memory: features do not differ between the blocks of a model.
    with torch.device("meta"):
        return refusal(timm.create_model(name, pretrained=False, num_classes=2, depth=1))


def _side(size: Any) -> int:
    return int(size if isinstance(size, int) else size[0])


if __name__ == "__main__":
    main()
