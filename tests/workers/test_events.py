"""The run's event file: complete lines, in order, from any offset."""

from __future__ import annotations

import json
import math

from hypothesis import given
from hypothesis import strategies as st

from workers.events import EVENTS_FILE, EventLog, read_events


def test_events_are_numbered_across_openings(tmp_path):
    with EventLog(tmp_path) as log:
        log.emit("phase", name="starting")
    with EventLog(tmp_path) as log:
        log.emit("metrics", step=1, loss=0.5)
        log.emit("outcome", "done", status="succeeded", error=None)
    events = [event for _, event in read_events(tmp_path / EVENTS_FILE, 0)]
    assert [event["seq"] for event in events] == [1, 2, 3]
    assert [event["type"] for event in events] == ["phase", "metrics", "outcome"]


def test_a_torn_line_waits_for_its_end(tmp_path):
    path = tmp_path / EVENTS_FILE
    with EventLog(tmp_path) as log:
        log.emit("phase", name="running")
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:10])
    ((offset, _),) = read_events(path, 0)
    assert offset == len(whole) and list(read_events(path, offset)) == []
    path.write_bytes(whole + whole)
    assert len(list(read_events(path, offset))) == 1


def test_no_file_is_no_events(tmp_path):
    assert list(read_events(tmp_path / "none", 0)) == []


def test_what_json_cannot_say_becomes_null(tmp_path):
    with EventLog(tmp_path) as log:
        log.emit("metrics", loss=math.nan, series=(1.0, math.inf))
    line = (tmp_path / EVENTS_FILE).read_text()
    assert json.loads(line)["data"] == {"loss": None, "series": [1.0, None]}


@given(st.lists(st.text(), max_size=5))
def test_any_message_survives(messages):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        with EventLog(folder) as log:
            for message in messages:
                log.emit("phase", message)
        assert [e["message"] for _, e in read_events(f"{folder}/{EVENTS_FILE}", 0)] == messages
