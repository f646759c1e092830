"""Addresses of datasets: taken apart, and held against what the operator allows. Nothing is opened here."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote

from scheduler.errors import UserError

ROOTS_SETTING = "D2FT_ROOTS"
HOME_VARIABLE = "D2FT_SERVICE_HOME"  # the service's home, to the processes of a job: a machine may have its own
OPTIONS = {  # what may follow a "?", by kind
    "parquet": ("image", "label"),
    "hf": ("image", "label"),
    "torchvision": ("root",),
}
STORES = ("s3", "gs")  # object stores; "hf", the hub, is one by its address alone
_COMMIT = re.compile(r"([\w.-]+(?:/[\w.-]+)?)@([0-9a-f]{40})", re.ASCII)
_FORM = re.compile(r"(folder|parquet|webdataset)(?:\+(s3|gs))?://(.*)", re.DOTALL)


@dataclass(frozen=True)
class Address:
    """A dataset's address in its parts: `path` is absolute or, in the object store `store`, bucket and prefix."""

    kind: str
    path: str
    options: Mapping[str, str] = field(default_factory=dict)
    store: str | None = None

    @property
    def url(self) -> str:
        """Where it is in its store."""
        return f"{self.store}://{self.path}"


def address_of(text: str, names: tuple[str, ...] = ("torchvision:", "hf:")) -> str:
    """A plain path becomes an address; anything with a scheme, "digits" and what begins with `names` go as they are."""
    if text == "digits" or text.startswith(names) or "://" in text:
        return text
    return "folder://" + quote(os.path.abspath(Path(text).expanduser()))  # noqa: PTH100 - resolves .. without links


def parse_address(uri: str) -> Address:
    """Take an address apart; percent escapes are decoded, and two ways to write a path become the same.

    Raises UserError "bad_dataset_uri" (dataset).
    """
    if uri.startswith("torchvision:"):
        return _of_torchvision(uri)
    if uri.startswith("hf:"):
        return _of_hf(uri)
    form = _FORM.fullmatch(uri)
    if form is None:
        raise _bad(uri, "it is none of the known forms")
    kind, store, rest = form.groups()
    rest, options = _options(uri, kind, rest)
    path = unquote(rest)
    if store is None:
        return Address(kind, _absolute(uri, path), options)
    parts = path.rstrip("/").split("/")
    if any(part in ("", ".", "..") for part in parts) or re.search(r"[\\*?\[\]{}\0]", path):
        raise _bad(uri, "a bucket and a prefix have plain names")
    return Address(kind, "/".join(parts), options, store)


def check_address(uri: str, roots: Iterable[str | Path]) -> Address:
    """The address, if it lies in one of `roots`: paths, and prefixes such as s3://bucket/sets; a path is resolved.

    Raises UserError "outside_roots", and that of `parse_address`.
    """
    address = parse_address(uri)
    if address.store is None:
        return replace(address, path=str(check_inside(address.path, roots)))
    prefixes = [str(root).rstrip("/") for root in roots if is_remote(root)]
    if not any(address.url == prefix or address.url.startswith(f"{prefix}/") for prefix in prefixes):
        raise _outside(address.url, prefixes, "dataset")
    return address


def is_remote(root: str | Path) -> bool:
    """Whether a root is a prefix in an object store."""
    return "://" in str(root)


def check_inside(path: str | Path, roots: Iterable[str | Path], *, param: str = "dataset") -> Path:
    """Resolve `path`, symbolic links included, and refuse it unless it lies in one of `roots`.

    Prefixes of object stores among the roots are passed over. Use the returned path, not the one asked for: only it is
    known to lie inside. Raises UserError "outside_roots".
    """
    allowed = [Path(root).expanduser().resolve() for root in roots if not is_remote(root)]
    try:
        resolved = Path(path).expanduser().resolve()
    except (OSError, RuntimeError, ValueError):  # a loop of links, a name too long, a NUL byte
        raise _outside(path, allowed, param) from None
    # Behind a link that leads to itself nothing was resolved: "loop/../link" would come out as it went in.
    if os.path.realpath(resolved) != str(resolved) or not any(resolved.is_relative_to(root) for root in allowed):
        raise _outside(path, allowed, param)
    return resolved


def _of_torchvision(uri: str) -> Address:
    name, options = _options(uri, "torchvision", uri.removeprefix("torchvision:"))
    if not re.fullmatch(r"\w+", name, re.ASCII) or "root" not in options:
        raise _bad(uri, "torchvision's are written as torchvision:MNIST?root=/absolute/path")
    return Address("torchvision", _absolute(uri, options["root"]), {"name": name})


def _of_hf(uri: str) -> Address:
    rest, options = _options(uri, "hf", uri.removeprefix("hf:"))
    if rest.startswith("/"):
        return Address("hf", _absolute(uri, unquote(rest)), options)
    pinned = _COMMIT.fullmatch(rest)
    if pinned is None or ".." in pinned[1]:
        raise _bad(uri, "one of the hub is pinned to a commit, as in hf:OWNER/NAME@ and 40 hexadecimal digits")
    return Address("hf", pinned[1], {**options, "revision": pinned[2]}, "hf")


def _options(uri: str, kind: str, rest: str) -> tuple[str, dict[str, str]]:
    """(what is before the question mark, the options after it); in the path of a folder a question mark is one."""
    if kind not in OPTIONS:
        return rest, {}
    rest, _, query = rest.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    unknown = [name for name in options if name not in OPTIONS[kind]]
    if unknown:
        raise _bad(uri, f"'{unknown[0][:100]}' is not one of the options {', '.join(OPTIONS[kind])}")
    return rest, options


def _absolute(uri: str, path: str) -> str:
    if not path.startswith("/") or "\0" in path:
        raise _bad(uri, "its path is not absolute, or holds a NUL")
    return str(Path(path))


def _bad(uri: str, why: str) -> UserError:
    return UserError(
        f"'{uri[:200]}' is not the address of a dataset: {why}.",
        code="bad_dataset_uri",
        param="dataset",
        remedy="Write it as folder:///absolute/path, parquet:///absolute/path or webdataset:///absolute/path, or with "
        "an object store as in parquet+s3://bucket/prefix (+gs for Google's).",
    )


def _outside(path: str | Path, allowed: Sequence[str | Path], param: str) -> UserError:
    roots = ", ".join(str(root) for root in allowed) or "none"
    return UserError(
        f"'{path}' lies outside the allowed roots ({roots}).",
        code="outside_roots",
        param=param,
        remedy=f"Move it under one of them, or have the operator widen the setting {ROOTS_SETTING}.",
    )
