"""The page of a job: what stands above on every tab, and what each tab is given.

What is written here is asked for again by the page when an event says that something has changed; pictures and logs
are drawn by the page from the API.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request, Response

from service.errors import NotFoundError
from service.lifecycle import PAUSABLE, RETRIED, JobState
from service.routes.world import ByCaller, InWorld
from service.schemas import Job, JobError
from service.store.records import Records
from service.web.errors import PageRoute
from service.web.jobs import leaves
from service.web.render import number, page
from workers.contract import JobSpec

TABS = {
    "overview": "Overview",
    "charts": "Charts",
    "heads": "Heads",
    "timeline": "Timeline",
    "placement": "Placement",
    "logs": "Logs",
    "events": "Events",
    "files": "Files",
    "config": "Config",
}
WRITTEN = ("overview", "events", "files")  # the tabs that are asked for again while the job goes on
DRAWN = ("charts",)  # those that need the library of charts
LEVELS = ("debug", "info", "warning", "error")
STEPS = "metrics"  # the type of event of which there is one a step; they are drawn, and listed only when asked for
ROWS = 100
MARKS = 500  # evaluations and restarts that charts show at the most
# what may be asked of a job, and in which states
ACTIONS: dict[str, frozenset[JobState]] = {
    "pause": PAUSABLE | {JobState.QUEUED},
    "resume": frozenset({JobState.PAUSED, JobState.PAUSING}),
    "retry": RETRIED,
    "cancel": frozenset(JobState)
    - {JobState.VALIDATING, JobState.CANCELLING, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED},
}
NEXT = {
    "user": "Correct what it says, and run it again; a retry would go the same way.",
    "capacity": "Ask for fewer workers or less memory, or retry it once the cluster has room.",
    "system": "Nothing is wrong with the job. Retry it: it goes on from its newest checkpoint.",
}
Some = Annotated[list[str], Query(max_length=40)]

router = APIRouter(route_class=PageRoute)


@dataclass(frozen=True)
class Asked:
    """A job that is looked at, where it is read, by whom, and which events are wanted."""

    job: Job
    records: Records
    reach: str | None
    types: list[str]
    levels: list[str]
    before: int | None


@router.get("/ui/jobs/{job_id}")
def overview(job_id: str, request: Request, world: InWorld, caller: ByCaller) -> Response:
    return tab_of(job_id, "overview", request, world, caller)


@router.get("/ui/jobs/{job_id}/{tab}")
def tab_of(
    job_id: str,
    tab: str,
    request: Request,
    world: InWorld,
    caller: ByCaller,
    type: Some = [],  # noqa: B006 - FastAPI copies it
    level: Some = [],  # noqa: B006
    before: Annotated[int | None, Query(ge=1, lt=2**31)] = None,
) -> Response:
    records, reach = world.store.records, caller.reach

    after, _ = records.end(job_id, owner=reach)  # first, so that what comes while the rest is read is heard live
    job = world.store.jobs.get(job_id, owner=reach, standings=world.standings.now)
    if tab not in TABS:
        remedy = f"There are {', '.join(TABS)}."
        raise NotFoundError(f"A job has no tab {tab}.", code="tab_not_found", remedy=remedy)
    asked = Asked(job, records, reach, type, [each for each in level if each in LEVELS], before)
    return page(
        request,
        "job.html",
        tab=tab,
        tabs=TABS,
        written=tab in WRITTEN,
        drawn=tab in DRAWN,
        here=request.url.path + (f"?{request.url.query}" if request.url.query else ""),
        actions=actions_of(job),
        job=job,
        after=after,
        **_CONTENT[tab](asked),
    )


def actions_of(job: Job) -> list[str]:
    """What may be asked of a job now; one that runs outside is not started again from here."""
    here = [action for action, states in ACTIONS.items() if job.status in states]
    return [action for action in here if not (job.outside and action in ("resume", "retry"))]


def advice(error: JobError) -> str:
    """What to do about it."""
    return NEXT.get(error.fault, NEXT["system"])


def _overview(asked: Asked) -> dict[str, Any]:
    error = asked.job.error
    return {
        "ledger": ledger_of(_document(asked, asked.records.ledger)),
        "method": dict(
            leaves({name: value for name, value in asked.job.method.items() if value not in (None, False, [], {})})
        ),
        "advice": advice(error) if error else None,
        "first": _first_accuracy(asked),
    }


def ledger_of(told: dict[str, Any] | None) -> dict[str, Any] | None:
    """What a page shows of a ledger; of one that is not as ours are, what can be shown."""
    if told is None:
        return None
    rows = (
        [row for row in told.get("rows") or [] if isinstance(row, dict)] if isinstance(told.get("rows"), list) else []
    )
    moves = told.get("migrations")
    return {
        "rows": [
            {name: row.get(name) for name in ("name", "unit", "predicted", "measured", "all_full")} for row in rows
        ],
        "accuracy": {when: _mapping(told, "accuracy").get(when) for when in ("before", "after")},
        "steps": number(told.get("steps")),
        "phases": _mapping(told, "phases"),
        "migrations": moves if isinstance(moves, list) else [],
    }


def _mapping(of: dict[str, Any] | None, name: str) -> dict[str, Any]:
    found = (of or {}).get(name)
    return found if isinstance(found, dict) else {}


def _first_accuracy(asked: Asked) -> float | None:
    """Before training: the oldest evaluation's, which is found without reading the steps behind it."""
    seen = asked.records.history(asked.job.id, types=("evaluation",), oldest=True, limit=1, owner=asked.reach)
    return next((number(event.data.get("accuracy")) for event in seen if event.data.get("when") == "before"), None)


def _charts(asked: Asked) -> dict[str, Any]:
    """Evaluations and restarts, oldest first, each restart with the step that came last before it."""
    kinds = ("evaluation", "attempt.lost", "checkpoint.resumed")
    seen = asked.records.history(asked.job.id, types=kinds, limit=MARKS, owner=asked.reach)
    marks = []
    for event in reversed(seen):
        mark = {"type": event.type, "attempt": event.attempt, "data": event.data}
        if event.type == "attempt.lost":
            last = asked.records.history(asked.job.id, types=(STEPS,), before=event.seq, limit=1, owner=asked.reach)
            mark["step"] = last[0].data.get("step", 0) if last else 0
        marks.append(mark)
    return {"marks": marks}


def _placement(asked: Asked) -> dict[str, Any]:
    """What a plan does not say: memory and busy time as they were measured."""
    windows = asked.records.history(asked.job.id, types=("window",), limit=1, owner=asked.reach)
    memory = _mapping(_document(asked, asked.records.ledger), "memory")
    return {"measured": {"busy": windows[0].data.get("busy") if windows else None, **memory}}


def _events(asked: Asked) -> dict[str, Any]:
    """A page of the history, newest first; steps only where they are asked for."""
    found = asked.records.history(
        asked.job.id,
        types=asked.types,
        without=() if asked.types else (STEPS,),
        levels=asked.levels,
        before=asked.before,
        limit=ROWS + 1,
        owner=asked.reach,
    )
    events, more = found[:ROWS], len(found) > ROWS
    kept = {"type": asked.types, "level": asked.levels}
    return {
        "events": events,
        "chosen": kept,
        "types": sorted({*asked.records.types(asked.job.id, owner=asked.reach), *asked.types}),
        "levels": LEVELS,
        "older": "?" + urlencode({**kept, "before": events[-1].seq}, doseq=True) if more else None,
        "newest": "?" + urlencode(kept, doseq=True) if asked.before else None,
    }


def _files(asked: Asked) -> dict[str, Any]:
    artifacts = asked.records.artifacts(asked.job.id, owner=asked.reach)
    return {
        "artifacts": [{"file": each, "form": form_of(each.name)} for each in artifacts],
        "checkpoints": asked.records.checkpoints(asked.job.id, owner=asked.reach),
    }


def form_of(name: str) -> str:
    """What a file is good for, by its name."""
    endings = {
        ".safetensors": "weights", ".onnx": "ONNX", ".md": "model card", ".json": "JSON", ".svg": "picture",
        ".png": "picture",
    }  # fmt: skip
    if "tfevents" in name:
        return "TensorBoard"
    return next((form for ending, form in endings.items() if name.endswith(ending)), "file")


def _config(asked: Asked) -> dict[str, Any]:
    spec = {key: value for key, value in asked.job.spec.items() if value is not None}
    usual = dict(leaves(JobSpec().model_dump(mode="json")))
    own = dict(leaves(asked.job.spec))
    pairs = {
        path: tuple(None if of.get(path) in ({}, []) else of.get(path) for of in (own, usual))
        for path in sorted({*own, *usual})
    }
    return {"spec": spec, "changed": {path: pair for path, pair in pairs.items() if pair[0] != pair[1]}}


def _logs(asked: Asked) -> dict[str, Any]:
    return {"ranks": range(int(asked.job.spec.get("workers", 1)))}


def _nothing(asked: Asked) -> dict[str, Any]:
    return {}


def _document(asked: Asked, read: Callable[..., dict[str, Any]]) -> dict[str, Any] | None:
    try:
        return read(asked.job.id, owner=asked.reach)
    except NotFoundError:
        return None


_CONTENT: dict[str, Callable[[Asked], dict[str, Any]]] = {
    "overview": _overview,
    "charts": _charts,
    "heads": _nothing,
    "timeline": _nothing,
    "placement": _placement,
    "logs": _logs,
    "events": _events,
    "files": _files,
    "config": _config,
}
