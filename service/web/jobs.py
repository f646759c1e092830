"""The first page: all jobs, filtered, sorted and paged by the server; the address says what is shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request, Response

from service.lifecycle import JobState
from service.routes.jobs import Sort, narrowed
from service.routes.world import ByCaller, InWorld
from service.schemas import Job
from service.store import JobQuery
from service.web.errors import PageRoute
from service.web.render import page

ROWS = 50
# what people choose among, and the states behind it
GROUPS = {
    "waiting": (JobState.VALIDATING, JobState.QUEUED, JobState.PAUSED),
    "running": (
        JobState.PLANNING, JobState.STARTING, JobState.RUNNING, JobState.FINALIZING, JobState.RECOVERING,
        JobState.PAUSING, JobState.CANCELLING,
    ),
    "succeeded": (JobState.SUCCEEDED,),
    "failed": (JobState.FAILED,),
    "cancelled": (JobState.CANCELLED,),
}  # fmt: skip
COLUMNS = {"status": "Status", "created": "Job", "model": "Model"}  # by which a heading sorts
Text = Annotated[str, Query(max_length=200)]

router = APIRouter(route_class=PageRoute)


@router.get("/")
def list_of_jobs(
    request: Request,
    world: InWorld,
    caller: ByCaller,
    search: Text = "",
    status: Annotated[list[str], Query(max_length=len(GROUPS))] = [],  # noqa: B006 - FastAPI copies it
    model: Text = "",
    owner: Text = "",
    sweep: Annotated[str, Query(max_length=80)] = "",
    sort: Sort = "created",
    order: Annotated[str, Query(pattern="^(asc|desc)$")] = "desc",
    after: Annotated[str, Query(max_length=80)] = "",
) -> Response:
    shown = {
        "search": search, "status": groups_of(status), "model": model, "owner": owner, "sweep": sweep, "sort": sort,
        "order": order,
    }  # fmt: skip
    query = JobQuery(
        after=after or None,
        limit=ROWS,
        order=order,
        sort=sort,
        status=states_of(status),
        model=model or None,
        search=search.strip() or None,
        owner=narrowed(world, caller, owner or None),
        sweep=sweep or None,
    )
    found = world.store.jobs.list(query, world.standings.now)
    asked = {name: value for name, value in shown.items() if value and (name, value) not in _USUAL}
    return page(
        request,
        "jobs.html",
        jobs=found.data,
        asked=asked,
        shown=shown,
        groups=list(GROUPS),
        columns=COLUMNS,
        address=address,
        more=address(asked, after=found.last_id) if found.has_more else None,
        first=address(asked) if after else None,
    )


@router.get("/ui/compare")
def compare(
    request: Request,
    world: InWorld,
    caller: ByCaller,
    job: Annotated[list[str], Query(min_length=1, max_length=8)],
) -> Response:
    """The curves of up to eight jobs in one picture, and where they differ."""
    store = world.store.jobs
    jobs = [store.get(each, owner=caller.reach) for each in job]
    return page(request, "compare.html", jobs=jobs, rows=differences(jobs))


_USUAL = (("sort", "created"), ("order", "desc"))


def groups_of(asked: list[str]) -> list[str]:
    """Of the groups of states that are asked for, those that there are."""
    return [group for group in asked if group in GROUPS]


def states_of(asked: list[str]) -> tuple[JobState, ...]:
    """The states behind them."""
    return tuple(state for group in groups_of(asked) for state in GROUPS[group])


def address(asked: Mapping[str, object], path: str = "/", /, **changes: object) -> str:
    """A list's address with these changes."""
    pairs = {name: value for name, value in {**asked, **changes}.items() if value}
    return f"{path}?{urlencode(pairs, doseq=True)}" if pairs else path


def differences(jobs: list[Job]) -> dict[str, list[object]]:
    """The fields of the jobs' specs that are not alike, by path, with each job's value."""
    flat = [dict(leaves(job.spec)) for job in jobs]
    paths = sorted({path for each in flat for path in each})
    rows = {path: [each.get(path) for each in flat] for path in paths}
    return {path: values for path, values in rows.items() if any(value != values[0] for value in values)}


def leaves(value: object, path: str = "") -> list[tuple[str, object]]:
    if isinstance(value, dict) and value:
        return [leaf for key, of in value.items() for leaf in leaves(of, f"{path}.{key}" if path else str(key))]
    return [(path, value)]
