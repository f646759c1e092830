"""Image folders: what classes and files a dataset has, read from directory listings alone.

ROOT/train/CLASS/*.jpg        the training images
ROOT/test/CLASS/*.jpg         or val/; optional
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from workers.sources.address import Address, check_inside
from workers.sources.source import Checked, Source, read_inside

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
TRAIN_DIR = "train"
TEST_DIRS = ("test", "val")
_LAYOUT = "Lay the images out as train/CLASS/*.jpg, with an optional test/ or val/ of the same shape."


def open_folder(address: Address) -> Source:
    """List an image folder.

    Names are sorted paths relative to its root, classes are sorted too. Raises UserError (dataset) for a missing
    folder or train/, those of `Checked.source`, and "outside_roots" for a symbolic link that leads out of the folder.
    Hidden entries, and files of other types, are passed over.
    """
    root = _resolved(Path(address.path))
    told = Checked(str(root), _LAYOUT)
    if not _is_dir(root):
        raise told.refusal(f"There is no folder {root}.", "dataset_not_found")
    train_dir = root / TRAIN_DIR
    if not _is_dir(train_dir):
        raise told.refusal(f"The folder {root} has no {TRAIN_DIR}/ in it.", "dataset_no_train")
    test_dir = next((root / name for name in TEST_DIRS if _is_dir(root / name)), None)
    train = _list_split(told, root, train_dir)
    test = _list_split(told, root, test_dir) if test_dir else None
    return told.source(train, test, partial(read_inside, root), root)


def _list_split(told: Checked, root: Path, split_dir: Path) -> dict[str, tuple[str, ...]]:
    """Class name to its files, both sorted; files relative to `root`."""
    check_inside(split_dir, [root])
    try:
        class_dirs = [entry for entry in _shown(split_dir, root) if entry.is_dir()]
        return {entry.name: _list_images(root, Path(entry)) for entry in class_dirs}
    except OSError as error:
        raise told.refusal(f"{split_dir} cannot be listed: {error.strerror}.", "dataset_unreadable") from error


def _list_images(root: Path, class_dir: Path) -> tuple[str, ...]:
    prefix = class_dir.relative_to(root).as_posix()
    names = [entry.name for entry in _shown(class_dir, root) if Path(entry.name).suffix.lower() in SUFFIXES]
    return tuple(f"{prefix}/{name}" for name in names)


def _shown(directory: Path, root: Path) -> list[os.DirEntry[str]]:
    """Entries that are not hidden, by name. Only links are resolved: a plain entry of an inside folder is inside."""
    with os.scandir(directory) as listing:
        entries = sorted((entry for entry in listing if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_symlink():
            check_inside(entry.path, [root])
    return entries


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError):
        raise Checked(str(path), _LAYOUT).refusal(f"There is no folder {path}.", "dataset_not_found") from None
