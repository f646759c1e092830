"""Datasets: image folders and other kinds, registered under a name, listed, looked into, and forgotten again."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Query, Response

from service.datasets import Split, describe, describe_again, show
from service.kept import Kept
from service.routes.world import PROBLEM, ByCaller, InWorld, Limit
from service.schemas import Dataset, DatasetBody, Page, SampleList
from service.store import DatasetQuery

MAX_SAMPLES = 64

router = APIRouter(tags=["datasets"], responses=PROBLEM)


@router.post("/datasets", status_code=201, response_model=Dataset)
def register_dataset(body: DatasetBody, world: InWorld, caller: ByCaller, response: Response) -> Dataset:
    """Give a dataset a name; the same name and address again are listed anew and answered with 200.

    One in an object store or at the hub is not inspected: it has to lie under the roots, and workers look when a job
    begins.
    """
    Kept(world.settings, world.store, caller).check_dataset(body.uri)
    made, fresh = world.store.datasets.register(body, describe(body, world.settings.all_roots), caller)
    response.headers["Location"] = f"/v1/datasets/{made.id}"
    if not fresh:
        response.status_code = 200
    return made


@router.get("/datasets", response_model=Page[Dataset])
def list_datasets(
    world: InWorld,
    caller: ByCaller,
    after: Annotated[str | None, Query(max_length=80)] = None,
    limit: Limit = 20,
    search: Annotated[str | None, Query(max_length=200, description="Part of name or address, in any case")] = None,
) -> Page[Dataset]:
    """Registered datasets, newest first, without their classes."""
    return world.store.datasets.list(DatasetQuery(after, limit, search), caller)


@router.get("/datasets/{dataset_id}", response_model=Dataset)
def get_dataset(dataset_id: str, world: InWorld, caller: ByCaller) -> Dataset:
    """One dataset, by its id or by its name."""
    return world.store.datasets.get(dataset_id, caller)


@router.post("/datasets/{dataset_id}/inspect", response_model=Dataset)
def inspect_dataset(dataset_id: str, world: InWorld, caller: ByCaller) -> Dataset:
    """List the dataset anew."""
    dataset = world.store.datasets.get(dataset_id, caller)
    return world.store.datasets.update(dataset.id, describe_again(dataset, world.settings.all_roots), caller)


@router.delete("/datasets/{dataset_id}", response_model=Dataset)
def forget_dataset(dataset_id: str, world: InWorld, caller: ByCaller) -> Dataset:
    """Forget a dataset. Its files stay, and so do the jobs that were made with it."""
    return world.store.datasets.forget(dataset_id, caller)


@router.get("/datasets/{dataset_id}/samples", response_model=SampleList)
async def list_samples(
    dataset_id: str,
    world: InWorld,
    caller: ByCaller,
    split: Split = "train",
    per_class: Annotated[int, Query(ge=1, le=8)] = 4,
    limit: Annotated[int, Query(ge=1, le=MAX_SAMPLES)] = MAX_SAMPLES,
) -> SampleList:
    """A few images of every class as thumbnails; one that cannot be shown says why."""
    dataset = await asyncio.to_thread(world.store.datasets.get, dataset_id, caller)
    return await show(world.thumbnails, dataset, world.settings.all_roots, split, per_class, limit)
