"""Live event streams: server-sent events out of the store, woken by a bell when a job changes.

The bell only saves waiting. What is sent is always read from the store by `seq`, so a missed ring costs a second, never
an event, and a client that comes back with `Last-Event-ID` goes on exactly where it was.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from fastapi.sse import format_sse_event

from service.errors import TooManyError
from service.schemas import Event
from service.store import Store

PAGE = 200
LOOK_S = 1.0  # a change made by another process rings no bell here
HEARTBEAT_S = 15.0
RETRY_MS = 1000


class Bells:
    """Who waits for which job. Rung from any thread, heard on the event loop."""

    def __init__(self, max_streams: int) -> None:
        self._max_streams = max_streams
        self._waiting: dict[str, set[asyncio.Event]] = defaultdict(set)
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def num_open(self) -> int:
        return sum(map(len, self._waiting.values()))

    def attach(self) -> None:
        """Take the running event loop as the one to wake."""
        self._loop = asyncio.get_running_loop()

    def ring(self, job_id: str) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._ring, job_id)

    @contextmanager
    def listen(self, job_id: str) -> Iterator[asyncio.Event]:
        bell = asyncio.Event()
        self._waiting[job_id].add(bell)
        try:
            yield bell
        finally:
            self._waiting[job_id].discard(bell)
            if not self._waiting[job_id]:
                del self._waiting[job_id]

    def check_room(self) -> None:
        """Raise TooManyError when as many streams are open as may be."""
        if self.num_open >= self._max_streams:
            message = f"{self._max_streams} event streams are open, and no more may be."
            raise TooManyError(message, code="too_many_streams", remedy="Close one, or page by 'after'.")

    def _ring(self, job_id: str) -> None:
        for bell in self._waiting.get(job_id, ()):
            bell.set()


async def stream_events(store: Store, bells: Bells, job_id: str, after: int) -> AsyncIterator[bytes]:
    """Everything after `after`, then what comes, until the job has ended and all of it is sent."""
    yield format_sse_event(retry=RETRY_MS, comment="d2ft")
    silent_s = 0.0
    with bells.listen(job_id) as bell:
        while True:
            bell.clear()
            # The state is read before the events: a job that had ended then has all its events now.
            job = await asyncio.to_thread(store.jobs.get, job_id)
            page = await asyncio.to_thread(store.jobs.events, job_id, after=after, limit=PAGE)
            for event in page.data:
                after, silent_s = event.seq, 0.0
                yield _sse(event)
            if page.has_more:
                continue
            if job.is_final:
                return
            if silent_s >= HEARTBEAT_S:
                silent_s = 0.0
                yield format_sse_event(comment="still here")
            silent_s += await _wait(bell)


async def _wait(bell: asyncio.Event) -> float:
    try:
        await asyncio.wait_for(bell.wait(), LOOK_S)
    except TimeoutError:
        return LOOK_S
    return 0.0


def _sse(event: Event) -> bytes:
    return format_sse_event(data_str=event.model_dump_json(), event=event.type, id=str(event.seq))
