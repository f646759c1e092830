"""What the routes work with, and how they get at it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Query, Request

from service.catalogue import Catalogue
from service.errors import ForbiddenError, NotFoundError
from service.lifecycle import JOB, SWEEP, SWEEP_PREFIX
from service.outbound import Outbound
from service.planners import Planners
from service.predictors import Predictors
from service.ray_jobs import RayJobs
from service.schemas import Problem
from service.scrape import Scrape
from service.sessions import Sessions
from service.settings import Settings
from service.standing import Standings
from service.store import Attempt, Caller, Store
from service.streams import Streams
from service.thumbnails import Thumbnails
from service.webhooks import Signer

PROBLEM: dict[int | str, dict[str, Any]] = {"default": {"model": Problem, "description": "A problem (RFC 9457)"}}
Limit = Annotated[int, Query(ge=1, le=100)]


@dataclass(frozen=True)
class World:
    """The parts of the service; made by `create_app`."""

    settings: Settings
    store: Store
    streams: Streams
    standings: Standings
    ray: RayJobs
    catalogue: Catalogue
    planners: Planners
    scrape: Scrape
    thumbnails: Thumbnails
    predictors: Predictors
    signer: Signer
    outbound: Outbound
    sessions: Sessions
    nudge: Callable[[], None]  # tells the supervisor that a user has asked for something


async def _world(request: Request) -> World:
    world = request.app.state.world
    assert isinstance(world, World)
    return world


async def _caller(request: Request) -> Caller:
    """Who the door let in."""
    caller = request.state.caller
    assert isinstance(caller, Caller)
    return caller


async def _admin(request: Request) -> Caller:
    caller = await _caller(request)
    if not caller.is_admin:
        raise ForbiddenError("Only an administrator may do this.", code="admin_only")
    return caller


def only_job(job_id: str) -> None:
    """Raise NotFoundError for the id of a sweep, whose history, logs and files are at its own routes."""
    if job_id.startswith(SWEEP_PREFIX):
        raise NotFoundError(f"There is no job {job_id[:60]}.", code=f"{JOB}_not_found", param="id")


def only_sweep(sweep_id: str) -> None:
    """Raise NotFoundError for the id of a job."""
    if not sweep_id.startswith(SWEEP_PREFIX):
        raise NotFoundError(f"There is no sweep {sweep_id[:60]}.", code=f"{SWEEP}_not_found", param="id")


async def _attempt(request: Request) -> Attempt:
    """The attempt whose token the door let in."""
    attempt = request.state.attempt
    assert isinstance(attempt, Attempt)
    return attempt


InWorld = Annotated[World, Depends(_world)]
ByCaller = Annotated[Caller, Depends(_caller)]
ByAdmin = Annotated[Caller, Depends(_admin)]
ByRun = Annotated[Attempt, Depends(_attempt)]
