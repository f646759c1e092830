"""Which files of a directory belong to which split, for sources whose images lie many to a file.

train-00000-of-00004.parquet, train.parquet, …      the training images
test*, or else val* or validation*                  optional
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from workers.sources.address import check_inside
from workers.sources.source import Checked

MAX_SHARDS = 100_000
_TEST_PREFIXES = ("test", "val")  # "val" begins "validation", too
_INNER = "data"  # where the Hugging Face layout has them


class Shards(NamedTuple):
    """Resolved files of each split, by name; `test` is None where there is none."""

    train: tuple[Path, ...]
    test: tuple[Path, ...] | None


def find_shards(told: Checked, path: Path, suffix: str) -> Shards:
    """The files behind `path`: it alone, for training, or those in the directory, or in its data/.

    Raises UserError (dataset): "dataset_not_found", "dataset_no_train", "dataset_unreadable", "too_many_shards", and
    "outside_roots" for a symbolic link that leads out of the directory.
    """
    try:
        path = path.resolve()
        if path.is_file():
            return Shards((path,), None)
        if not path.is_dir():
            raise told.refusal(f"There is no file or directory {path}.", "dataset_not_found")
        found = _listed(path, suffix)
        if not found and (path / _INNER).is_dir():
            found = _listed(check_inside(path / _INNER, [path]), suffix)
    except (OSError, RuntimeError, ValueError) as error:
        raise told.refusal(f"{path} cannot be listed: {error}.", "dataset_unreadable") from error
    if len(found) > MAX_SHARDS:
        message = f"{path} has {len(found)} files of the type {suffix}, more than {MAX_SHARDS}."
        raise told.refusal(message, "too_many_shards")
    files = [check_inside(each, [path]) if each.is_symlink() else each for each in found]
    splits = [_with_prefix(files, prefix) for prefix in ("train", *_TEST_PREFIXES)]
    train, tests = splits[0], [split for split in splits[1:] if split]
    if not train:
        raise told.refusal(f"{path} has no file train*{suffix}.", "dataset_no_train")
    return Shards(train, tests[0] if tests else None)


def _listed(directory: Path, suffix: str) -> list[Path]:
    shown = (path for path in directory.iterdir() if not path.name.startswith("."))
    return sorted(path for path in shown if path.suffix.lower() == suffix)


def _with_prefix(files: list[Path], prefix: str) -> tuple[Path, ...]:
    return tuple(path for path in files if path.name.lower().startswith(prefix))
