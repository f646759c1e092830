"""Image folders: what classes and files a dataset has, read from directory listings alone.

    ROOT/train/CLASS/*.jpg        the training images
    ROOT/test/CLASS/*.jpg         or val/; optional

No torch and no decoding here: the API process checks a submitted dataset with this file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from scheduler.errors import UserError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
TRAIN_DIR = "train"
TEST_DIRS = ("test", "val")
ROOTS_SETTING = "D2FT_ROOTS"
_LAYOUT = "Lay the images out as train/CLASS/*.jpg, with an optional test/ or val/ of the same shape."


@dataclass(frozen=True)
class FolderLayout:
    """An image folder as listed: nothing has been opened yet.

    `train_files` and `test_files` give each class its files as sorted paths relative to `root`; every class of
    `classes` (sorted) has at least one training file. `test_dir` is None, and `test_files` empty, where there is none.
    """

    root: Path
    train_dir: Path
    test_dir: Path | None
    classes: tuple[str, ...]
    train_files: Mapping[str, tuple[str, ...]]
    test_files: Mapping[str, tuple[str, ...]]


def parse_uri(uri: str) -> Path:
    """The path behind "folder:///absolute/path"; percent escapes are decoded.

    Raises UserError (dataset) when it is not such an address.
    """
    prefix, slash, rest = uri.partition("///")
    path = unquote(f"/{rest}")
    if prefix != "folder:" or not slash or "\0" in path:
        raise UserError(
            f"'{uri}' is not the address of an image folder.",
            code="bad_dataset_uri",
            param="dataset",
            remedy="Write it as folder:///absolute/path.",
        )
    return Path(path)


def check_inside(path: str | Path, roots: Iterable[str | Path], *, param: str = "dataset") -> Path:
    """Resolve `path`, symbolic links included, and refuse it unless it lies in one of `roots`.

    Use the returned path, not the one asked for: only it is known to lie inside. Raises UserError "outside_roots".
    """
    allowed = [Path(root).expanduser().resolve() for root in roots]
    try:
        resolved = Path(path).expanduser().resolve()
    except (OSError, RuntimeError, ValueError):  # a loop of links, a name too long, a NUL byte
        raise _outside(path, allowed, param) from None
    if not any(resolved.is_relative_to(root) for root in allowed):
        raise _outside(path, allowed, param)
    return resolved


def scan_classes(root: str | Path) -> FolderLayout:
    """List an image folder.

    Raises UserError (dataset) for a missing folder, no train/, no classes, a class without images in train/, and
    test classes that train/ lacks; UserError "outside_roots" for a symbolic link that leads out of `root`. Hidden
    entries, and files of other types, are passed over.
    """
    root = _resolved(Path(root))
    if not _is_dir(root):
        raise _refusal(f"There is no folder {root}.", "dataset_not_found")
    train_dir = root / TRAIN_DIR
    if not _is_dir(train_dir):
        raise _refusal(f"The folder {root} has no {TRAIN_DIR}/ in it.", "dataset_no_train")
    train_files = _list_split(root, train_dir)
    if not train_files:
        raise _refusal(f"{train_dir} has no class folders.", "dataset_no_classes")
    empty = [name for name, files in train_files.items() if not files]
    if empty:
        raise _refusal(f"No images in the class folder {_names(empty)} of {train_dir}.", "empty_class")
    test_dir = next((root / name for name in TEST_DIRS if _is_dir(root / name)), None)
    test_files = _list_split(root, test_dir) if test_dir else {}
    unknown = [name for name in test_files if name not in train_files]
    if unknown:
        raise _refusal(f"{test_dir} has the class {_names(unknown)} that {train_dir} lacks.", "unknown_test_class")
    if test_dir and not any(test_files.values()):
        raise _refusal(f"{test_dir} has no images.", "empty_test")
    return FolderLayout(root, train_dir, test_dir, tuple(train_files), train_files, test_files)


def _list_split(root: Path, split_dir: Path) -> dict[str, tuple[str, ...]]:
    """Class name to its files, both sorted; files relative to `root`."""
    check_inside(split_dir, [root])
    try:
        class_dirs = [entry for entry in _shown(split_dir, root) if entry.is_dir()]
        return {entry.name: _list_images(root, Path(entry)) for entry in class_dirs}
    except OSError as error:
        raise _refusal(f"{split_dir} cannot be listed: {error.strerror}.", "dataset_unreadable") from error


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
        raise _refusal(f"There is no folder {path}.", "dataset_not_found") from None


def _names(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _refusal(message: str, code: str) -> UserError:
    return UserError(message, code=code, param="dataset", remedy=_LAYOUT)


def _outside(path: str | Path, allowed: list[Path], param: str) -> UserError:
    roots = ", ".join(str(root) for root in allowed) or "none"
    return UserError(
        f"'{path}' lies outside the allowed roots ({roots}).",
        code="outside_roots",
        param=param,
        remedy=f"Move it under one of them, or have the operator widen the setting {ROOTS_SETTING}.",
    )
