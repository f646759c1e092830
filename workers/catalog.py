"""The catalogue: which of timm's models can be cut into heads, as a file for those who do not import torch.

    python -m workers.catalog --out FILE

writes {"timm": "1.0.31", "models": {"vit_small_patch16_224": null, "resnet50": "architecture resnet is not …", …}}:
null where the model works, else the reason why it does not.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch

from workers.contract import DIGITS_MODEL
from workers.model import foreign_architecture, refusal


def main() -> None:
    """Write the catalogue and print how much of it works."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    path = parser.parse_args().out
    catalog = build_catalog()
    write_atomically(path, json.dumps(catalog, indent=1) + "\n")
    supported = sum(reason is None for reason in catalog["models"].values())
    print(f"{supported} of {len(catalog['models'])} models work; wrote {path}")


def build_catalog() -> dict[str, Any]:
    """The catalogue as it is written: timm's version, and a reason or None for each name."""
    models = {DIGITS_MODEL: None, **{name: _reason(name) for name in timm.list_models()}}
    return {"timm": timm.__version__, "models": models}


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


def _reason(name: str) -> str | None:
    foreign = foreign_architecture(name)
    if foreign is not None:
        return foreign
    # One block and no memory: features do not differ between the blocks of a model.
    with torch.device("meta"):
        return refusal(timm.create_model(name, pretrained=False, num_classes=2, depth=1))


if __name__ == "__main__":
    main()
