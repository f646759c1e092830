"""Registered datasets: what they hold, a few of their images, and the address behind a job's `dataset:NAME`.

Names of files and classes are whatever somebody wrote: they are shown as Unicode, and nothing else is done to them.
Whoever draws them must escape them.
"""

from __future__ import annotations

import asyncio
import difflib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from scheduler.errors import UserError
from service.errors import ConflictError, InvalidRequestError, Issue
from service.schemas import Dataset, DatasetBody, Sample, SampleList
from service.store import Caller, Store
from service.thumbnails import Thumbnails
from workers.contract import JobSpec
from workers.sources.address import check_address
from workers.sources.opening import open_source
from workers.sources.source import Source

SCHEME = "dataset:"
Split = Literal["train", "test"]


def describe(body: DatasetBody, roots: Sequence[str | Path]) -> dict[str, Any]:
    """What the store notes of a dataset that is to be registered: of one that lies elsewhere only that it may.

    Raises UserError about the field `uri`.
    """
    try:
        if check_address(body.uri, roots).store is not None:
            return {"classes": [], "inspected_at": None}
        return _summary(_source(body.uri, roots))
    except UserError as error:
        raise UserError(_shown(error.message), code=error.code, param="uri", remedy=error.remedy) from None


def describe_again(dataset: Dataset, roots: Sequence[str | Path]) -> dict[str, Any]:
    """The same of one that is registered. Raises ConflictError where it is no dataset any more, or lies elsewhere."""
    return _summary(_source_now(dataset, roots))


def choose(
    dataset: Dataset, roots: Sequence[str | Path], *, split: Split, per_class: int, limit: int
) -> tuple[Source, list[tuple[str, str]]]:
    """(the source, (class, name) of the images to show). Raises ConflictError as above.

    Spread evenly over each class, since neighbours are often alike; every class gets one before any gets a second.
    """
    source = _source_now(dataset, roots)
    files = source.train_files if split == "train" else source.test_files or {}
    spread = {name: _spread(files.get(name, ()), per_class) for name in source.classes}
    rounds = [(turn, name, found[turn]) for name, found in spread.items() for turn in range(len(found))]
    chosen = sorted(sorted(rounds)[:limit], key=lambda each: (each[1], each[0]))
    return source, [(name, file) for _, name, file in chosen]


async def show(
    thumbnails: Thumbnails, dataset: Dataset, roots: Sequence[str | Path], split: Split, per_class: int, limit: int
) -> SampleList:
    """A few images of a dataset with their thumbnails. Raises ConflictError as above."""
    source, chosen = await asyncio.to_thread(choose, dataset, roots, split=split, per_class=per_class, limit=limit)
    names = [name for _, name in chosen]
    if not names:
        return SampleList(data=[])
    if source.root is not None:
        answers = await thumbnails.make(source.root, names)
    else:
        answers = await thumbnails.make_of(dataset.uri, roots, names)
    return SampleList(data=[_sample(split, *each, told) for each, told in zip(chosen, answers, strict=True)])


def resolved(spec: JobSpec, store: Store, caller: Caller) -> JobSpec:
    """The job with the address in place of `dataset:NAME`. Raises InvalidRequestError where the caller has no such."""
    if not spec.dataset.startswith(SCHEME):
        return spec
    name = spec.dataset.removeprefix(SCHEME)
    known = store.datasets.uris(caller.user_id)
    if name in known:
        return spec.model_copy(update={"dataset": known[name]})
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"Did you mean {', '.join(near)}?" if near else "Register it first: POST /v1/datasets."
    message = f"You have no dataset named '{name[:100]}'. {hint}"
    raise InvalidRequestError([Issue("dataset", message, "dataset_not_registered")])


def _source(uri: str, roots: Sequence[str | Path]) -> Source:
    address = check_address(uri, roots)
    if address.store is not None:
        raise UserError(
            f"{address.url} is not inspected by the API, which has not the workers' credentials.",
            code="remote_not_inspected",
            param="dataset",
            remedy="Its workers look into it when a job begins, and the job says what is wrong.",
        )
    return open_source(address)


def _source_now(dataset: Dataset, roots: Sequence[str | Path]) -> Source:
    try:
        return _source(dataset.uri, roots)
    except UserError as error:
        raise ConflictError(_shown(error.message), code=error.code, remedy=error.remedy) from None


def _summary(source: Source) -> dict[str, Any]:
    classes = [
        {
            "name": _shown(name),
            "num_train": len(source.train_files[name]),
            "num_test": len((source.test_files or {}).get(name, ())),
        }
        for name in source.classes
    ]
    return {"classes": classes, "inspected_at": int(time.time())}


def _spread(files: Sequence[str], count: int) -> list[str]:
    count = min(count, len(files))
    return [files[turn * len(files) // count] for turn in range(count)]


def _sample(split: Split, label: str, file: str, told: Mapping[str, Any]) -> Sample:
    said: dict[str, Any] = {"split": split, "label": _shown(label), "file": _shown(file)}
    if "error" in told:
        return Sample(**said, error=_shown(told["error"]))
    thumbnail = f"data:image/png;base64,{told['png']}"
    return Sample(**said, width=told["width"], height=told["height"], thumbnail=thumbnail)


def _shown(text: str) -> str:
    """Text from the file system as Unicode: a byte of a name that is none becomes a question mark in a diamond."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
