"""Following a job or sweep live, over broken connections: events by number, logs by byte offset, each exactly once."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import TypeAlias

import httpx2
from pydantic import ValidationError

from service.client import calls
from service.client.calls import Answer, Call
from service.client.errors import unreadable
from service.client.flows import PASSING, Close, Deadline, Flow, Give, Open, Patience, Read, Sleep, ask, refusal, until
from service.schemas import Event, Job, Sweep

QUIET_EVENTS_S = 30.0  # a heartbeat comes every 15 s; twice that without one, and the connection is dead
QUIET_LOG_S = 60.0  # a log has no heartbeat: a quiet one is asked for again, where it stood
SETTLE_S = 0.5
POLL_S = 1.0
_AT_REST = ("paused", "queued")
_LOST = (httpx2.RequestError, *PASSING)

# Where a stream stands when it is over, and what ended it early.
Ended: TypeAlias = tuple[int, Exception | None]


def page_events(job_id: str, after: int, patience: Patience) -> Flow[None]:
    """The job's history from `after` on."""
    while True:
        page = yield from ask(calls.list_events(job_id, after), patience)
        for event in page.data:
            yield Give(event)
        if not page.has_more or not page.data:
            return
        after = page.data[-1].seq


def follow_events(job_id: str, after: int, timeout_s: float | None, patience: Patience) -> Flow[None]:
    """The job's events from `after` on, live, until it has ended and all are given."""
    deadline = Deadline(job_id, timeout_s, patience)
    after = yield from _over_and_over(
        job_id, after, lambda at: _stream_events(job_id, at, deadline), lambda job: job.is_final, deadline
    )
    yield from page_events(job_id, after, patience)


def read_log(job_id: str, attempt: int | None, rank: int | None, offset: int, patience: Patience) -> Flow[None]:
    """The text of a log as it stands, from `offset` on; a negative one counts from the end."""
    decoder = _decoder()
    yield from _drain(job_id, attempt, rank, offset, decoder, patience)
    yield from _give(decoder.decode(b"", final=True))


def follow_log(
    job_id: str, attempt: int | None, rank: int | None, offset: int, timeout_s: float | None, patience: Patience
) -> Flow[None]:
    """The text of a log, live, until the attempt has ended; without `attempt`, of all attempts until the job has."""
    deadline = Deadline(job_id, timeout_s, patience)
    if attempt is not None:
        yield from _follow_attempt(job_id, attempt, rank, offset, deadline, patience)
        return
    job = yield from ask(calls.look(job_id), patience)
    number = max(1, job.attempt)
    while True:
        # A job that waits, is paused or fails for now may yet get an attempt.
        job = yield from until(job_id, deadline, lambda job: job.attempt >= number or job.is_final, POLL_S)  # noqa: B023
        if job.attempt < number:
            return
        yield from _follow_attempt(job_id, number, rank, offset, deadline, patience)
        number, offset = number + 1, 0


def _follow_attempt(
    job_id: str, number: int, rank: int | None, offset: int, deadline: Deadline, patience: Patience
) -> Flow[None]:
    decoder = _decoder()
    if offset < 0:
        offset = yield from _drain(job_id, number, rank, offset, decoder, patience)
    offset = yield from _over_and_over(
        job_id,
        offset,
        lambda at: _stream_log(job_id, number, rank, at, decoder, deadline),
        lambda job: job.is_final or job.attempt != number or job.status in _AT_REST,
        deadline,
    )
    yield from _drain(job_id, number, rank, offset, decoder, patience)
    yield from _give(decoder.decode(b"", final=True))


def _over_and_over(
    job_id: str,
    at: int,
    stream: Callable[[int], Flow[Ended]],
    is_over: Callable[[Job | Sweep], bool],
    deadline: Deadline,
) -> Flow[int]:
    """One stream after the other, each from where the last one stood, until what they tell of is over.

    Returns where the last one stood. There may be a little more: something between us and the service may have ended
    the stream early and politely, or let none through at all.
    """
    while True:
        before = at
        at, lost = yield from stream(at)
        yield Close()
        if lost is not None:
            yield Sleep(deadline.pause_s(lost))
        try:
            job = yield from deadline.ask(calls.look(job_id))
        except PASSING as error:
            yield Sleep(deadline.pause_s(error))
            continue
        if is_over(job) and (lost is None or at == before):
            return at
        deadline.check()
        if lost is None:
            yield Sleep(deadline.within(SETTLE_S))


def _stream_events(job_id: str, after: int, deadline: Deadline) -> Flow[Ended]:
    reader = SseReader()
    try:
        yield from _open(calls.stream_events(job_id, after, deadline.quiet_s(QUIET_EVENTS_S)))
        deadline.heard()
        while (chunk := (yield Read())) is not None:
            for text in reader.take(chunk):
                event = _event(text)
                if event.seq > after:
                    after = event.seq
                    yield Give(event)
            deadline.check()
    except _LOST as error:
        return after, error
    return after, None


def _stream_log(
    job_id: str, number: int, rank: int | None, offset: int, decoder: codecs.IncrementalDecoder, deadline: Deadline
) -> Flow[Ended]:
    try:
        yield from _open(calls.stream_log(job_id, number, rank, offset, deadline.quiet_s(QUIET_LOG_S)))
        deadline.heard()
        while (chunk := (yield Read())) is not None:
            offset += len(chunk)
            yield from _give(decoder.decode(chunk))
            deadline.check()
    except _LOST as error:
        return offset, error
    return offset, None


def _drain(
    job_id: str,
    attempt: int | None,
    rank: int | None,
    offset: int,
    decoder: codecs.IncrementalDecoder,
    patience: Patience,
) -> Flow[int]:
    """What a log holds from `offset` on, page by page; where it ends."""
    while True:
        call = calls.read_log(job_id, attempt, rank, offset)
        answer = yield from ask(call, patience)
        yield from _give(decoder.decode(answer.content))
        offset = _place(answer, "x-log-offset")
        if not answer.content or offset >= _place(answer, "x-log-size"):
            return offset


def _place(answer: Answer, header: str) -> int:
    try:
        return int(answer.headers[header])
    except (KeyError, ValueError):
        raise unreadable(answer.status) from None


def _open(call: Call[None]) -> Flow[None]:
    answer = yield Open(call)
    if not answer.is_success:
        raise refusal(answer)


def _give(text: str) -> Flow[None]:
    if text:
        yield Give(text)


def _event(text: str) -> Event:
    try:
        return Event.model_validate_json(text)
    except ValidationError:
        raise unreadable(200) from None


def _decoder() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")(errors="replace")


class SseReader:
    """Server-sent events out of pieces of any size; one that is torn at the end never comes out."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []

    def take(self, chunk: bytes) -> list[str]:
        """The data of the events that this piece makes whole."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        found = []
        for line in (line.removesuffix(b"\r") for line in lines):
            if not line and self._data:
                found.append("\n".join(self._data))
                self._data = []
            elif line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" ").decode(errors="replace"))
        return found
