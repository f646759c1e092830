"""Which jobs, sweeps and models to list: the words that the client's lists take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, TypedDict


class JobFilter(TypedDict, total=False):
    """Which jobs to list. `search` is looked for in id, name, model, dataset and metadata; times are Unix seconds."""

    status: str | Iterable[str] | None
    model: str | None
    search: str | None
    owner: str | None
    metadata: Mapping[str, str] | None
    created_after: float | None
    created_before: float | None
    sweep: str | None
    order: str | None


class SweepFilter(TypedDict, total=False):
    """Which sweeps to list, as `JobFilter` has it."""

    status: str | Iterable[str] | None
    search: str | None
    owner: str | None
    metadata: Mapping[str, str] | None
    order: str | None


class ModelFilter(TypedDict, total=False):
    """Which models to list: a part of the name, whether they can be trained, bounds on the number of parameters."""

    search: str | None
    supported: Literal["true", "false", "all"]
    min_params: int | None
    max_params: int | None
