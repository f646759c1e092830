"""Events on their way to the service: in order, once, through outages, and never in training's way."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from contextlib import contextmanager

import pytest

from tests.waiting import until
from tests.workers.taker import taking
from workers import control, poster
from workers.contract import JobSpec, RunContext
from workers.events import EventLog, read_events

TOKEN = "a-secret-of-this-attempt"


@pytest.fixture
def service():
    with taking() as taker:
        yield taker


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(poster, "PERIOD_S", 0.02)
    monkeypatch.setattr(poster, "BACKOFF_S", 0.05)


def context_of(tmp_path, service, **fields):
    given = {"post_url": f"http://127.0.0.1:{service.port}/v1/x", "post_token": TOKEN, **fields}
    return RunContext(job_id="j", attempt=3, spec=JobSpec(), run_dir=str(tmp_path), storage_path="s", **given)


@contextmanager
def a_run(tmp_path, service, close_s=5.0, **fields):
    with poster.posting(context_of(tmp_path, service, **fields), close_s), EventLog(tmp_path) as log:
        yield log


def in_file(tmp_path):
    return [{**event, "seq": offset} for offset, event in read_events(tmp_path / "events.jsonl", 0)]


def test_every_event_arrives_once_with_the_offset_behind_its_line(tmp_path, service):
    with a_run(tmp_path, service) as log:
        for step in range(30):
            log.emit("metrics", step=step)
            time.sleep(0.003)
    assert service.events == in_file(tmp_path) and len(service.events) == 30
    _, headers, body = service.posts[0]
    assert body == {"attempt": 3, "events": []} and headers["Authorization"] == f"Bearer {TOKEN}"
    assert all(body["attempt"] == 3 for _, _, body in service.posts)


def test_a_second_process_goes_on_where_the_server_is(tmp_path, service):
    with EventLog(tmp_path) as log:
        log.emit("phase", name="starting")
    for _ in range(2):
        with a_run(tmp_path, service) as log:
            log.emit("metrics")
    assert service.events == in_file(tmp_path) and len(service.events) == 3


def test_outages_and_odd_answers_are_outlived(tmp_path, service):
    service.answers = [503, 500, 429, 302, b"no json", {"no": "offset"}, {"offset": 0, "want": None}]
    with a_run(tmp_path, service) as log:
        log.emit("metrics", step=1)
        service.answers += [502]
        until(lambda: service.events)
        service.answers = [503, {"offset": service.offset, "want": None}]  # the latter forgets what it got
        log.emit("metrics", step=2)
    assert service.events == in_file(tmp_path) and len(service.events) == 2


@pytest.mark.parametrize("status", sorted(poster.OWNED_NO_MORE))
def test_an_attempt_that_does_not_own_its_job_posts_no_more(tmp_path, service, status):
    with a_run(tmp_path, service) as log:
        log.emit("metrics")
        until(lambda: service.events)
        service.answers, seen = [status], len(service.posts)
        log.emit("metrics")
        until(lambda: len(service.posts) > seen)
        log.emit("metrics")
        time.sleep(0.1)
    assert len(service.events) == 1 and len(service.posts) == seen + 1
    assert len(in_file(tmp_path)) == 3


def test_posts_are_bounded_in_events_and_bytes(tmp_path, service):
    with EventLog(tmp_path) as log:
        for step in range(1200):
            log.emit("metrics", step=step)
        for _ in range(4):
            log.emit("plan.created", cycle="x" * 200_000)
        log.emit("plan.created", cycle="x" * 600_000)
    with a_run(tmp_path, service):
        pass
    sizes = [len(body["events"]) for _, _, body in service.posts if body["events"]]
    assert service.events == in_file(tmp_path) and sizes == [500, 500, 202, 2, 1]


def test_posts_keep_their_distance_while_lines_keep_coming(tmp_path, service, monkeypatch):
    monkeypatch.setattr(poster, "PERIOD_S", 0.1)
    with a_run(tmp_path, service) as log:
        until(lambda: service.posts)
        for _ in range(50):
            log.emit("metrics")
            time.sleep(0.01)
        times = [at for at, _, body in service.posts]
    assert len(times) <= 8 and min(b - a for a, b in itertools.pairwise(times)) > 0.09


def test_a_pause_that_the_service_wants_is_left_in_the_run_directory(tmp_path, service):
    with a_run(tmp_path, service) as log:
        log.emit("metrics")
        until(lambda: service.events)
        assert control.asked(tmp_path) is None
        service.want = "pause"
        log.emit("metrics")
        until(lambda: control.asked(tmp_path) == "pause")


def test_a_cancel_ends_a_run_that_nobody_else_would_end_and_asks_once(tmp_path, service, monkeypatch):
    monkeypatch.setattr(poster, "SILENCE_S", 0.05)
    ended = []
    service.want = "cancel"
    with a_run(tmp_path, service):
        until(lambda: len(service.posts) > 2)
        assert control.asked(tmp_path) is None, "the service stops what it has ordered"
    with poster.posting(context_of(tmp_path, service), end=lambda: ended.append(control.asked(tmp_path))):
        seen = len(service.posts)
        until(lambda: len(service.posts) > seen + 2)
    assert ended == ["cancel"]


def test_wishes_are_heard_in_silence_too(tmp_path, service, monkeypatch):
    monkeypatch.setattr(poster, "SILENCE_S", 0.05)
    with a_run(tmp_path, service):
        until(lambda: service.posts)
        service.want = "pause"
        until(lambda: control.asked(tmp_path) == "pause")


def test_a_service_that_is_gone_holds_nobody_up_and_nothing_is_raised(tmp_path, service, caplog):
    caplog.set_level(logging.DEBUG)
    begin = time.monotonic()
    with a_run(tmp_path, service, close_s=0.3, post_url="http://127.0.0.1:9/x") as log:
        log.emit("metrics")
        time.sleep(0.1)
        assert time.monotonic() - begin < 0.25
    assert time.monotonic() - begin < 1.0
    assert TOKEN not in caplog.text and "cannot be sent" in caplog.text


def test_the_token_is_in_no_log(tmp_path, service, caplog):
    caplog.set_level(logging.DEBUG)
    service.answers = [503, 401]
    with a_run(tmp_path, service):
        until(lambda: len(service.posts) == 2)
    assert "401" in caplog.text and TOKEN not in caplog.text
    assert TOKEN not in repr(context_of(tmp_path, service))


def test_without_a_url_there_is_no_thread(tmp_path, service):
    with a_run(tmp_path, service, post_url=None, post_token=None):
        assert not [thread for thread in threading.enumerate() if thread.name == "poster"]


def test_a_wish_is_read_whole_or_not_at_all(tmp_path):
    assert control.asked(tmp_path) is None
    for text in ("", "{", "[]", '{"other": 1}'):
        (tmp_path / control.CONTROL_FILE).write_text(text)
        assert control.asked(tmp_path) is None
    control.ask(tmp_path, "pause")
    assert control.asked(tmp_path) == "pause" and len(list(tmp_path.iterdir())) == 1
