"""What every source of images is, and the rules that its classes have to meet."""

from __future__ import annotations

import os
import stat
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from scheduler.errors import UserError
from workers.sources.address import check_inside

MAX_IMAGE_BYTES = 64 << 20  # of one encoded image
MAX_IMAGES = 20_000_000
MAX_CLASSES = 100_000


class Pixels(NamedTuple):
    """An image that is stored without a format: planes of height × width bytes, one (grey) or three (RGB)."""

    width: int
    height: int
    planes: tuple[bytes, ...]


Stored = bytes | Pixels
Names = Mapping[str, tuple[str, ...]]  # class to its images


@dataclass(frozen=True)
class Source:
    """Labelled images as listed: none has been decoded yet.

    `train_files` and `test_files` give each class the names of its images in the order in which they are stored; every
    class of `classes` has a training image. `test_files` is None where the source has no split for testing. `read`
    takes a name to an image as it is stored: it may be called from several threads, and raises OSError, ValueError or
    UserError. `root` is the folder that the names are paths in, where every image is a file.
    """

    origin: str
    classes: tuple[str, ...]
    train_files: Names
    test_files: Names | None
    read: Callable[[str], Stored]
    root: Path | None = None


class Checked(NamedTuple):
    """How a kind of source words its refusals: where the images come from, and how they should be laid out."""

    origin: str
    layout: str

    def refusal(self, message: str, code: str) -> UserError:
        return UserError(message, code=code, param="dataset", remedy=self.layout)

    def source(
        self, train: Names, test: Names | None, read: Callable[[str], Stored], root: Path | None = None
    ) -> Source:
        """A source of `train`'s classes, in their order.

        Raises UserError (dataset): "dataset_no_classes", "too_many_images", "one_class", "empty_class",
        "ambiguous_classes" for names that differ in case alone, "unknown_test_class", "empty_test".
        """
        if not train:
            raise self.refusal(f"{self.origin} has no classes with training images.", "dataset_no_classes")
        self._check_sizes(train, test or {})
        empty = [name for name, files in train.items() if not files]
        if empty:
            message = f"The class {quoted(empty)} of {self.origin} has no images for training."
            raise self.refusal(message, "empty_class")
        unknown = [name for name in test or {} if name not in train]
        if unknown:
            message = f"{self.origin} has the class {quoted(unknown)} for testing, which its training images lack."
            raise self.refusal(message, "unknown_test_class")
        if test is not None and not any(test.values()):
            raise self.refusal(f"{self.origin} has a split for testing without images.", "empty_test")
        self._check_names(tuple(train))
        return Source(self.origin, tuple(train), train, test, read, root)

    def _check_sizes(self, train: Names, test: Names) -> None:
        count = sum(map(len, train.values())) + sum(map(len, test.values()))
        if count > MAX_IMAGES or len(train) > MAX_CLASSES:
            message = (
                f"{self.origin} has {count} images in {len(train)} classes, more than {MAX_IMAGES} in {MAX_CLASSES}."
            )
            raise self.refusal(message, "too_many_images")

    def _check_names(self, classes: tuple[str, ...]) -> None:
        alike: dict[str, list[str]] = defaultdict(list)
        for name in classes:
            alike[name.casefold()].append(name)
        twins = next((names for names in alike.values() if len(names) > 1), None)
        if twins:
            raise UserError(
                f"The classes {quoted(twins)} of {self.origin} differ in upper and lower case alone.",
                code="ambiguous_classes",
                param="dataset",
                remedy="Give all images of a class the same name, or make the names differ in more.",
            )
        if len(classes) < 2:
            raise UserError(
                f"{self.origin} has only the class {quoted(classes)}: there is nothing to tell apart.",
                code="one_class",
                param="dataset",
                remedy="Add images of at least one other class.",
            )


def read_inside(root: Path, name: str) -> bytes:
    """A whole file of `root`, a link that stays inside followed.

    Raises UserError "outside_roots", OSError, and ValueError for what is no regular file or larger than an image is.
    """
    with opened(check_inside(root / name, [root])) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_IMAGE_BYTES:
            raise ValueError(f"{size} bytes, more than {MAX_IMAGE_BYTES}")
        return file.read(MAX_IMAGE_BYTES + 1)


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A regular file under its resolved path, for reading. Raises OSError, and ValueError for what is none.

    A pipe could be waited for without end; a link that was put there since the path was resolved is not followed.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("not a regular file")
        yield file


def quoted(names: Sequence[str]) -> str:
    """The first five names, and how many more there are."""
    shown = ", ".join(f"'{name[:100]}'" for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
