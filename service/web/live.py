"""The one live stream of a page: a job's events, a word when any job has changed, and a beat.

    job's channel ─┐
    changes ───────┼─► queue ─► server-sent events
    beat, 2 s ─────┘

Only the job's events have ids, so a page that comes back is sent what it missed of them. A page that hears no beat
knows that it shows what was.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event

from service.routes.records import SSE, After, LastEventId, resume_point
from service.routes.world import ByCaller, InWorld, World
from service.streams import Streams

BEAT_S = 2.0
CHANGES_S = 1.0  # between two words about jobs that have changed
QUEUED = 100
log = logging.getLogger(__name__)
router = APIRouter()
Put = Callable[[bytes], Awaitable[None]]


@router.get("/ui/live")
async def live(
    world: InWorld,
    caller: ByCaller,
    job: Annotated[str | None, Query(max_length=80)] = None,
    after: After = None,
    last_event_id: LastEventId = None,
) -> StreamingResponse:
    """What a page follows; of a job or a sweep its events behind `after`."""
    if job is not None:
        await asyncio.to_thread(lambda: world.store.records.end(job, owner=caller.reach))
    world.streams.room.check(caller.user_id)
    start = max(after or 0, resume_point(last_event_id))
    return StreamingResponse(
        merged(world, caller.user_id, job, start), media_type=SSE, headers={"X-Accel-Buffering": "no"}
    )


async def merged(world: World, user_id: str, job: str | None, after: int) -> AsyncIterator[bytes]:
    """All of it as one stream, without end; it ends when a part of it fails, and the page comes again."""
    queue: asyncio.Queue[bytes | None] = asyncio.Queue(QUEUED)
    parts = [_beats(queue.put), _changes(world.streams, queue.put)]
    if job is not None:
        parts.append(_events(world.streams, job, after, queue.put))
    running = [asyncio.create_task(_to_its_end(part, queue)) for part in parts]
    try:
        with world.streams.room.taken(user_id):
            while (piece := await queue.get()) is not None:
                yield piece
    finally:
        for task in running:
            task.cancel()


async def _to_its_end(part: Awaitable[None], queue: asyncio.Queue[bytes | None]) -> None:
    try:
        await part
    except Exception:
        log.exception("a live stream ends")
        await queue.put(None)


async def _events(streams: Streams, job: str, after: int, put: Put) -> None:
    async with aclosing(streams.events(job, after)) as pieces:
        async for piece in pieces:
            await put(piece)


async def _changes(streams: Streams, put: Put) -> None:
    with streams.watched() as changed:
        while True:
            await changed.wait()
            changed.clear()
            await put(format_sse_event(event="jobs", data_str="{}"))
            await asyncio.sleep(CHANGES_S)


async def _beats(put: Put) -> None:
    while True:
        await put(format_sse_event(event="beat", data_str=f"{time.time():.3f}"))
        await asyncio.sleep(BEAT_S)
