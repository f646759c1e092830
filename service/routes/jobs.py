"""Jobs: made, listed, read, and asked to end, pause, go on or begin again."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal, TypeVar

from fastapi import APIRouter, Header, Query, Request, Response

from scheduler.errors import UserError
from service.checks import check_arguments, check_model, check_paths, needs_catalogue
from service.datasets import resolved
from service.errors import InvalidRequestError, Issue
from service.kept import Kept
from service.lifecycle import JobState
from service.results import with_weights
from service.routes.world import PROBLEM, ByCaller, InWorld, Limit, World
from service.schemas import Job, Page, Sweep
from service.store import Caller, JobQuery
from service.telemetry import current_trace
from workers.contract import JobSpec

IdempotencyKey = Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=255)]
Moment = Annotated[float | None, Query(ge=0, le=2**40, description="Unix seconds")]
Seen = TypeVar("Seen", Job, Sweep)
Sort = Literal["created", "finished", "model", "priority", "status"]
MAX_FILTERS = 8

router = APIRouter(tags=["jobs"], responses=PROBLEM)


@router.post("", status_code=201, response_model=Job)
async def create_job(
    spec: JobSpec, world: InWorld, caller: ByCaller, response: Response, idempotency_key: IdempotencyKey = None
) -> Job:
    """Put a job into the queue; with an Idempotency-Key that was used within 24 hours, give that answer again."""
    owner, jobs, trace = caller.user_id, world.store.jobs, current_trace()
    known = None
    if names_files(spec):
        spec = await with_addresses(world, spec, caller)
        if idempotency_key is not None:
            # What was accepted once is not looked at again: its files may be gone by now.
            known = await asyncio.to_thread(lambda: jobs.replay(spec, owner=owner, idempotency_key=idempotency_key))
        if known is None:
            await check(world, spec, caller)
    if known is None:
        made, fresh = await jobs.create_together(spec, owner=owner, idempotency_key=idempotency_key, trace=trace)
    else:
        made, fresh = known, False
    return created(world, response, "jobs", made, fresh=fresh)


@router.get("", response_model=Page[Job])
def list_jobs(
    request: Request,
    world: InWorld,
    caller: ByCaller,
    after: Annotated[str | None, Query(max_length=80)] = None,
    limit: Limit = 20,
    order: Literal["asc", "desc"] = "desc",
    sort: Sort = "created",
    status: Annotated[list[JobState] | None, Query(description="One or more states")] = None,
    model: Annotated[str | None, Query(max_length=200)] = None,
    search: Annotated[
        str | None, Query(max_length=200, description="Part of id, name, model, dataset or metadata, in any case")
    ] = None,
    owner: Annotated[str | None, Query(max_length=80, description="A user's name; administrators only")] = None,
    created_after: Moment = None,
    created_before: Moment = None,
    sweep: Annotated[str | None, Query(max_length=80, description="The trials of this sweep")] = None,
) -> Page[Job]:
    """Jobs, by age and newest first unless asked otherwise; `metadata[KEY]=VALUE` narrows to those that have it."""
    query = JobQuery(
        after=after,
        limit=limit,
        order=order,
        sort=sort,
        status=tuple(status or ()),
        model=model,
        search=search,
        owner=narrowed(world, caller, owner),
        created_after=created_after,
        created_before=created_before,
        metadata=filters(request),
        sweep=sweep,
    )
    return world.store.jobs.list(query, world.standings.now)


@router.get("/{job_id}", response_model=Job)
def get_job(job_id: str, world: InWorld, caller: ByCaller) -> Job:
    """One job."""
    return world.store.jobs.get(job_id, owner=caller.reach, standings=world.standings.now)


@router.post("/{job_id}/cancel", response_model=Job)
def cancel_job(job_id: str, world: InWorld, caller: ByCaller) -> Job:
    """End a job; harmless when asked again."""
    return seen_soon(world, world.store.actions.cancel(job_id, owner=caller.reach))


@router.post("/{job_id}/pause", response_model=Job)
def pause_job(job_id: str, world: InWorld, caller: ByCaller) -> Job:
    """Have a job keep what it has learnt and give its devices back; harmless when asked again."""
    return seen_soon(world, world.store.actions.pause(job_id, owner=caller.reach))


@router.post("/{job_id}/resume", response_model=Job)
def resume_job(job_id: str, world: InWorld, caller: ByCaller) -> Job:
    """Put a paused job into the queue again; it goes on from its newest checkpoint."""
    return seen_soon(world, world.store.actions.resume(job_id, owner=caller.reach))


@router.post("/{job_id}/retry", response_model=Job)
def retry_job(job_id: str, world: InWorld, caller: ByCaller) -> Job:
    """Give a job that failed or was cancelled another attempt, under the same id."""
    return seen_soon(world, world.store.actions.retry(job_id, owner=caller.reach))


def created(world: World, response: Response, kind: str, made: Seen, *, fresh: bool) -> Seen:
    """What a request has made, or by its key an earlier one, and where it is found."""
    response.headers["Location"] = f"/v1/{kind}/{made.id}"
    if not fresh:
        response.headers["Idempotency-Replayed"] = "true"
    return seen_soon(world, made)


def seen_soon(world: World, job: Seen) -> Seen:
    """The job or sweep, of which the supervisor has been told that something is asked."""
    world.nudge()
    return job


def names_files(spec: JobSpec) -> bool:
    """Whether there is anything about the job that has to be looked up; the bundled model and data are at hand."""
    return needs_catalogue(spec) or spec.weights is not None or spec.dataset != "digits"


async def with_addresses(world: World, spec: JobSpec, caller: Caller) -> JobSpec:
    """The job with addresses in place of names of datasets and jobs. Raises InvalidRequestError."""
    spec = await asyncio.to_thread(resolved, spec, world.store, caller)
    return await asyncio.to_thread(with_weights, spec, world.store, world.settings, caller)


async def check(world: World, spec: JobSpec, caller: Caller) -> None:
    """Raise InvalidRequestError with everything that is wrong with the job's model, weights and dataset."""
    issues = []
    if needs_catalogue(spec):
        models = await world.catalogue.models()
        issues += check_model(spec.model, models) or check_arguments(spec, models)
    if spec.weights is not None or spec.dataset != "digits":
        kept = Kept(world.settings, world.store, caller)
        issues += await asyncio.to_thread(lambda: kept.check(spec) or check_paths(spec, world.settings.all_roots))
    if issues:
        raise InvalidRequestError(issues)


def narrowed(world: World, caller: Caller, owner: str | None) -> str | None:
    """Whose jobs are listed: an administrator may ask for anybody's, others get their own."""
    if owner is None:
        return caller.reach
    try:
        asked = world.store.access.user_named(owner).id
    except UserError:
        asked = ""
    return asked if caller.is_admin or asked == caller.user_id else ""


def filters(request: Request) -> dict[str, str]:
    """The filters `metadata[KEY]=VALUE`; FastAPI has no word for them."""
    found = {
        name[9:-1]: value
        for name, value in request.query_params.items()
        if name.startswith("metadata[") and name.endswith("]")
    }
    if len(found) > MAX_FILTERS:
        raise InvalidRequestError([Issue("metadata", f"Filter by at most {MAX_FILTERS} entries of metadata.")])
    return found
