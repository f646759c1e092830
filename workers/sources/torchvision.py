"""Datasets of torchvision that lie on this machine, in its own directories; nothing is downloaded, torch is not needed.

    MNIST, FashionMNIST, KMNIST   ROOT/NAME/raw/train-images-idx3-ubyte, …, unpacked
    CIFAR10, CIFAR100             ROOT/cifar-10-batches-bin/, ROOT/cifar-100-binary/: the "binary version"
    STL10                         ROOT/stl10_binary/
    OxfordIIITPet                 ROOT/oxford-iiit-pet/

All but the last are tables of pixels, of which an image is read by its place. CIFAR's "python version", which
torchvision itself reads, is a pickle: a program that would run here. Others are refused by name.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from scheduler.errors import UserError
from workers.sources.address import Address, check_inside
from workers.sources.labels import Label, Labelled, from_labels
from workers.sources.source import MAX_IMAGES, Checked, Pixels, Source, opened, read_inside

MAX_TEXT_BYTES = 16 << 20
_LAYOUT = (
    "Lay it out as torchvision's download does, unpacked, and give its root: torchvision:MNIST?root=/absolute/path."
)
_MATLAB = "its labels or pixels are a MATLAB file, which is taken into memory whole"
_REFUSED = {"SVHN": _MATLAB, "Flowers102": _MATLAB, "StanfordCars": _MATLAB}


def open_torchvision(address: Address) -> Source:
    """List a dataset of torchvision.

    Raises UserError (dataset): "unsupported_dataset" for one that is not read here, "dataset_not_found",
    "dataset_is_pickled", "bad_dataset_file" for files of another size or form, and those of `from_labels`.
    """
    name, root = address.options["name"], Path(address.path)
    opener = _OPENERS.get(name)
    if opener is None:
        raise _unsupported(name)
    told = Checked(f"{name} in {root}", _LAYOUT)
    try:
        return opener(told, root.resolve(), name)
    except FileNotFoundError as error:
        raise told.refusal(f"{name} lacks the file {error.filename}.", "dataset_not_found") from error
    except (OSError, ValueError) as error:
        raise told.refusal(f"{name} cannot be read: {str(error)[:200]}.", "bad_dataset_file") from error


class _Records(NamedTuple):
    """A file of records of one size: labels of some bytes, then planes of pixels, from `begin` on."""

    path: Path
    begin: int
    size: int  # of a record
    skip: int  # bytes of a record before its pixels
    side: int
    num_planes: int
    by_column: bool = False

    def read(self, row: int) -> Pixels:
        plane = self.side**2
        data = _at(self.path, self.begin + row * self.size + self.skip, plane * self.num_planes)
        planes = [data[index * plane : (index + 1) * plane] for index in range(self.num_planes)]
        if self.by_column:
            planes = [b"".join(each[row :: self.side] for row in range(self.side)) for each in planes]
        return Pixels(self.side, self.side, tuple(planes))


def _open_idx(told: Checked, root: Path, name: str) -> Source:
    """MNIST's format: a big-endian header with the sizes, then bytes."""
    raw = root / name / "raw"
    files: dict[str, _Records] = {}
    splits = []
    for split, part in (("train", "train"), ("test", "t10k")):
        images, labels = (_inside(root, raw / f"{part}-{what}-ubyte") for what in ("images-idx3", "labels-idx1"))
        header = [int.from_bytes(_at(images, place, 4), "big") for place in (0, 4, 8, 12)]
        count, side = header[1], header[2]
        if header[0] != 2051 or header[3] != side or not 0 < side <= 1024 or count > MAX_IMAGES:
            raise ValueError(f"{images} does not begin as an idx file of square images does")
        _has(images, 16 + count * side**2)
        _has(labels, 8 + count)
        files[split] = _Records(images, 16, side**2, 0, side, 1)
        splits.append(_rows(split, _at(labels, 8, count)))
    return from_labels(told, splits[0], splits[1], partial(_read_record, files), _IDX_CLASSES.get(name))


def _open_cifar(told: Checked, root: Path, name: str) -> Source:
    number = name.removeprefix("CIFAR")
    folder = root / f"cifar-{number}-{'batches-bin' if number == '10' else 'binary'}"
    pickled = root / f"cifar-{number}{'-batches-py' if number == '10' else '-python'}"
    if not folder.is_dir() and pickled.is_dir():
        raise UserError(
            f"{pickled} is the Python version of {name}: pickles, which are programs and are not run here.",
            code="dataset_is_pickled",
            param="dataset",
            remedy=f"Unpack the binary version, cifar-{number}-binary.tar.gz from the same page, into {root}.",
        )
    names = _lines(root, folder / ("batches.meta.txt" if number == "10" else "fine_label_names.txt"))
    parts = [f"data_batch_{index}.bin" for index in range(1, 6)] if number == "10" else ["train.bin"]
    skip = 1 if number == "10" else 2  # CIFAR-100 notes a coarse label before the fine one
    files: dict[str, _Records] = {}
    splits: list[dict[Label, list[str]]] = [defaultdict(list), defaultdict(list)]
    for part in (*parts, "test_batch.bin" if number == "10" else "test.bin"):
        path, record = _inside(root, folder / part), skip + 3 * 32**2
        count, rest = divmod(path.stat().st_size, record)
        if rest or count > MAX_IMAGES:
            raise ValueError(f"{path} is no whole number of records of {record} bytes")
        files[part] = _Records(path, 0, record, skip, 32, 3)
        labels = _every(path, record, skip - 1, count)
        for label, rows in _rows(part, labels).items():
            splits[part.startswith("test")][label].extend(rows)
    return from_labels(told, splits[0], splits[1], partial(_read_record, files), names)


def _open_stl(told: Checked, root: Path, name: str) -> Source:
    folder = root / "stl10_binary"
    names = _lines(root, folder / "class_names.txt")
    files: dict[str, _Records] = {}
    splits = []
    for split in ("train", "test"):
        images, labels = (_inside(root, folder / f"{split}_{what}.bin") for what in "Xy")
        count, record = labels.stat().st_size, 3 * 96**2
        if count > MAX_IMAGES:
            raise ValueError(f"{labels} has {count} labels")
        _has(images, count * record)
        files[split] = _Records(images, 0, record, 0, 96, 3, by_column=True)
        numbers = _at(labels, 0, count)
        if 0 in numbers:
            raise ValueError(f"{labels} has the label 0, and they count from 1 on")
        splits.append(_rows(split, bytes(number - 1 for number in numbers)))
    return from_labels(told, splits[0], splits[1], partial(_read_record, files), names)


def _open_pets(told: Checked, root: Path, name: str) -> Source:
    """Lines "Abyssinian_100 1 1 1" in annotations/trainval.txt and test.txt, and images/Abyssinian_100.jpg."""
    folder = root / "oxford-iiit-pet"
    splits: list[dict[Label, list[str]]] = []
    breeds: dict[int, str] = {}
    for split in ("trainval", "test"):
        found: dict[Label, list[str]] = defaultdict(list)
        for line in _lines(root, folder / "annotations" / f"{split}.txt"):
            words = re.fullmatch(r"(\w+)_(\d+) (\d{1,4}) \d \d+", line.strip())
            if words is None or words[3] == "0":
                raise ValueError(f"the line '{line[:100]}' of {split}.txt is not as expected")
            breed, label = words[1], int(words[3]) - 1
            if breeds.setdefault(label, breed) != breed:
                raise ValueError(f"the class {label + 1} is called {breeds[label]} and {breed}")
            found[label].append(f"images/{breed}_{words[2]}.jpg")
        splits.append(found)
    names = [breeds.get(label, "") for label in range(max(breeds, default=-1) + 1)]
    return from_labels(told, splits[0], splits[1], partial(read_inside, folder.resolve()), names)


_Opener = Callable[[Checked, Path, str], Source]
_OPENERS: Mapping[str, _Opener] = {
    "MNIST": _open_idx,
    "FashionMNIST": _open_idx,
    "KMNIST": _open_idx,
    "CIFAR10": _open_cifar,
    "CIFAR100": _open_cifar,
    "STL10": _open_stl,
    "OxfordIIITPet": _open_pets,
}
_IDX_CLASSES: Mapping[str, Sequence[str]] = {
    "FashionMNIST": (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    ),
    "KMNIST": ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
}  # fmt: skip


def _read_record(files: Mapping[str, _Records], name: str) -> Pixels:
    part, _, row = name.rpartition("#")
    return files[part].read(int(row))


def _rows(part: str, labels: bytes) -> Labelled:
    found: dict[Label, list[str]] = defaultdict(list)
    for row, label in enumerate(labels):
        found[label].append(f"{part}#{row:09d}")
    return found


def _at(path: Path, place: int, size: int) -> bytes:
    with opened(path) as file:
        data = os.pread(file.fileno(), size, place)
    if len(data) != size:
        raise ValueError(f"{path} is cut short")
    return data


def _every(path: Path, record: int, place: int, count: int) -> bytes:
    """One byte of each record."""
    with opened(path) as file:
        return bytes(file.read(record)[place] for _ in range(count))


def _has(path: Path, size: int) -> None:
    found = path.stat().st_size
    if found != size:
        raise ValueError(f"{path} has {found} bytes, not {size}")


def _inside(root: Path, path: Path) -> Path:
    """A regular file of the root, resolved. Raises OSError, ValueError, UserError "outside_roots"."""
    path = check_inside(path, [root])
    with opened(path):
        return path


def _lines(root: Path, path: Path) -> list[str]:
    path = _inside(root, path)
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise ValueError(f"{path} has more than {MAX_TEXT_BYTES} bytes")
    return [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]


def _unsupported(name: str) -> UserError:
    reason = _REFUSED.get(name, "only datasets whose files can be read safely and in part are")
    return UserError(
        f"torchvision's {name[:60]} is not read here: {reason}.",
        code="unsupported_dataset",
        param="dataset",
        remedy=f"Take one of {', '.join(_OPENERS)}, or save the images as folder:// or parquet://.",
    )
