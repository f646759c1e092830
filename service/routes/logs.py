"""What a run printed: the driver's log and each rank's, by byte offsets, however large they are."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Response
from fastapi.responses import StreamingResponse

from service.errors import NotFoundError
from service.lifecycle import JobState
from service.routes.world import PROBLEM, ByCaller, InWorld, World, only_job
from service.store import Caller
from workers.logs import log_path

DRIVER = "driver"
MAX_BYTES = 1 << 20
FOLLOW_S = 0.5
PLAIN = "text/plain; charset=utf-8"
_HEADERS = {"X-Accel-Buffering": "no"}

router = APIRouter(tags=["jobs"], responses=PROBLEM, dependencies=[Depends(only_job)])
Offset = Annotated[int, Query(le=2**53, description="Bytes to pass over; negative counts from the end")]
Length = Annotated[int, Query(ge=1, le=MAX_BYTES)]
Number = Annotated[int | None, Query(ge=1, lt=2**31)]
Rank = Annotated[int | None, Query(ge=0, lt=10_000, description="A worker's log instead of the driver's")]

TEXT: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {}}, "description": "A part of the log, or with `follow` a stream"}
}


@router.get("/{job_id}/logs", response_class=Response, responses=TEXT)
async def read_logs(
    job_id: str,
    world: InWorld,
    caller: ByCaller,
    attempt: Number = None,
    rank: Rank = None,
    offset: Offset = 0,
    limit: Length = MAX_BYTES,
    follow: bool = False,
) -> Response:
    """Bytes of a log from `offset` on, at most `limit`: `X-Log-Offset` is where to go on, `X-Log-Size` its length.

    With `follow`, all from `offset` on and what is written until the attempt has ended.
    """
    return await log_of(job_id, world, caller, attempt, rank, offset, limit, follow=follow)


async def log_of(
    job_id: str,
    world: World,
    caller: Caller,
    attempt: int | None,
    rank: int | None,
    offset: int,
    limit: int,
    *,
    follow: bool,
) -> Response:
    """A part of a log of a job or a sweep, or a stream of it."""
    records = world.store.records
    await asyncio.to_thread(lambda: world.store.outside.check_here(job_id, "logs", owner=caller.reach))
    number, submission_id = await asyncio.to_thread(lambda: records.submission_id(job_id, attempt, owner=caller.reach))
    path = log_path(world.settings.attempt_dir(job_id, number), DRIVER if rank is None else f"rank{rank}")
    if follow:
        world.streams.room.check(caller.user_id)
        stream = _follow(world, caller, job_id, number, path, offset)
        return StreamingResponse(stream, media_type=PLAIN, headers=_HEADERS)
    found = await asyncio.to_thread(_read, path, offset, limit)
    if found is None and rank is not None:
        raise NotFoundError(f"There is no log of rank {rank}.", code="log_not_found", param="rank")
    if found is None:
        printed = (await world.ray.logs(submission_id) or "").encode()
        start = min(len(printed), offset if offset >= 0 else max(0, len(printed) + offset))
        found = printed[start : start + limit], start, len(printed)
    content, start, size = found
    headers = {"X-Log-Offset": str(start + len(content)), "X-Log-Size": str(size)}
    return Response(content, media_type=PLAIN, headers=headers)


async def _follow(
    world: World, caller: Caller, job_id: str, number: int, path: Path, offset: int
) -> AsyncIterator[bytes]:
    with world.streams.room.taken(caller.user_id):
        while True:
            # Whether it goes on is asked before the file is read: of a run that was over then, all is read now.
            state, newest = await asyncio.to_thread(world.store.records.stand, job_id)
            found = await asyncio.to_thread(_read, path, offset, MAX_BYTES)
            if found is not None:
                content, start, _ = found
                offset = start + len(content)
                if content:
                    yield content
                    continue
            if state.is_final or newest != number or state in (JobState.PAUSED, JobState.QUEUED):
                return
            await asyncio.sleep(FOLLOW_S)


def _read(path: Path, offset: int, limit: int) -> tuple[bytes, int, int] | None:
    """(bytes, where they begin, size of the file), or None where there is no plain file: the run writes there."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            return None
        size = found.st_size
        start = min(size, offset if offset >= 0 else max(0, size + offset))
        return os.pread(descriptor, min(limit, size - start), start), start, size
    finally:
        os.close(descriptor)
