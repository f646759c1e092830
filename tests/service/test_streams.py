"""Live events: complete, in order, resumable, ended by the end of the job."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from service.store import Store
from service.streams import Bells, stream_events
from workers.contract import JobSpec

SSE = {"Accept": "text/event-stream"}


def ids(text: str) -> list[int]:
    return [int(line[4:]) for line in text.splitlines() if line.startswith("id: ")]


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

    async def read() -> str:
        return b"".join([part async for part in stream_events(store, Bells(2), job.id, 0)]).decode()

    assert ids(asyncio.run(read())) == list(range(1, 704))


def test_no_more_streams_than_allowed(api: TestClient, submit: Callable[..., str]) -> None:
    job_id = submit()
    bells: Bells = api.app.state.world.bells  # type: ignore[attr-defined]
    bells._max_streams = 0
    answer = api.get(f"/v1/jobs/{job_id}/events", headers=SSE)
    assert answer.status_code == 429 and answer.json()["code"] == "too_many_streams"


def test_a_reader_that_leaves_leaves_nothing_behind(store: Store, spec: JobSpec, tmp_path: Path) -> None:
    job = store.jobs.create(spec, owner=FIRST_USER)[0]
    bells = Bells(2)

    async def leave() -> None:
        stream = stream_events(store, bells, job.id, 0)
        await anext(stream)
        await anext(stream)
        assert bells.num_open == 1
        await stream.aclose()  # type: ignore[attr-defined]

    asyncio.run(leave())
    assert bells.num_open == 0


@pytest.mark.parametrize("after", [0, 1, 2])
def test_resuming_anywhere_loses_and_repeats_nothing(store: Store, spec: JobSpec, after: int) -> None:
    job = store.jobs.create(spec, owner=FIRST_USER)[0]
    store.actions.cancel(job.id)

    async def read() -> str:
        return b"".join([part async for part in stream_events(store, Bells(2), job.id, after)]).decode()

    assert ids(asyncio.run(read())) == list(range(after + 1, 4))
