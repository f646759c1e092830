"""The catalogue: which of timm's models can be cut into heads and their sizes, for those who do not import torch.

    python -m workers.catalog --out FILE
    python -m workers.catalog --table

The first writes {"format": 4, "timm": "1.0.31", "models": {"vit_small_patch16_224": {"img_size": 224, …}, "resnet50":
"architecture resnet is not …", …}}: how `shapes` counts the model where it works, else the reason why it does not. The
second prints a summary for a README.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm

from workers import bundled
from workers.anatomy import foreign_architecture
from workers.contract import DIGITS_MODEL
from workers.sizing import entry_of, sizes_of

FORMAT = 4  # of the file; a reader makes a file of another format anew


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


def _entry(name: str) -> dict[str, Any] | str:
    foreign = foreign_architecture(name)
    return foreign if foreign is not None else entry_of(name)


if __name__ == "__main__":
    main()
