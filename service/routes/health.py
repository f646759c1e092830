"""Whether the service is well: for load balancers, and for Prometheus."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from scheduler.errors import D2ftError
from service.errors import UnavailableError
from service.routes.world import PROBLEM, InWorld
from service.schemas import Health

router = APIRouter(tags=["health"])


@router.get("/healthz", response_model=Health)
async def healthz() -> Health:
    """The process answers."""
    return Health(status="ok")


@router.get("/readyz", response_model=Health, responses={503: {"model": Health, "description": "Not ready"}})
async def readyz(world: InWorld) -> JSONResponse:
    """Whether jobs can be taken (the store can be written) and run (Ray answers); only the first decides the status."""
    store = await _state_of(asyncio.to_thread(world.store.ping))
    checks = {"store": store, "ray": await _state_of(world.ray.ping())}
    degraded = set(checks.values()) != {"ok"}
    body = Health(status="degraded" if degraded else "ok", checks=checks)
    return JSONResponse(body.model_dump(), 200 if store == "ok" else 503)


@router.get("/metrics", response_class=PlainTextResponse, responses=PROBLEM)
def metrics(request: Request, world: InWorld) -> Response:
    """What the service measures of itself, for Prometheus; as OpenMetrics where `Accept` asks for it."""
    content, media_type = world.scrape.text(request.headers.get("accept", ""))
    return Response(content, headers={"Content-Type": media_type})


async def _state_of(check: Any) -> str:
    try:
        await check
    except UnavailableError as error:
        return error.code
    except D2ftError:
        return "failed"
    return "ok"
