"""The routes of jobs, plans, devices and health. Thin: read the request, ask a room below, answer.

Each is there without `/v1`, too. What comes in has passed the door (`auth`); what goes wrong becomes a problem
(`problems`).
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse

from scheduler.errors import D2ftError
from service.catalogue import Catalogue
from service.checks import check_model, check_paths, needs_catalogue, sizes_of
from service.errors import ConflictError, InvalidRequestError, NotFoundError, UnavailableError
from service.fleet import question, read_devices, read_live
from service.lifecycle import JobState
from service.planners import Planners
from service.ray_jobs import RayJobs
from service.schemas import (
    Artifact,
    DeviceList,
    Event,
    Health,
    Job,
    LedgerView,
    MetricsPage,
    Page,
    PlanView,
    Preview,
    PreviewBody,
    Problem,
)
from service.settings import Settings
from service.store import JobQuery, Store
from service.streams import Bells, stream_events
from service.supervisor import DRIVER_LOG
from workers.contract import JobSpec

MAX_POINTS = 2000
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class World:
    """What the routes work with; made by `create_app`."""

    settings: Settings
    store: Store
    bells: Bells
    ray: RayJobs
    catalogue: Catalogue
    planners: Planners


def _world(request: Request) -> World:
    world = request.app.state.world
    assert isinstance(world, World)
    return world


def _owner(request: Request) -> str:
    """The key that the door let in."""
    return str(request.state.owner)


InWorld = Annotated[World, Depends(_world)]
Owner = Annotated[str, Depends(_owner)]
IdempotencyKey = Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=255)]
Limit = Annotated[int, Query(ge=1, le=100)]
_PROBLEM: dict[int | str, dict[str, Any]] = {"default": {"model": Problem, "description": "A problem (RFC 9457)"}}

jobs = APIRouter(tags=["jobs"], responses=_PROBLEM)
plans = APIRouter(tags=["plans"], responses=_PROBLEM)
health = APIRouter(tags=["health"])


@jobs.post("", status_code=201, response_model=Job, responses={200: {"model": Job, "description": "Made before"}})
async def create_job(
    spec: JobSpec, world: InWorld, owner: Owner, response: Response, idempotency_key: IdempotencyKey = None
) -> Job:
    """Put a job into the queue; with an Idempotency-Key that was used before, answer with the job it made."""
    jobs_ = world.store.jobs
    known = await asyncio.to_thread(lambda: jobs_.replay(spec, owner=owner, idempotency_key=idempotency_key))
    if known is None:
        await _check(world, spec)
        made, fresh = await asyncio.to_thread(lambda: jobs_.create(spec, owner=owner, idempotency_key=idempotency_key))
    else:
        made, fresh = known, False
    response.headers["Location"] = f"/v1/jobs/{made.id}"
    if not fresh:
        response.status_code = 200
        response.headers["Idempotency-Replayed"] = "true"
    return made


@jobs.get("", response_model=Page[Job])
def list_jobs(
    world: InWorld,
    after: str | None = None,
    limit: Limit = 20,
    order: Literal["asc", "desc"] = "desc",
    status: JobState | None = None,
) -> Page[Job]:
    """Jobs by age, newest first."""
    return world.store.jobs.list(JobQuery(after=after, limit=limit, order=order, status=status))


@jobs.get("/{job_id}", response_model=Job)
def get_job(job_id: str, world: InWorld) -> Job:
    """One job."""
    return world.store.jobs.get(job_id)


@jobs.post("/{job_id}/cancel", response_model=Job)
def cancel_job(job_id: str, world: InWorld) -> Job:
    """End a job; harmless when asked again."""
    return world.store.jobs.cancel(job_id)


@jobs.get(
    "/{job_id}/events",
    response_model=Page[Event],
    responses={200: {"content": {"text/event-stream": {}}, "description": "A page, or a live stream"}},
)
async def read_events(
    job_id: str,
    request: Request,
    world: InWorld,
    after: Annotated[int | None, Query(ge=0)] = None,
    limit: Limit = 100,
    last_event_id: Annotated[str | None, Header(alias="Last-Event-ID")] = None,
) -> Any:
    """History from `after` on: a page, or with `Accept: text/event-stream` a stream that ends when the job has."""
    if "text/event-stream" not in request.headers.get("accept", ""):
        return await asyncio.to_thread(lambda: world.store.jobs.events(job_id, after=after or 0, limit=limit))
    await asyncio.to_thread(world.store.jobs.get, job_id)
    world.bells.check_room()
    # A browser that reconnects asks the same URL again: its header is the newer word.
    start = max(after or 0, _resume_point(last_event_id))
    return StreamingResponse(
        stream_events(world.store, world.bells, job_id, start),
        media_type="text/event-stream",
        headers={"X-Accel-Buffering": "no"},
    )


@jobs.get("/{job_id}/metrics", response_model=MetricsPage)
def read_metrics(
    job_id: str, world: InWorld, max_points: Annotated[int, Query(ge=1, le=MAX_POINTS)] = MAX_POINTS
) -> MetricsPage:
    """What the steps measured."""
    return world.store.jobs.metrics(job_id, max_points=max_points)


@jobs.get("/{job_id}/plan", response_model=PlanView)
def read_plan(job_id: str, world: InWorld) -> PlanView:
    """The newest plan: placement, op tables, forecast."""
    return PlanView(job_id=job_id, plan=world.store.jobs.plan(job_id))


@jobs.get("/{job_id}/ledger", response_model=LedgerView)
def read_ledger(job_id: str, world: InWorld) -> LedgerView:
    """Predicted beside measured."""
    return LedgerView(job_id=job_id, ledger=world.store.jobs.ledger(job_id))


@jobs.get("/{job_id}/artifacts", response_model=Page[Artifact])
def list_artifacts(job_id: str, world: InWorld) -> Page[Artifact]:
    """The files a job produced."""
    found = world.store.jobs.artifacts(job_id)
    names = [artifact.name for artifact in found]
    return Page(data=list(found), first_id=names[0] if names else None, last_id=names[-1] if names else None)


@jobs.get("/{job_id}/artifacts/{name:path}", response_class=FileResponse)
def download_artifact(job_id: str, name: str, world: InWorld) -> FileResponse:
    """One file. `name` is looked up in the recorded list; it is never made into a path."""
    artifact = world.store.jobs.artifact(job_id, name)
    home = (world.settings.home / "jobs" / job_id).resolve()
    path = (home / artifact.path).resolve()
    if not path.is_relative_to(home) or not path.is_file():
        raise NotFoundError(f"The file of artifact '{artifact.name}' is gone.", code="artifact_gone", param="name")
    headers = {}
    if artifact.sha256:
        headers["Repr-Digest"] = f"sha-256=:{base64.b64encode(bytes.fromhex(artifact.sha256)).decode()}:"
    return FileResponse(path, filename=Path(artifact.name).name, headers=headers)


@jobs.get("/{job_id}/logs", response_class=PlainTextResponse)
async def read_logs(
    job_id: str,
    world: InWorld,
    attempt: Annotated[int | None, Query(ge=1)] = None,
    offset: Annotated[int, Query(ge=0)] = 0,
) -> PlainTextResponse:
    """What the driver of an attempt printed, from character `offset` on."""
    number, submission_id = await asyncio.to_thread(world.store.jobs.submission_id, job_id, attempt)
    kept = world.settings.attempt_dir(job_id, number) / DRIVER_LOG
    text = await asyncio.to_thread(_read_text, kept)
    if text is None:
        text = await world.ray.logs(submission_id) or ""
    return PlainTextResponse(text[offset:])


@plans.post("/plans", response_model=Preview)
async def preview_plan(body: PreviewBody, request: Request, world: InWorld) -> JSONResponse:
    """A dry run: the plan that a job would get on these devices, with its reasons, before any device is touched."""
    sizes = sizes_of(body.model, await world.catalogue.models())
    live = body.devices == "live"
    records, warnings = await asyncio.to_thread(read_live, world.settings.devices_file) if live else ([], [])
    found = await _while_asked(request, world.planners.what_if(question(body, sizes, records)))
    return JSONResponse({"object": "plan_preview", "model": body.model, **found, "warnings": warnings})


@plans.get("/devices", response_model=DeviceList)
def list_devices(world: InWorld) -> DeviceList:
    """Every device that a job has measured: rates, memory, links, age, and who uses it."""
    return read_devices(world.settings.devices_file, world.store.jobs.plans_in_use())


@health.get("/healthz", response_model=Health)
async def healthz() -> Health:
    """The process answers."""
    return Health(status="ok")


@health.get("/readyz", response_model=Health, responses={503: {"model": Health, "description": "Not ready"}})
async def readyz(world: InWorld) -> JSONResponse:
    """Whether jobs can be taken (the store can be written) and run (Ray answers); only the first decides the status."""
    store = await _state_of(asyncio.to_thread(world.store.ping))
    checks = {"store": store, "ray": await _state_of(world.ray.ping())}
    degraded = set(checks.values()) != {"ok"}
    body = Health(status="degraded" if degraded else "ok", checks=checks)
    return JSONResponse(body.model_dump(), 200 if store == "ok" else 503)


async def _check(world: World, spec: JobSpec) -> None:
    """Raise InvalidRequestError with everything that is wrong with the job's model, weights and dataset."""
    issues = []
    if needs_catalogue(spec):
        issues += check_model(spec.model, await world.catalogue.models())
    issues += await asyncio.to_thread(check_paths, spec, world.settings.all_roots)
    if issues:
        raise InvalidRequestError(issues)


async def _while_asked(request: Request, work: Coroutine[Any, Any, Answer]) -> Answer:
    """What the work gives; a client that goes away cancels it, so that its place is free for others."""
    working = asyncio.create_task(work)
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ConflictError("The client has gone away.", code="client_gone")
        return await working
    finally:
        working.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _resume_point(last_event_id: str | None) -> int:
    return int(last_event_id) if last_event_id and last_event_id.isdecimal() and len(last_event_id) < 16 else 0


async def _state_of(check: Any) -> str:
    try:
        await check
    except UnavailableError as error:
        return error.code
    except D2ftError:
        return "failed"
    return "ok"


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return None
