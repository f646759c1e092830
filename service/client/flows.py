"""What the client does, as generators of steps: the shells carry the steps out and hand back what came of them.

    Send(call)      one request; comes back as an Answer, or raises the transport's error
    Open(call)      the same, with the body of a success left to be read by Read, until None; Close lets go of it
    Sleep(seconds)
    Work(run)       something slow on this machine, like writing a file
    Give(item)      hand an item to whoever iterates

So everything that is decided is decided once, for `Client` and `AsyncClient` alike, and can be tested without a
network.
"""

from __future__ import annotations

import email.utils
import math
import random
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

import httpx2
from pydantic import ValidationError

from service.client import calls
from service.client.calls import Answer, Call, Repeat
from service.client.errors import (
    ApiBusyError,
    ApiError,
    ApiServerError,
    ApiUnreachableError,
    error_of,
    timed_out,
    unreachable,
    unreadable,
)
from service.schemas import Job, Page, Sweep

Value = TypeVar("Value")
TIMEOUT_S = 30.0
RETRIES = 3
RETRY_STATUS = frozenset({429, 502, 503, 504})
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 8.0
LONGEST_RETRY_AFTER_S = 60.0
LATE_S = 5.0  # by how much a deadline may be missed
OUTAGE_S = 60.0  # how long following and waiting bear a service that does not answer
PASSING = (ApiUnreachableError, ApiBusyError, ApiServerError)
_NEVER_SENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)
_HOPELESS = (httpx2.UnsupportedProtocol, httpx2.LocalProtocolError)


@dataclass(frozen=True)
class Send:
    call: Call[Any]


@dataclass(frozen=True)
class Open:
    call: Call[Any]


@dataclass(frozen=True)
class Read:
    pass


@dataclass(frozen=True)
class Close:
    pass


@dataclass(frozen=True)
class Sleep:
    seconds: float


@dataclass(frozen=True)
class Work:
    run: Callable[[], Any]


@dataclass(frozen=True)
class Give:
    item: Any


@dataclass(frozen=True)
class Done:
    value: Any


@dataclass(frozen=True)
class Failed:
    """A step that could not be carried out."""

    error: Exception


Step: TypeAlias = Send | Open | Read | Close | Sleep | Work | Give
Flow: TypeAlias = Generator[Step, Any, Value]


def advance(flow: Flow[Any], came: Any) -> Step | Done:
    """Hand a flow what came of its last step; its next one."""
    try:
        return flow.throw(came.error) if isinstance(came, Failed) else flow.send(came)
    except StopIteration as end:
        return Done(end.value)


@dataclass(frozen=True)
class Patience:
    """How often a call is tried again, and how long the pauses are: exponential, with jitter, at least Retry-After."""

    url: str
    retries: int = RETRIES
    chance: Callable[[], float] = random.random

    def pause_s(self, call: Call[Any], error: ApiError, tries: int, *, unsent: bool) -> float | None:
        """Seconds until the call is sent again, or None where it must not or need not be."""
        refused = error.status == 429
        may = call.repeat is Repeat.ALWAYS or unsent or refused
        passing = unsent or error.status in RETRY_STATUS or isinstance(error, ApiUnreachableError)
        if tries >= self.retries or not may or not passing:
            return None
        asked = error.retry_after_s or 0.0
        return None if asked > LONGEST_RETRY_AFTER_S else max(asked, self.backoff_s(tries))

    def backoff_s(self, tries: int) -> float:
        longest = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(tries, 10))
        return longest * (0.5 + self.chance() / 2)


def ask(call: Call[Value], patience: Patience) -> Flow[Value]:
    """The value of a call, sent again where that is right. Raises ApiError."""
    tries = 0
    while True:
        try:
            answer = yield Send(call)
        except httpx2.RequestError as lost:
            error: ApiError = unreachable(patience.url, lost)
            pause_s = None
            if not isinstance(lost, _HOPELESS):
                pause_s = patience.pause_s(call, error, tries, unsent=isinstance(lost, _NEVER_SENT))
            if pause_s is None:
                raise error from lost
        else:
            if answer.is_success or answer.status in call.good:
                return read(call, answer)
            error = refusal(answer)
            pause_s = patience.pause_s(call, error, tries, unsent=False)
            if pause_s is None:
                raise error
        yield Sleep(pause_s)
        tries += 1


def read(call: Call[Value], answer: Answer) -> Value:
    """The value of an answer that says yes. Raises ApiServerError where something else stands in it."""
    try:
        return call.read(answer)
    except ValidationError:
        raise (unreadable(answer.status) if answer.is_success else refusal(answer)) from None


def refusal(answer: Answer) -> ApiError:
    return error_of(answer.status, answer.content, retry_after_s(answer.headers.get("retry-after")))


def retry_after_s(text: str | None) -> float | None:
    """The header `Retry-After`, a number of seconds or a date, as seconds from now."""
    if text is None:
        return None
    if text.strip().isdecimal():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None


def pages(page_call: Callable[[str | None], Call[Page[Any]]], patience: Patience) -> Flow[None]:
    """Every item of a list, page by page."""
    after: str | None = None
    while True:
        page = yield from ask(page_call(after), patience)
        for item in page.data:
            yield Give(item)
        if not page.has_more or not page.last_id or page.last_id == after:
            return
        after = page.last_id


class Deadline:
    """When waiting must end, and since when nobody has answered."""

    def __init__(self, job_id: str, timeout_s: float | None, patience: Patience) -> None:
        self._job_id = job_id
        self._patience = patience
        self._at = math.inf if timeout_s is None else time.monotonic() + timeout_s
        self._lost_at: float | None = None
        self._losses = 0

    def check(self) -> None:
        """Raises ApiTimeoutError when the time is over."""
        if time.monotonic() >= self._at:
            raise timed_out(self._job_id)

    def within(self, seconds: float) -> float:
        """So long, but not beyond the deadline."""
        return max(0.05, min(seconds, self._at - time.monotonic()))

    def quiet_s(self, seconds: float) -> float:
        """How long a stream may say nothing; with a deadline not so long that it is missed by much."""
        return seconds if self._at == math.inf else self.within(LATE_S)

    def heard(self) -> None:
        """Somebody answered."""
        self._lost_at, self._losses = None, 0

    def ask(self, call: Call[Value]) -> Flow[Value]:
        """A call that is tried once: what comes of failures is counted here."""
        if self._at != math.inf:
            call = replace(call, timeout_s=self.within(call.timeout_s or TIMEOUT_S))
        return (yield from ask(call, replace(self._patience, retries=0)))

    def pause_s(self, error: Exception) -> float:
        """How long to wait after a loss. Raises once nobody has answered for `OUTAGE_S`, or the time is over."""
        self.check()
        now = time.monotonic()
        self._lost_at = now if self._lost_at is None else self._lost_at
        if now - self._lost_at > OUTAGE_S or _stays(error):
            raise error if isinstance(error, ApiError) else unreachable(self._patience.url, error) from error
        pause_s = self._patience.backoff_s(self._losses)
        self._losses += 1
        asked = getattr(error, "retry_after_s", None) or 0.0
        return self.within(max(pause_s, min(asked, LONGEST_RETRY_AFTER_S)))


def wait(job_id: str, timeout_s: float | None, poll_s: float, patience: Patience) -> Flow[Job]:
    """The job once it has ended; outages in between are borne."""
    deadline = Deadline(job_id, timeout_s, patience)
    return (yield from _until(calls.get_job(job_id), deadline, lambda job: job.is_final, poll_s))


def wait_sweep(sweep_id: str, timeout_s: float | None, poll_s: float, patience: Patience) -> Flow[Sweep]:
    """The sweep once it has ended."""
    deadline = Deadline(sweep_id, timeout_s, patience)
    return (yield from _until(calls.get_sweep(sweep_id), deadline, lambda sweep: sweep.is_final, poll_s))


def until(job_id: str, deadline: Deadline, wanted: Callable[[Job | Sweep], bool], poll_s: float) -> Flow[Job | Sweep]:
    """The job or sweep once it is as wanted."""
    return _until(calls.look(job_id), deadline, wanted, poll_s)


def _until(call: Call[Value], deadline: Deadline, wanted: Callable[[Value], bool], poll_s: float) -> Flow[Value]:
    while True:
        try:
            job = yield from deadline.ask(call)
        except PASSING as error:
            yield Sleep(deadline.pause_s(error))
            continue
        deadline.heard()
        if wanted(job):
            return job
        deadline.check()
        yield Sleep(deadline.within(poll_s))


def _stays(error: Exception) -> bool:
    """Whether waiting does not help: what answers is not the service, or nothing can be sent to that address."""
    return isinstance(error, _HOPELESS) or (isinstance(error, ApiServerError) and error.status < 500)
