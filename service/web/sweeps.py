"""Sweeps: their list, and one with its trials, fronts and settings."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from service.routes.jobs import narrowed
from service.routes.world import ByCaller, InWorld
from service.store import JobQuery
from service.web.errors import PageRoute
from service.web.jobs import GROUPS, ROWS, Text, address, groups_of, states_of
from service.web.render import page

LIST = "/ui/sweeps"
FILES = ("sweep.json", "front.svg", "front.png")

router = APIRouter(route_class=PageRoute)


@router.get(LIST)
def list_of_sweeps(
    request: Request,
    world: InWorld,
    caller: ByCaller,
    search: Text = "",
    status: Annotated[list[str], Query(max_length=len(GROUPS))] = [],  # noqa: B006 - FastAPI copies it
    owner: Text = "",
    order: Annotated[str, Query(pattern="^(asc|desc)$")] = "desc",
    after: Annotated[str, Query(max_length=80)] = "",
) -> Response:
    """All sweeps, filtered and paged by the server; the address says what is shown."""
    shown = {"search": search, "status": groups_of(status), "owner": owner, "order": order}
    query = JobQuery(
        after=after or None,
        limit=ROWS,
        order=order,
        status=states_of(status),
        search=search.strip() or None,
        owner=narrowed(world, caller, owner or None),
    )
    found = world.store.sweeps.list(query)
    asked = {name: value for name, value in shown.items() if value and (name, value) != ("order", "desc")}
    return page(
        request,
        "sweeps.html",
        sweeps=found.data,
        asked=asked,
        shown=shown,
        groups=list(GROUPS),
        here=address(asked, LIST, after=after),
        turned=address(asked, LIST, order="" if shown["order"] == "asc" else "asc"),
        more=address(asked, LIST, after=found.last_id) if found.has_more else None,
        first=address(asked, LIST) if after else None,
    )


@router.get(f"{LIST}/{{sweep_id}}")
def one_sweep(request: Request, world: InWorld, caller: ByCaller, sweep_id: str) -> Response:
    """One sweep; the page's script draws its trials and keeps them up to date."""
    store = world.store
    heard, _ = store.records.end(sweep_id, owner=caller.reach)
    sweep = store.sweeps.get(sweep_id, owner=caller.reach)
    files = store.records.artifacts(sweep_id, owner=caller.reach)
    names = [file.name for file in files if file.name in FILES]
    return page(request, "sweep.html", sweep=sweep, heard=heard, files=names)
