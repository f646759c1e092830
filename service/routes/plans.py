"""Dry runs and devices: the plan that a job would get, and what has been measured."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from service.checks import sizes_of
from service.errors import ConflictError
from service.fleet import question, read_devices, read_live
from service.routes.world import PROBLEM, ByCaller, InWorld, World
from service.schemas import DeviceList, Preview, PreviewBody
from service.store import Caller

Answer = TypeVar("Answer")

router = APIRouter(tags=["plans"], responses=PROBLEM)


@router.post("/plans", response_model=Preview)
async def preview_plan(body: PreviewBody, request: Request, world: InWorld) -> JSONResponse:
    """A dry run: the plan that a job would get on these devices, with its reasons, before any device is touched."""
    sizes = sizes_of(body.model, await world.catalogue.models())
    live = body.devices == "live"
    records, warnings = await asyncio.to_thread(read_live, world.settings.devices_file) if live else ([], [])
    found = await _while_asked(request, world.planners.what_if(question(body, sizes, records)))
    return JSONResponse({"object": "plan_preview", "model": body.model, **found, "warnings": warnings})


@router.get("/devices", response_model=DeviceList)
def list_devices(world: InWorld, caller: ByCaller) -> DeviceList:
    """Every device that a job has measured: rates, memory, links, age, and which of the caller's jobs use it."""
    return read_devices(world.settings.devices_file, plans_of(world, caller))


def plans_of(world: World, caller: Caller) -> dict[str, dict[str, Any]]:
    """The plans by which the caller's jobs hold devices now, by job."""
    plans = world.store.jobs.plans_in_use()
    if caller.reach is None:
        return plans
    own = world.store.jobs.of_owner(caller.reach, set(plans))
    return {job_id: plan for job_id, plan in plans.items() if job_id in own}


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
