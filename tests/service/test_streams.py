"""Live events: complete, in order, resumable, ended by the end of the job."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.store import Store
from service.store.access import FIRST_USER
from service.streams import Room, Streams, _came
from workers.contract import JobSpec

SSE = {"Accept": "text/event-stream"}


@pytest.fixture(params=["sqlite", "postgres"])
def store_url(request: pytest.FixtureRequest, store_url: str) -> str:
    """The same tests on both."""
    return str(request.getfixturevalue("database")) if request.param == "postgres" else store_url


def ids(text: str) -> list[int]:
    return [int(line[4:]) for line in text.splitlines() if line.startswith("id: ")]


def streams_of(store: Store) -> Streams:
    streams = Streams(store, Room(10, 10))
    store.on_change(streams.ring)
    return streams


def read_all(store: Store, job_id: str, after: int = 0) -> str:
    async def read() -> str:
        streams = streams_of(store)
        streams.attach()
        return b"".join([part async for part in streams.follow(job_id, after, FIRST_USER)]).decode()

    return asyncio.run(read())


def test_a_page_goes_on_after_seq(api: TestClient, submit: Callable[..., str]) -> None:
    job_id = submit()
    api.post(f"/v1/jobs/{job_id}/cancel")
    first = api.get(f"/v1/jobs/{job_id}/events", params={"limit": 2}).json()
    assert [event["seq"] for event in first["data"]] == [1, 2] and first["has_more"] and first["last_id"] == "2"
    rest = api.get(f"/v1/jobs/{job_id}/events", params={"after": 2}).json()
    assert [event["seq"] for event in rest["data"]] == [3] and not rest["has_more"]


def test_a_stream_ends_after_the_terminal_event_and_resumes_by_its_id(
    api: TestClient, submit: Callable[..., str]
) -> None:
    job_id = submit()
    api.post(f"/v1/jobs/{job_id}/cancel")
    answer = api.get(f"/v1/jobs/{job_id}/events", headers=SSE)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert ids(answer.text) == [1, 2, 3]
    assert "event: job.status" in answer.text
    assert ids(api.get(f"/v1/jobs/{job_id}/events", headers={**SSE, "Last-Event-ID": "2"}).text) == [3]
    assert ids(api.get(f"/v1/jobs/{job_id}/events", headers={**SSE, "Last-Event-ID": "nonsense"}).text) == [1, 2, 3]
    assert ids(api.get(f"/v1/jobs/{job_id}/events", headers=SSE, params={"after": 3}).text) == []
    again = api.get(f"/v1/jobs/{job_id}/events", headers={**SSE, "Last-Event-ID": "2"}, params={"after": 1})
    assert ids(again.text) == [3]


def test_a_stream_sends_what_happens_while_it_is_open(api: TestClient, submit: Callable[..., str]) -> None:
    job_id = submit()

    def later() -> None:
        time.sleep(0.2)
        api.app.state.world.store.actions.cancel(job_id)  # type: ignore[attr-defined]

    thread = threading.Thread(target=later)
    thread.start()
    began = time.monotonic()
    assert ids(api.get(f"/v1/jobs/{job_id}/events", headers=SSE).text) == [1, 2, 3]
    assert time.monotonic() - began < 0.9  # rung, not polled
    thread.join()


def test_long_histories_are_streamed_whole(store: Store, spec: JobSpec) -> None:
    job = store.jobs.create(spec, owner=FIRST_USER)[0]
    attempt = store.queue.claim(1)
    assert attempt
    lines = [{"seq": i, "at": 1.0, "type": "metrics", "data": {"step": i}} for i in range(1, 700)]
    store.attempts.absorb(attempt, [*lines, {"seq": 700, "type": "outcome", "data": {"status": "succeeded"}}], 1)

    assert ids(read_all(store, job.id)) == list(range(1, 704))


def test_no_more_streams_than_allowed(api: TestClient, submit: Callable[..., str]) -> None:
    job_id = submit()
    streams: Streams = api.app.state.world.streams  # type: ignore[attr-defined]
    streams.room = Room(0, 10)
    answer = api.get(f"/v1/jobs/{job_id}/events", headers=SSE)
    assert answer.status_code == 429 and answer.json()["code"] == "too_many_streams"
    streams.room = Room(10, 0)
    assert api.get(f"/v1/jobs/{job_id}/events", headers=SSE).status_code == 429


def test_a_reader_that_leaves_leaves_nothing_behind(store: Store, spec: JobSpec) -> None:
    job = store.jobs.create(spec, owner=FIRST_USER)[0]
    streams = streams_of(store)

    async def leave() -> None:
        stream = streams.follow(job.id, 0, FIRST_USER)
        await anext(stream)
        await anext(stream)
        assert streams.room.num_open == 1
        await stream.aclose()  # type: ignore[attr-defined]
        await asyncio.sleep(0.1)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(leave())
    assert streams.room.num_open == 0 and not streams._channels


@pytest.mark.parametrize("after", [0, 1, 2])
def test_resuming_anywhere_loses_and_repeats_nothing(store: Store, spec: JobSpec, after: int) -> None:
    job = store.jobs.create(spec, owner=FIRST_USER)[0]
    store.actions.cancel(job.id)

    assert ids(read_all(store, job.id, after)) == list(range(after + 1, 4))


def test_many_listeners_each_get_every_event_once_from_one_reader(store: Store, spec: JobSpec) -> None:
    job = store.jobs.create(spec, owner=FIRST_USER)[0]
    attempt = store.queue.claim(1)
    assert attempt
    looks = 0
    tail = store.records.tail

    def counted(*given: Any) -> Any:
        nonlocal looks
        looks += 1
        return tail(*given)

    store.records.tail = counted  # type: ignore[method-assign]

    async def all_of_them() -> list[str]:
        streams = streams_of(store)
        streams.attach()
        streams.room = Room(100, 100)

        async def read(after: int) -> str:
            return b"".join([part async for part in streams.follow(job.id, after, FIRST_USER)]).decode()

        readers = [asyncio.create_task(read(i % 3)) for i in range(60)]
        for i in range(1, 41):
            event = {"seq": i, "at": 1.0, "type": "metrics", "data": {"step": i}}
            await asyncio.to_thread(store.attempts.absorb, attempt, [event], i)
        last = {"seq": 41, "type": "outcome", "data": {"status": "succeeded"}}
        await asyncio.to_thread(store.attempts.absorb, attempt, [last], 41)
        return list(await asyncio.gather(*readers))

    texts = asyncio.run(all_of_them())
    assert all(ids(text) == list(range(i % 3 + 1, 45)) for i, text in enumerate(texts))
    assert looks < 300  # 60 readers of their own would look 60 times for each of 41 events


def test_a_listener_slower_than_the_ring_reads_on_from_the_store(
    store: Store, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.streams.RING", 5)
    job = store.jobs.create(spec, owner=FIRST_USER)[0]
    attempt = store.queue.claim(1)
    assert attempt

    async def read() -> str:
        streams = streams_of(store)
        streams.attach()
        follower = streams.follow(job.id, 0, FIRST_USER)
        text = await anext(follower) + await anext(follower)
        lines = [{"seq": i, "at": 1.0, "type": "metrics", "data": {"step": i}} for i in range(1, 60)]
        for line in lines:
            await asyncio.to_thread(store.attempts.absorb, attempt, [line], line["seq"])
        await asyncio.sleep(0.3)
        end = {"seq": 60, "type": "outcome", "data": {"status": "succeeded"}}
        await asyncio.to_thread(store.attempts.absorb, attempt, [end], 60)
        return (text + b"".join([part async for part in follower])).decode()

    assert ids(asyncio.run(read())) == list(range(1, 64))


def test_what_another_process_writes_is_seen_without_a_ring(store: Store, store_url: str, spec: JobSpec) -> None:
    job = store.jobs.create(spec, owner=FIRST_USER)[0]
    other = Store(store_url)
    threading.Timer(0.2, lambda: other.actions.cancel(job.id)).start()
    began = time.monotonic()
    assert ids(read_all(store, job.id)) == [1, 2, 3]
    assert time.monotonic() - began < 3
    other.close()


@pytest.mark.parametrize("turns", range(5))
def test_a_reader_that_leaves_as_an_event_comes_is_gone(turns: int) -> None:
    """However many turns of the loop lie between the ring and the cancel, the wait is over by one or by the other."""

    async def leaves() -> None:
        event = asyncio.Event()
        waiting = asyncio.create_task(_came(event, 5.0))
        await asyncio.sleep(0.01)
        event.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        cancelled = waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled() == cancelled

    asyncio.run(leaves())
