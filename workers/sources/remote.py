"""Datasets in an object store: copied once to this machine, whole or not at all, before they are opened.

    D2FT_HOME/cache/<key>/          a copy, with the store's names below the dataset's own
    D2FT_HOME/cache/<key>.lock      held exclusively by who copies, shared by who reads

The key is made of the address and of all names, sizes and tags (ETags, or what the store has like them), so that a
dataset that changes is another one. What comes must have the size that was listed, and the listing must be the same
after the copy. Old copies that nobody holds make room for new ones.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import fsspec

from scheduler.errors import CapacityError, SystemFault, UserError
from workers.disk import sync
from workers.sources.address import HOME_VARIABLE, Address
from workers.sources.source import MAX_IMAGES

MAX_CACHE_BYTES = 200_000_000_000
SPARE_BYTES = 1 << 30  # of the disk that is left free
THREADS = 8
POLL_S = 0.2
_PROTOCOLS = {"s3": ("s3", "s3"), "gs": ("gcs", "gcs")}  # by store: fsspec's name, and our extra
_SUFFIXES = {
    "folder": (".jpg", ".jpeg", ".png", ".webp", ".bmp"),
    "parquet": (".parquet",),
    "webdataset": (".tar",),
}
_TAGS = ("ETag", "etag", "md5Hash", "generation", "created")
_held: dict[str, int] = {}  # descriptors of the locks on copies that this process reads


class Entry(NamedTuple):
    """One object: its name below the dataset's own, its size, and what changes when its content does."""

    name: str
    size: int
    tag: str


def fetch(address: Address, progress: Callable[[], None] = lambda: None) -> Address:
    """The address of a copy on this machine; `progress` is called while it is made.

    Raises UserError (dataset): "remote_not_supported" where the store's library is missing, "dataset_not_found",
    "dataset_too_large", "bad_remote_name"; CapacityError "disk_full"; SystemFault "dataset_fetch_failed", and
    "dataset_changed" while it was copied.
    """
    assert address.store is not None
    files = filesystem(address.store)
    with _told(address):
        entries = _listed(files, address)
    key = hashlib.sha256(json.dumps([address.kind, address.url, entries]).encode()).hexdigest()[:32]
    cache = cache_dir()
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    copy = cache / key
    lock = _locked(cache, key, progress)
    try:
        if copy.is_dir():
            os.utime(copy)  # used last now
        else:
            _make_room(cache, sum(entry.size for entry in entries))
            _copy(files, address, entries, copy, progress)
        fcntl.flock(lock, fcntl.LOCK_SH)
    except BaseException:
        os.close(lock)
        raise
    _held[key] = lock
    local = copy / PurePosixPath(address.path).name if _is_file(address, entries) else copy
    return Address(address.kind, str(local), address.options)


def cache_dir() -> Path:
    """Below the D2FT_HOME of this machine, else below the service's, which a job's processes know by another name."""
    home = os.environ.get("D2FT_HOME") or os.environ.get(HOME_VARIABLE) or "~/.d2ft"
    return Path(home).expanduser() / "cache"


def filesystem(store: str) -> Any:
    """fsspec's view of a store, which finds endpoint and credentials as the store's own tools do."""
    protocol, extra = _PROTOCOLS[store]
    try:
        return fsspec.filesystem(protocol, use_listings_cache=False, skip_instance_cache=True)
    except ImportError as error:
        raise UserError(
            f"Datasets in {store}:// need a library that is not installed: {error}.",
            code="remote_not_supported",
            param="dataset",
            remedy=f"Install it on all nodes: pip install 'd2ft[{extra}]'.",
        ) from error


def _listed(files: Any, address: Address) -> list[Entry]:
    """The objects of the kind's types, by name."""
    found = files.find(address.path, detail=True)
    prefix = str(files._strip_protocol(address.path))
    entries = []
    for path, info in sorted(found.items()):
        name = PurePosixPath(path).name if path == prefix else path.removeprefix(f"{prefix}/")
        if info["type"] != "file" or not name.lower().endswith(_SUFFIXES[address.kind]):
            continue
        parts = name.split("/")
        if any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts):
            raise _refusal(address, f"has an object named '{name[:200]}', which is no path.", "bad_remote_name")
        entries.append(Entry(name, int(info["size"]), next((str(info[tag]) for tag in _TAGS if tag in info), "")))
    if not entries:
        kinds = ", ".join(_SUFFIXES[address.kind])
        raise _refusal(address, f"has no files of the types {kinds}.", "dataset_not_found")
    size = sum(entry.size for entry in entries)
    if len(entries) > MAX_IMAGES or size > MAX_CACHE_BYTES:
        message = f"has {len(entries)} files of {size} bytes, more than {MAX_IMAGES} or {MAX_CACHE_BYTES}."
        raise _refusal(address, message, "dataset_too_large")
    return entries


def _is_file(address: Address, entries: list[Entry]) -> bool:
    return [entry.name for entry in entries] == [PurePosixPath(address.path).name]


def _copy(files: Any, address: Address, entries: list[Entry], copy: Path, progress: Callable[[], None]) -> None:
    """Copy everything beside the target, and rename once it is whole and on the disk."""
    for left in copy.parent.glob(f".{copy.name}.*"):  # of one that was killed here
        shutil.rmtree(left, ignore_errors=True)
    draft = copy.with_name(f".{copy.name}.{secrets.token_hex(4)}")
    alone = _is_file(address, entries)
    heard = _Heard(progress)

    def bring(entry: Entry) -> None:
        target = draft / entry.name
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        files.get_file(address.path if alone else f"{address.path}/{entry.name}", str(target), callback=heard)
        if target.stat().st_size != entry.size:
            raise _changed(address)
        sync(target)

    try:
        draft.mkdir(mode=0o700)
        with _told(address):
            with ThreadPoolExecutor(THREADS) as threads:
                for _ in threads.map(bring, entries):
                    progress()
            if _listed(files, address) != entries:
                raise _changed(address)
        draft.rename(copy)
        sync(copy.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


class _Heard(fsspec.callbacks.Callback):  # type: ignore[misc]
    """Tells of every part of a large object that has come."""

    def __init__(self, progress: Callable[[], None]) -> None:
        super().__init__()
        self._progress = progress

    def relative_update(self, inc: int = 1) -> None:
        self._progress()


def _locked(cache: Path, key: str, progress: Callable[[], None]) -> int:
    """A descriptor with the exclusive lock on a copy; another process of this machine may be making it."""
    if key in _held:
        os.close(_held.pop(key))
    lock = os.open(cache / f"{key}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    while True:
        whole = (cache / key).is_dir()
        try:
            # Of a copy that is there, many may be readers.
            fcntl.flock(lock, (fcntl.LOCK_SH if whole else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            progress()
            time.sleep(POLL_S)
            continue
        if whole and not (cache / key).is_dir():  # it made room just now
            fcntl.flock(lock, fcntl.LOCK_UN)
            continue
        return lock


def _make_room(cache: Path, size: int) -> None:
    """Remove the copies used longest ago that nobody holds until `size` bytes fit. Raises CapacityError."""
    copies = sorted((path for path in cache.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    taken = {path: sum(each.stat().st_size for each in path.rglob("*") if each.is_file()) for path in copies}
    while copies and (
        sum(taken.values()) + size > MAX_CACHE_BYTES or shutil.disk_usage(cache).free < size + SPARE_BYTES
    ):
        oldest = copies.pop(0)
        if _removed(oldest):
            del taken[oldest]
    free = shutil.disk_usage(cache).free
    if sum(taken.values()) + size > MAX_CACHE_BYTES or free < size + SPARE_BYTES:
        raise CapacityError(
            f"The dataset has {size} bytes; of the disk with {cache} {free} are free, and {sum(taken.values())} of "
            f"{MAX_CACHE_BYTES} are taken by copies in use.",
            code="disk_full",
            param="dataset",
            remedy="Free some space, or set D2FT_HOME to a larger disk.",
        )


def _removed(copy: Path) -> bool:
    lock = os.open(copy.with_name(f"{copy.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(copy, ignore_errors=True)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return not copy.exists()


@contextmanager
def _told(address: Address) -> Iterator[None]:
    """Errors of the store's library in our words; what is the user's to mend, and what may be tried again."""
    try:
        yield
    except (UserError, SystemFault):
        raise
    except (FileNotFoundError, PermissionError) as error:
        message = f"cannot be read: {str(error)[:200] or type(error).__name__}."
        raise _refusal(address, message, "dataset_not_found") from error
    except Exception as error:  # every store's library has exceptions of its own
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise CapacityError(f"No space is left for {address.url}.", code="disk_full", param="dataset") from error
        raise SystemFault(
            f"{address.url} could not be copied: {type(error).__name__}: {str(error)[:200]}.",
            code="dataset_fetch_failed",
            param="dataset",
        ) from error


def _changed(address: Address) -> SystemFault:
    return SystemFault(f"{address.url} changed while it was copied.", code="dataset_changed", param="dataset")


def _refusal(address: Address, what: str, code: str) -> UserError:
    remedy = "Check the bucket, the prefix and the credentials of the nodes that train."
    return UserError(f"{address.url} {what}", code=code, param="dataset", remedy=remedy)
