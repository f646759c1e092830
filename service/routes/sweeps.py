"""Sweeps: made, listed, read, ended and retried, with their history, logs and files."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import FileResponse

from service.errors import InvalidRequestError
from service.lifecycle import JobState
from service.routes.jobs import (
    IdempotencyKey,
    check,
    created,
    filters,
    names_files,
    narrowed,
    seen_soon,
    with_addresses,
)
from service.routes.logs import MAX_BYTES, TEXT, Length, Number, Offset, log_of
from service.routes.records import FILE, LIVE, After, LastEventId, file_of, history
from service.routes.world import PROBLEM, ByCaller, InWorld, Limit, only_sweep
from service.schemas import Artifact, Event, Page, Sweep
from service.store import JobQuery
from service.store.jobs import page
from service.telemetry import current_trace
from workers.sweeps.contract import SweepSpec

IS_SWEEP = [Depends(only_sweep)]

router = APIRouter(tags=["sweeps"], responses=PROBLEM)


@router.post("", status_code=201, response_model=Sweep)
async def create_sweep(
    spec: SweepSpec, world: InWorld, caller: ByCaller, response: Response, idempotency_key: IdempotencyKey = None
) -> Sweep:
    """Put a search over settings of a job into the queue; its trials are jobs. Idempotency-Key as for jobs."""
    owner, sweeps, trace = caller.user_id, world.store.sweeps, current_trace()
    known = None
    if names_files(spec.job):
        with _of_its_job():
            spec = spec.model_copy(update={"job": await with_addresses(world, spec.job, caller)})
        if idempotency_key is not None:
            known = await asyncio.to_thread(lambda: sweeps.replay(spec, owner=owner, idempotency_key=idempotency_key))
        if known is None:
            with _of_its_job():
                await check(world, spec.job, caller)
    if known is None:
        made, fresh = await asyncio.to_thread(
            lambda: sweeps.create(spec, owner=owner, idempotency_key=idempotency_key, trace=trace)
        )
    else:
        made, fresh = known, False
    return created(world, response, "sweeps", made, fresh=fresh)


@router.get("", response_model=Page[Sweep])
def list_sweeps(
    request: Request,
    world: InWorld,
    caller: ByCaller,
    after: Annotated[str | None, Query(max_length=80)] = None,
    limit: Limit = 20,
    order: Literal["asc", "desc"] = "desc",
    status: Annotated[list[JobState] | None, Query(description="One or more states")] = None,
    search: Annotated[
        str | None, Query(max_length=200, description="Part of id, name, model, dataset or metadata, in any case")
    ] = None,
    owner: Annotated[str | None, Query(max_length=80, description="A user's name; administrators only")] = None,
) -> Page[Sweep]:
    """Sweeps by age, newest first, without their trials; `metadata[KEY]=VALUE` narrows to those that have it."""
    query = JobQuery(
        after=after,
        limit=limit,
        order=order,
        status=tuple(status or ()),
        search=search,
        owner=narrowed(world, caller, owner),
        metadata=filters(request),
    )
    return world.store.sweeps.list(query)


@router.get("/{sweep_id}", response_model=Sweep)
def get_sweep(sweep_id: str, world: InWorld, caller: ByCaller) -> Sweep:
    """One sweep: its trials so far, their points, the fronts and the knee."""
    return world.store.sweeps.get(sweep_id, owner=caller.reach)


@router.post("/{sweep_id}/cancel", response_model=Sweep)
def cancel_sweep(sweep_id: str, world: InWorld, caller: ByCaller) -> Sweep:
    """End a sweep, and those of its trials that are not over; harmless when asked again."""
    return seen_soon(world, world.store.sweeps.cancel(sweep_id, owner=caller.reach))


@router.post("/{sweep_id}/retry", response_model=Sweep)
def retry_sweep(sweep_id: str, world: InWorld, caller: ByCaller) -> Sweep:
    """Give a sweep that failed or was cancelled another attempt: it goes on where it was, its trials are kept."""
    return seen_soon(world, world.store.sweeps.retry(sweep_id, owner=caller.reach))


@router.get("/{sweep_id}/events", response_model=Page[Event], responses=LIVE, dependencies=IS_SWEEP)
async def read_sweep_events(
    sweep_id: str,
    request: Request,
    world: InWorld,
    caller: ByCaller,
    after: After = None,
    limit: Limit = 100,
    last_event_id: LastEventId = None,
) -> Any:
    """The sweep's own history: a page, or with `Accept: text/event-stream` a stream that ends when the sweep has."""
    return await history(sweep_id, request, world, caller, after, limit, last_event_id)


@router.get("/{sweep_id}/logs", response_class=Response, responses=TEXT, dependencies=IS_SWEEP)
async def read_sweep_logs(
    sweep_id: str,
    world: InWorld,
    caller: ByCaller,
    attempt: Number = None,
    offset: Offset = 0,
    limit: Length = MAX_BYTES,
    follow: bool = False,
) -> Response:
    """What the sweep's own driver printed, as of a job; its trials have logs of their own."""
    return await log_of(sweep_id, world, caller, attempt, None, offset, limit, follow=follow)


@router.get("/{sweep_id}/artifacts", response_model=Page[Artifact], dependencies=IS_SWEEP)
def list_sweep_artifacts(sweep_id: str, world: InWorld, caller: ByCaller) -> Page[Artifact]:
    """The files that the sweep made of its trials: `sweep.json`, `front.svg`, `front.png`."""
    found = world.store.records.artifacts(sweep_id, owner=caller.reach)
    return page(list(found), [artifact.name for artifact in found], more=False)


@router.get("/{sweep_id}/artifacts/{name:path}", response_class=FileResponse, responses=FILE, dependencies=IS_SWEEP)
def download_sweep_artifact(sweep_id: str, name: str, world: InWorld, caller: ByCaller) -> FileResponse:
    """One of them, or with `Range` a part of it."""
    return file_of(sweep_id, name, world, caller)


@contextmanager
def _of_its_job() -> Iterator[None]:
    """Have what is wrong with the job named as it stands in the sweep."""
    try:
        yield
    except InvalidRequestError as error:
        raise InvalidRequestError([issue._replace(field=f"job.{issue.field}") for issue in error.issues]) from None
