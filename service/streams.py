"""Live event streams: server-sent events out of the store, read once per job however many listen.

    store ─► channel of a job (one reader, a ring of what came last) ─► listener, listener, …

A commit in this process rings the channel's bell; one made by another process is seen within `LOOK_S`. A listener that
is new, or too slow for the ring, reads from the store by `seq` until it has caught up: so a missed ring costs a second,
never an event, and a client that comes back with `Last-Event-ID` goes on exactly where it was.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager

from fastapi.sse import format_sse_event

from service.errors import TooManyError, UnavailableError
from service.schemas import Event
from service.store import Store

PAGE = 200
RING = 1000
LOOK_S = 1.0
PAUSE_S = 0.05  # between two looks, so that a burst is sent in few pieces
HEARTBEAT_S = 15.0
RETRY_MS = 1000
log = logging.getLogger(__name__)


class Room:
    """How many streams may be open, at all and for one user."""

    def __init__(self, max_open: int, max_each: int) -> None:
        self._max_open = max_open
        self._max_each = max_each
        self._open: Counter[str] = Counter()

    @property
    def num_open(self) -> int:
        return self._open.total()

    def check(self, user_id: str) -> None:
        """Raise TooManyError when as many streams are open as may be."""
        if self.num_open < self._max_open and self._open[user_id] < self._max_each:
            return
        message = f"{self._open[user_id]} streams of yours are open, {self.num_open} in all, and no more may be."
        raise TooManyError(message, code="too_many_streams", remedy="Close one, or page by 'after'.")

    @contextmanager
    def taken(self, user_id: str) -> Iterator[None]:
        self._open[user_id] += 1
        try:
            yield
        finally:
            self._open[user_id] -= 1
            if not self._open[user_id]:
                del self._open[user_id]


class Streams:
    """Who listens to which job. Rung from any thread, heard on the event loop."""

    def __init__(self, store: Store, room: Room) -> None:
        self._store = store
        self._channels: dict[str, _Channel] = {}
        self._watchers: set[asyncio.Event] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.room = room

    def attach(self) -> None:
        """Take the running event loop as the one to wake."""
        self._loop = asyncio.get_running_loop()

    def ring(self, job_id: str) -> None:
        """Say that a job has changed; from any thread."""
        heard = job_id in self._channels or self._watchers
        if heard and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._ring, job_id)

    @contextmanager
    def watched(self) -> Iterator[asyncio.Event]:
        """An event that is set when any job changes in this process; whoever waits for it clears it."""
        changed = asyncio.Event()
        self._watchers.add(changed)
        try:
            yield changed
        finally:
            self._watchers.discard(changed)

    async def follow(self, job_id: str, after: int, user_id: str) -> AsyncIterator[bytes]:
        """The job's events as a stream of this user's own."""
        with self.room.taken(user_id):
            async with aclosing(self.events(job_id, after)) as pieces:
                async for piece in pieces:
                    yield piece

    async def events(self, job_id: str, after: int) -> AsyncGenerator[bytes]:
        """Everything after `after`, then what comes, until the job has ended and all of it is sent."""
        with self._listen(job_id) as channel:
            yield format_sse_event(retry=RETRY_MS, comment="d2ft")
            while True:
                news = channel.news
                held = channel.since(after)
                if held is None:
                    events, over = await asyncio.to_thread(self._store.records.tail, job_id, after, PAGE)
                    held = [(event.seq, _sse(event)) for event in events]
                    if not held and over:
                        return
                if held:
                    after = held[-1][0]
                    yield b"".join(text for _, text in held)
                elif channel.over_at is not None and after >= channel.over_at:
                    return
                elif not await _came(news, HEARTBEAT_S):
                    yield format_sse_event(comment="still here")

    @contextmanager
    def _listen(self, job_id: str) -> Iterator[_Channel]:
        channel = self._channels.get(job_id)
        if channel is None or channel.is_over:
            channel = self._channels[job_id] = _Channel(self._store, job_id)
        channel.num_listeners += 1
        try:
            yield channel
        finally:
            channel.num_listeners -= 1
            if not channel.num_listeners:
                channel.close()
                if self._channels.get(job_id) is channel:
                    del self._channels[job_id]

    def _ring(self, job_id: str) -> None:
        if job_id in self._channels:
            self._channels[job_id].bell.set()
        for changed in self._watchers:
            changed.set()


class _Channel:
    """One job's reader and what it read last. `over_at` is the last `seq` of a job that has ended."""

    def __init__(self, store: Store, job_id: str) -> None:
        self._store = store
        self._job_id = job_id
        self._ring: deque[tuple[int, bytes]] = deque(maxlen=RING)
        self._newest: int | None = None  # unknown until the first look
        self.num_listeners = 0
        self.over_at: int | None = None
        self.news = asyncio.Event()
        self.bell = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    @property
    def is_over(self) -> bool:
        return self._reading.done()

    def close(self) -> None:
        self._reading.cancel()

    def since(self, after: int) -> list[tuple[int, bytes]] | None:
        """What came after `after`, at most a page; None where the ring does not reach back so far."""
        if self._newest is None:
            return None
        if after >= self._newest:
            return []
        if not self._ring or self._ring[0][0] > after + 1:
            return None
        # Numbers have no gaps: the place in the ring follows from them.
        first = after + 1 - self._ring[0][0]
        return [self._ring[i] for i in range(first, min(first + PAGE, len(self._ring)))]

    async def _read(self) -> None:
        newest = 0
        while self.over_at is None:
            self.bell.clear()
            try:
                newest = await self._look(newest)
            except UnavailableError as error:
                log.warning("the events of %s cannot be read: %s", self._job_id, error)
            if self.over_at is None:
                await _came(self.bell, LOOK_S)
                await asyncio.sleep(PAUSE_S)

    async def _look(self, newest: int) -> int:
        """Read what is new since `newest`; the first look only learns where the end is."""
        if self._newest is None:
            newest, over = await asyncio.to_thread(self._store.records.end, self._job_id)
        else:
            events, over = await asyncio.to_thread(self._store.records.tail, self._job_id, newest, RING)
            self._ring.extend((event.seq, _sse(event)) for event in events)
            newest = events[-1].seq if events else newest
        if over:
            self.over_at = newest
        if newest != self._newest or over:
            self._newest = newest
            heard, self.news = self.news, asyncio.Event()
            heard.set()
        return newest


async def _came(event: asyncio.Event, patience_s: float) -> bool:
    """Whether the event came in time. Python 3.11's `wait_for` would forget a cancel that comes together with it."""
    try:
        async with asyncio.timeout(patience_s):
            await event.wait()
    except TimeoutError:
        return False
    return True


def _sse(event: Event) -> bytes:
    return format_sse_event(data_str=event.model_dump_json(), event=event.type, id=str(event.seq))
