"""Tar files in the WebDataset layout: an image and a label under one key.

    KEY.jpg, .jpeg, .png or .webp     the image
    KEY.cls                           its label, a number; or without it
    KEY.json                          an object with "label", a number or a string

An archive is listed when a source is opened and is never unpacked: an image is read by its place in the file. Its name
is `FILE/MEMBER`. Members of other types are passed over; an archive that holds anything but files and directories, or
names that a well-meant archive has not, is refused.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from workers.sources.address import Address
from workers.sources.labels import Labelled, from_labels
from workers.sources.shards import find_shards
from workers.sources.source import MAX_IMAGE_BYTES, MAX_IMAGES, Checked, Source, opened

SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp"})
MAX_LABEL_BYTES = 64 << 10
MAX_MEMBERS = 3 * MAX_IMAGES
_MAX_HEADER_BYTES = 1 << 20  # of a long name, say: the library reads it whole
_LAYOUT = (
    "Give a .tar file, or a directory with train-*.tar and optionally test-* or val-*, with KEY.jpg, .png or .webp and "
    "KEY.cls or KEY.json for every image, and nothing but regular files."
)


class Member(NamedTuple):
    """Where an image lies."""

    path: Path
    offset: int
    size: int


def open_webdataset(address: Address) -> Source:
    """List the archives and read their labels.

    Raises UserError (dataset): those of `find_shards` and `from_labels`, "bad_archive" for a file
    that cannot be read or is cut short, "bad_member" for an entry that has no place in a dataset.
    """
    told = Checked(address.path, _LAYOUT)
    shards = find_shards(told, Path(address.path), ".tar")
    images: dict[str, Member] = {}
    train = _labelled(told, shards.train, images)
    test = None if shards.test is None else _labelled(told, shards.test, images)

    def read(name: str) -> bytes:
        member = images[name]
        with opened(member.path) as file:
            return os.pread(file.fileno(), member.size, member.offset)

    return from_labels(told, train, test, read)


def _labelled(told: Checked, paths: tuple[Path, ...], images: dict[str, Member]) -> Labelled:
    """Label to the names of its images, whose places are added to `images`."""
    found: dict[int | str, list[str]] = defaultdict(list)
    for path in paths:
        archive = _Archive(told, path)
        for key, member in archive.images.items():
            if key not in archive.labels:
                raise archive.bad(f"the image '{key[:100]}' without a label")
            name = f"{path.name}/{key}.{archive.suffixes[key]}"
            images[name] = member
            found[archive.labels[key]].append(name)
        orphans = archive.labels.keys() - archive.images.keys()
        if orphans:
            raise archive.bad(f"the label '{min(orphans)[:100]}' without an image")
    return found


class _Archive:
    """One tar file as listed: images and labels by key."""

    def __init__(self, told: Checked, path: Path) -> None:
        self.path, self._told = path, told
        self.images: dict[str, Member] = {}
        self.suffixes: dict[str, str] = {}
        self.labels: dict[str, int | str] = {}
        self._notes: dict[str, bytes] = {}  # JSON by key
        try:
            with opened(path) as file:
                self._list(file, os.fstat(file.fileno()).st_size)
        except (tarfile.TarError, OSError, ValueError) as error:
            message = f"{path} cannot be read as a tar file: {str(error)[:200].rstrip('.')}."
            raise told.refusal(message, "bad_archive") from error

    def bad(self, what: str) -> Exception:
        return self._told.refusal(f"{self.path} holds {what}.", "bad_member")

    def _list(self, file: BinaryIO, num_bytes: int) -> None:
        names: set[str] = set()
        with tarfile.open(fileobj=_Headers(file), mode="r:") as archive:  # type: ignore[call-overload]
            while (member := archive.next()) is not None:
                archive.members.clear()  # the library would keep them all
                if len(names) >= MAX_MEMBERS:
                    raise self.bad(f"more than {MAX_MEMBERS} members")
                self._check(member, names, num_bytes)
                if member.isreg():
                    self._add(member, file)
            # The library takes a damaged header, or none, for the end.
            end = os.pread(file.fileno(), tarfile.BLOCKSIZE, archive.offset)
            if end != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"it is damaged or cut short at byte {archive.offset}")
        for key, note in self._notes.items():
            if key in self.images and key not in self.labels:
                self._label(key, "json", note)

    def _check(self, member: tarfile.TarInfo, names: set[str], num_bytes: int) -> None:
        name = member.name
        if not (member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.isdir()) or member.sparse is not None:
            raise self.bad(f"'{name[:100]}', which is neither a file nor a directory")
        parts = PurePosixPath(name).parts
        if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
            raise self.bad(f"the name '{name[:100]}', which leads out of the archive")
        if name in names:
            raise self.bad(f"'{name[:100]}' twice")
        names.add(name)
        if member.isreg() and member.offset_data + member.size > num_bytes:
            raise tarfile.ReadError(f"it is cut short in '{name[:100]}'")

    def _add(self, member: tarfile.TarInfo, file: BinaryIO) -> None:
        folder, _, base = member.name.removeprefix("./").rpartition("/")
        stem, _, suffix = base.partition(".")
        key, kind = f"{folder}/{stem}".lstrip("/"), suffix.lower()
        if not stem:  # a hidden file
            return
        limit = MAX_IMAGE_BYTES if kind in SUFFIXES else MAX_LABEL_BYTES if kind in ("cls", "json") else None
        if limit is None:
            return
        if member.size > limit:
            raise self.bad(f"'{member.name[:100]}' of {member.size} bytes, more than {limit}")
        if kind == "cls":
            self._label(key, kind, os.pread(file.fileno(), member.size, member.offset_data))
        elif kind == "json":
            self._notes[key] = os.pread(file.fileno(), member.size, member.offset_data)
        elif key in self.images:
            raise self.bad(f"two images under the key '{key[:100]}'")
        else:
            self.images[key], self.suffixes[key] = Member(self.path, member.offset_data, member.size), suffix

    def _label(self, key: str, kind: str, text: bytes) -> None:
        try:
            label = int(text) if kind == "cls" else json.loads(text)["label"]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise self.bad(f"no label in '{key[:100]}.{kind}'") from None
        if isinstance(label, bool) or not isinstance(label, int | str) or label in (-1, ""):
            raise self.bad(f"a label in '{key[:100]}.{kind}' that is neither a number nor a string")
        self.labels[key] = label


class _Headers:
    """A file of which only headers are read: a header that claims to be long is not taken into memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)
