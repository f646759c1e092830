"""What belongs to a job: events, metrics, plan, ledger, artifacts, checkpoints."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.responses import FileResponse, StreamingResponse
from starlette.responses import MalformedRangeHeader, RangeNotSatisfiable

from service.errors import RangeError
from service.results import artifact_file
from service.routes.world import PROBLEM, ByCaller, InWorld, Limit, World, only_job
from service.schemas import Artifact, Checkpoint, Event, LedgerView, MetricsPage, Page, PlanView, TimelineView
from service.store import Caller
from service.store.jobs import page

MAX_POINTS = 2000
SSE = "text/event-stream"
BYTES = "application/octet-stream"

After = Annotated[int | None, Query(ge=0, lt=2**31)]
LastEventId = Annotated[str | None, Header(alias="Last-Event-ID")]
LIVE: dict[int | str, dict[str, Any]] = {200: {"content": {SSE: {}}, "description": "A page, or a live stream"}}
FILE: dict[int | str, dict[str, Any]] = {
    200: {"content": {BYTES: {}}, "description": "The file"},
    206: {"content": {BYTES: {}}, "description": "The part that `Range` asked for"},
}

router = APIRouter(tags=["jobs"], responses=PROBLEM, dependencies=[Depends(only_job)])


@router.get("/{job_id}/events", response_model=Page[Event], responses=LIVE)
async def read_events(
    job_id: str,
    request: Request,
    world: InWorld,
    caller: ByCaller,
    after: After = None,
    limit: Limit = 100,
    last_event_id: LastEventId = None,
) -> Any:
    """History from `after` on: a page, or with `Accept: text/event-stream` a stream that ends when the job has."""
    return await history(job_id, request, world, caller, after, limit, last_event_id)


async def history(
    job_id: str,
    request: Request,
    world: World,
    caller: Caller,
    after: int | None,
    limit: int,
    last_event_id: str | None,
) -> Any:
    """Of a job or a sweep, a page or a stream, as the request asks."""
    records, reach = world.store.records, caller.reach
    if SSE not in request.headers.get("accept", ""):
        return await asyncio.to_thread(lambda: records.events(job_id, after=after or 0, limit=limit, owner=reach))
    await asyncio.to_thread(lambda: records.end(job_id, owner=reach))
    world.streams.room.check(caller.user_id)
    # A browser that reconnects asks the same URL again: its header is the newer word.
    start = max(after or 0, resume_point(last_event_id))
    return StreamingResponse(
        world.streams.follow(job_id, start, caller.user_id),
        media_type=SSE,
        headers={"X-Accel-Buffering": "no"},
    )


@router.get("/{job_id}/metrics", response_model=MetricsPage)
def read_metrics(
    job_id: str,
    world: InWorld,
    caller: ByCaller,
    max_points: Annotated[int, Query(ge=1, le=MAX_POINTS)] = MAX_POINTS,
) -> MetricsPage:
    """What the steps measured, thinned evenly; the newest step is always among them."""
    return world.store.records.metrics(job_id, max_points=max_points, owner=caller.reach)


@router.get("/{job_id}/plan", response_model=PlanView)
def read_plan(job_id: str, world: InWorld, caller: ByCaller) -> PlanView:
    """The newest plan: placement, op tables, forecast, reasons."""
    return PlanView(job_id=job_id, plan=world.store.records.plan(job_id, owner=caller.reach))


@router.get("/{job_id}/timeline", response_model=TimelineView)
def read_timeline(job_id: str, world: InWorld, caller: ByCaller) -> TimelineView:
    """What every worker does when in a step: the newest plan's forecast, and the newest step that was traced."""
    forecast, measured = world.store.records.timeline(job_id, owner=caller.reach)
    return TimelineView(job_id=job_id, forecast=forecast, measured=measured)


@router.get("/{job_id}/ledger", response_model=LedgerView)
def read_ledger(job_id: str, world: InWorld, caller: ByCaller) -> LedgerView:
    """Predicted beside measured."""
    return LedgerView(job_id=job_id, ledger=world.store.records.ledger(job_id, owner=caller.reach))


@router.get("/{job_id}/checkpoints", response_model=Page[Checkpoint])
def list_checkpoints(job_id: str, world: InWorld, caller: ByCaller) -> Page[Checkpoint]:
    """The states from which the job can go on, newest first."""
    found = world.store.records.checkpoints(job_id, owner=caller.reach)
    return page(list(found), [checkpoint.name for checkpoint in found], more=False)


@router.get("/{job_id}/artifacts", response_model=Page[Artifact])
def list_artifacts(job_id: str, world: InWorld, caller: ByCaller) -> Page[Artifact]:
    """The files a job produced."""
    found = world.store.records.artifacts(job_id, owner=caller.reach)
    return page(list(found), [artifact.name for artifact in found], more=False)


class OnePart(FileResponse):
    """A file, or with `Range` a part of it. A range that cannot be read is passed over, and so are several at once."""

    @classmethod
    def _parse_range_header(cls, http_range: str, file_size: int) -> list[tuple[int, int]]:
        try:
            found = super()._parse_range_header(http_range, file_size)
        except MalformedRangeHeader:
            return []
        except RangeNotSatisfiable:
            raise RangeError(f"The file has {file_size} bytes.", code="range_not_satisfiable", param="Range") from None
        return found if len(found) == 1 else []


@router.get("/{job_id}/artifacts/{name:path}", response_class=FileResponse, responses=FILE)
def download_artifact(job_id: str, name: str, world: InWorld, caller: ByCaller) -> FileResponse:
    """One file, or with `Range` a part of it. `name` is looked up in the recorded list, never made into a path."""
    return file_of(job_id, name, world, caller)


def file_of(job_id: str, name: str, world: World, caller: Caller) -> FileResponse:
    """A file of a job or a sweep."""
    artifact, path = artifact_file(world.store, world.settings, job_id, name, owner=caller.reach)
    headers = {}
    if artifact.sha256:
        headers["Repr-Digest"] = f"sha-256=:{base64.b64encode(bytes.fromhex(artifact.sha256)).decode()}:"
    # Always plain bytes: by its name a file might be taken for a page.
    return OnePart(path, filename=Path(artifact.name).name, headers=headers, media_type=BYTES)


def resume_point(last_event_id: str | None) -> int:
    """The number in `Last-Event-ID`; 0 where it is none of ours."""
    ours = last_event_id is not None and last_event_id.isascii() and last_event_id.isdecimal()
    return int(last_event_id) if ours and last_event_id and len(last_event_id) < 10 else 0
