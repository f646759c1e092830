"""Addresses of datasets: taken apart, and held against what the operator allows. Nothing is opened here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, unquote

from scheduler.errors import UserError

ROOTS_SETTING = "D2FT_ROOTS"
OPTIONS = {"parquet": ("image", "label")}  # what may follow a "?", by kind
_FORM = re.compile(r"(folder|parquet|webdataset)://(/.*)", re.DOTALL)


@dataclass(frozen=True)
class Address:
    """A dataset's address in its parts: `path` is absolute."""

    kind: str
    path: str
    options: Mapping[str, str] = field(default_factory=dict)


def parse_address(uri: str) -> Address:
    """Take an address apart; percent escapes are decoded, and two ways to write a path become the same.

    Raises UserError "bad_dataset_uri" (dataset).
    """
    form = _FORM.fullmatch(uri)
    if form is None:
        raise _bad(uri, "it is none of the known forms")
    kind, rest = form.groups()
    options: dict[str, str] = {}
    if kind in OPTIONS:  # in the path of a folder a question mark is one
        rest, _, query = rest.partition("?")
        options = dict(parse_qsl(query, keep_blank_values=True))
        unknown = [name for name in options if name not in OPTIONS[kind]]
        if unknown:
            raise _bad(uri, f"'{unknown[0]}' is not one of the options {', '.join(OPTIONS[kind])}")
    path = unquote(rest)
    if "\0" in path:
        raise _bad(uri, "a path holds no NUL")
    return Address(kind, str(Path(path)), options)


def check_address(uri: str, roots: Iterable[str | Path]) -> Address:
    """The address with its path resolved, if that lies in one of `roots`. Raises UserError "outside_roots", and such
    as `parse_address`."""
    address = parse_address(uri)
    return Address(address.kind, str(check_inside(address.path, roots)), address.options)


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


def _bad(uri: str, why: str) -> UserError:
    return UserError(
        f"'{uri[:200]}' is not the address of a dataset: {why}.",
        code="bad_dataset_uri",
        param="dataset",
        remedy="Write it as folder:///absolute/path, parquet:///absolute/path or webdataset:///absolute/path.",
    )


def _outside(path: str | Path, allowed: list[Path], param: str) -> UserError:
    roots = ", ".join(str(root) for root in allowed) or "none"
    return UserError(
        f"'{path}' lies outside the allowed roots ({roots}).",
        code="outside_roots",
        param=param,
        remedy=f"Move it under one of them, or have the operator widen the setting {ROOTS_SETTING}.",
    )
