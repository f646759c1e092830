"""What the client decides, without a network: retries, waiting, following, as steps that a test answers."""

from __future__ import annotations

import itertools
import json
import pickle
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.client import (
    ApiBusyError,
    ApiConflictError,
    ApiError,
    ApiServerError,
    ApiTimeoutError,
    ApiUnreachableError,
    calls,
    fetch,
    flows,
    live,
)
from service.client.calls import Answer, Call
from service.client.flows import Done, Failed, Flow, Give, Open, Patience, Read, Send, Sleep, Work, advance, ask

PATIENCE = Patience("http://service", chance=lambda: 1.0)
JOB: dict[str, Any] = {"id": "ftjob_1", "status": "queued", "model": "m", "dataset": "digits", "created_at": 1}
READ = calls.get_job("ftjob_1")
MADE = calls.make_key({"name": "k"})


def played(flow: Flow[Any], answers: Callable[[Any], Any]) -> tuple[Any, list[Any]]:
    """What a flow gives back, and its steps; `answers` plays the world."""
    steps = []
    step = advance(flow, None)
    while not isinstance(step, Done):
        steps.append(step)
        step = advance(flow, None if isinstance(step, Give) else answers(step))
    return step.value, steps


def scripted(*script: Any) -> Callable[[Any], Any]:
    left = list(script)
    return lambda step: None if isinstance(step, Sleep) else left.pop(0)


def answer(status: int = 200, body: Any = JOB, **headers: str) -> Answer:
    return Answer(status, headers, json.dumps(body).encode())


def refused(status: int, **headers: str) -> Answer:
    problem = {"title": "no", "status": status, "detail": "No.", "code": "no", "request_id": "req_7"}
    return Answer(status, headers, json.dumps(problem).encode())


def pauses(steps: list[Any]) -> list[float]:
    return [step.seconds for step in steps if isinstance(step, Sleep)]


def lost(kind: type[httpx2.RequestError] = httpx2.ReadError) -> Failed:
    return Failed(kind("cut"))


def test_pauses_grow_and_a_read_is_asked_four_times() -> None:
    job, steps = played(ask(READ, PATIENCE), scripted(lost(), lost(), lost(), answer()))
    assert job.id == "ftjob_1" and pauses(steps) == [0.25, 0.5, 1.0]
    with pytest.raises(ApiUnreachableError):
        played(ask(READ, PATIENCE), scripted(lost(), lost(), lost(), lost()))
    assert Patience("", chance=lambda: 0.0).backoff_s(0) == 0.125 and PATIENCE.backoff_s(40) == flows.LONGEST_PAUSE_S


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_heeded_as_seconds_and_as_a_date(status: int) -> None:
    soon = formatdate(time.time() + 30, usegmt=True)
    told = (refused(status, **{"retry-after": "7"}), refused(status, **{"retry-after": soon}), answer())
    _, steps = played(ask(READ, PATIENCE), scripted(*told))
    assert pauses(steps)[0] == 7.0 and 27 < pauses(steps)[1] <= 30


def test_a_retry_after_of_an_hour_is_left_to_the_caller() -> None:
    with pytest.raises(ApiBusyError) as busy:
        played(ask(READ, PATIENCE), scripted(refused(429, **{"retry-after": "3600"})))
    assert busy.value.retry_after_s == 3600 and busy.value.request_id == "req_7" and "req_7" in str(busy.value)


@pytest.mark.parametrize("text", ["soon", "-1", "Thu, 99 Foo 2026", "", "1e9"])
def test_a_retry_after_that_is_none_is_passed_over(text: str) -> None:
    _, steps = played(ask(READ, PATIENCE), scripted(refused(503, **{"retry-after": text}), answer()))
    assert pauses(steps) == [0.25]


def test_what_may_have_arrived_is_not_sent_again_unless_it_is_harmless() -> None:
    key = {"id": "k", "name": "k", "user": "u", "hint": "h", "scopes": [], "created_at": 1}
    for first in (lost(httpx2.ConnectError), lost(httpx2.ConnectTimeout), refused(429)):
        assert played(ask(MADE, PATIENCE), scripted(first, answer(201, key)))[0].id == "k"
    for first, kind in ((lost(), ApiUnreachableError), (refused(503), ApiBusyError), (refused(502), ApiServerError)):
        with pytest.raises(kind):
            played(ask(MADE, PATIENCE), scripted(first))
    for action, again in (("cancel", True), ("pause", True), ("resume", True), ("retry", False)):
        assert (calls.act("j", action).repeat is calls.Repeat.ALWAYS) is again
    submit = calls.submit({"steps": 1}, None)
    assert submit.headers["Idempotency-Key"] and submit.repeat is calls.Repeat.ALWAYS


@pytest.mark.parametrize("status", [400, 401, 404, 409, 422, 500])
def test_a_refusal_is_not_asked_again(status: int) -> None:
    with pytest.raises(ApiError) as error:
        played(ask(READ, PATIENCE), scripted(refused(status)))
    assert error.value.status == status
    again = pickle.loads(pickle.dumps(error.value))
    assert type(again) is type(error.value) and str(again) == str(error.value)


def test_an_answer_that_is_none_of_the_service_says_so() -> None:
    for content in (b"<html>", b"[]", b"{}", b"\xff"):
        with pytest.raises(ApiServerError, match="address of the service"):
            played(ask(READ, PATIENCE), scripted(Answer(200, {}, content)))
    with pytest.raises(ApiConflictError, match="not a problem document"):
        played(ask(READ, PATIENCE), scripted(Answer(409, {}, b"<html>")))
    with pytest.raises(ApiBusyError):
        played(ask(calls.ready(), Patience("", 0)), scripted(Answer(503, {}, b"<html>")))


def test_fields_and_states_of_a_newer_service_are_taken() -> None:
    newer = {**JOB, "status": "hibernating", "colour": "blue", "progress": {"step": 1, "mood": "good"}}
    job, _ = played(ask(READ, PATIENCE), scripted(answer(200, newer)))
    assert job.status == "hibernating" and not job.is_final and job.progress.step == 1


def test_waiting_bears_outages_and_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    script = scripted(answer(), lost(), refused(503), refused(429), answer(200, {**JOB, "status": "failed"}))
    job, steps = played(flows.wait("ftjob_1", None, 1.0, PATIENCE), script)
    assert job.status == "failed" and pauses(steps) == [1.0, 0.25, 0.5, 1.0]
    with pytest.raises(ApiTimeoutError):
        played(flows.wait("ftjob_1", 0.0, 1.0, PATIENCE), scripted(answer()))
    monkeypatch.setattr("service.client.flows.OUTAGE_S", 0.0)
    with pytest.raises(ApiUnreachableError):
        played(flows.wait("ftjob_1", None, 1.0, PATIENCE), scripted(lost(), lost()))


def test_pages_end_and_never_turn_in_a_circle() -> None:
    def listed(*ids: str, more: bool) -> Answer:
        return answer(200, {"data": [{**JOB, "id": i} for i in ids], "has_more": more, "last_id": ids[-1]})

    def pages() -> Flow[None]:
        return flows.pages(lambda after: calls.list_jobs(after, 2, {"status": ["a", "b"]}), PATIENCE)

    _, steps = played(pages(), scripted(listed("1", "2", more=True), listed("3", more=False)))
    assert [step.item.id for step in steps if isinstance(step, Give)] == ["1", "2", "3"]
    asked = [step.call.params for step in steps if isinstance(step, Send)]
    assert asked[0] == (("limit", "2"), ("status", "a"), ("status", "b")) and ("after", "2") in asked[1]
    _, steps = played(pages(), scripted(listed("1", more=True), listed("1", more=True)))
    assert len([step for step in steps if isinstance(step, Give)]) == 2


def test_filters_become_parameters() -> None:
    call = calls.list_jobs(None, 5, {"search": "a b", "metadata": {"team": "v"}, "created_after": 1.5, "model": None})
    assert call.params == (("limit", "5"), ("search", "a b"), ("created_after", "1.5"), ("metadata[team]", "v"))


class World:
    """A service with one log, or one history, whose streams break wherever `cuts` says."""

    def __init__(self, content: bytes, cuts: Iterator[int], polite: bool) -> None:
        self._content = content
        self._cuts = cuts
        self._polite = polite
        self._pieces: list[bytes] = []
        self._breaks = False
        self.num_opened = 0

    def __call__(self, step: Any) -> Any:
        match step:
            case Open(call):
                return self._open(call)
            case Read() if self._pieces:
                return self._pieces.pop(0)
            case Read():
                return lost() if self._breaks else None
            case Send(call):
                return self._send(call)
            case Work(run):
                return run()
        return None

    def _begin(self, call: Call[Any]) -> int:
        return int(dict(call.params)["offset"])

    def _open(self, call: Call[Any]) -> Answer:
        self.num_opened += 1
        rest, length = self._content[self._begin(call) :], next(self._cuts)
        whole = length >= len(rest)
        self._pieces = [rest[:length][at : at + 3] for at in range(0, min(length, len(rest)), 3)]
        self._breaks = not whole and not self._polite
        return Answer(200, {})

    def _send(self, call: Call[Any]) -> Answer:
        if not call.path.endswith("/logs"):
            return answer(200, {**JOB, "status": "succeeded", "attempt": 1})
        begin = self._begin(call)
        page = self._content[begin : begin + 5]
        headers = {"x-log-offset": str(begin + len(page)), "x-log-size": str(len(self._content))}
        return Answer(200, headers, page)


def cut_lengths(lengths: list[int]) -> Iterator[int]:
    yield from lengths
    yield from itertools.repeat(10**9)


@settings(deadline=None, max_examples=200)
@given(st.text(st.characters(codec="utf-8"), max_size=60), st.lists(st.integers(0, 20), max_size=12), st.booleans())
def test_a_log_comes_once_each_byte_however_it_breaks(text: str, lengths: list[int], polite: bool) -> None:
    world = World(text.encode(), cut_lengths(lengths), polite)
    _, steps = played(live.follow_log("ftjob_1", None, None, 0, None, PATIENCE), world)
    assert "".join(step.item for step in steps if isinstance(step, Give)) == text
    _, steps = played(live.read_log("ftjob_1", None, None, 0, PATIENCE), world)
    assert "".join(step.item for step in steps if isinstance(step, Give)) == text


class History(World):
    def __init__(self, count: int, cuts: Iterator[int], polite: bool) -> None:
        super().__init__(b"", cuts, polite)
        self._count = count

    def _open(self, call: Call[Any]) -> Answer:
        first = int(call.headers["Last-Event-ID"]) + 1
        self._content = b": hello\n\n" + b"".join(
            f"id: {n}\r\nevent: x\ndata: {json.dumps(self._event(n))}\n\n".encode()
            for n in range(first, self._count + 1)
        )
        return super()._open(call)

    def _begin(self, call: Call[Any]) -> int:
        return 0

    def _send(self, call: Call[Any]) -> Answer:
        if not call.path.endswith("/events"):
            return super()._send(call)
        first = int(dict(call.params)["after"]) + 1
        shown = [self._event(n) for n in range(first, self._count + 1)][:3]
        return answer(200, {"data": shown, "has_more": first + 2 < self._count})

    def _event(self, n: int) -> dict[str, Any]:
        return {"id": f"e{n}", "seq": n, "created_at": 1.0, "type": "quite.new", "level": "shout", "what": 1}


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 12), st.lists(st.integers(0, 400), max_size=12), st.booleans())
def test_events_come_once_each_however_they_break(count: int, lengths: list[int], polite: bool) -> None:
    world = History(count, cut_lengths(lengths), polite)
    _, steps = played(live.follow_events("ftjob_1", 0, None, PATIENCE), world)
    assert [step.item.seq for step in steps if isinstance(step, Give)] == list(range(1, count + 1))


def test_a_stream_of_something_else_is_no_outage() -> None:
    script = scripted(Answer(200, {}), b"data: <html>\n\n", None)
    with pytest.raises(ApiServerError, match="address"):
        played(live.follow_events("ftjob_1", 0, None, PATIENCE), script)


def test_a_log_goes_on_with_the_next_attempt() -> None:
    def job(**told: Any) -> Answer:
        return answer(200, {**JOB, **told})

    def nothing(end: int) -> Answer:
        return Answer(200, {"x-log-offset": str(end), "x-log-size": str(end)}, b"")

    first = job(status="running", attempt=1)
    script = scripted(
        *(first, first, Answer(200, {}), b"one ", None, None, job(status="queued", attempt=1), nothing(4)),
        *(job(status="paused", attempt=1), job(status="running", attempt=2)),
        *(Answer(200, {}), b"two", None, None, job(status="failed", attempt=2), nothing(3)),
        job(status="failed", attempt=2),
    )
    _, steps = played(live.follow_log("ftjob_1", None, None, 0, None, PATIENCE), script)
    assert [step.item for step in steps if isinstance(step, Give)] == ["one ", "two"]
    assert ("attempt", "2") in [step.call for step in steps if isinstance(step, Open)][-1].params


@pytest.mark.parametrize("name", ["..", "", "a/..", "x\0y"])
def test_a_file_stays_in_its_directory(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="no name"):
        played(fetch.download("j", name, tmp_path, PATIENCE), scripted())
