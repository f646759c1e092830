"""The device book survives restarts, half-written files and nonsense; a device is known by its id across jobs."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from scheduler import book
from scheduler.book import FILE, Book, book_ids, read_book
from scheduler.devices import DeviceRecord
from scheduler.domain import DeviceProfile, StepShape
from scheduler.errors import UserError
from tests.scheduler.fleet import fleet, vit_shape

SHAPE, STEP = vit_shape(4, 4, 64), StepShape(5, 8)


def measured(*names: str, at: float = 100.0, speed: float = 1.0) -> list[DeviceProfile]:
    profiles = fleet((speed,) * len(names), shape=SHAPE, batch=8)
    return [replace(p, device_id=name, measured_at=at) for p, name in zip(profiles, names, strict=True)]


def test_a_book_is_the_same_after_it_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "state" / FILE
    first = Book(path)
    first.hear(measured("a/cpu:0", "b/cpu:0"), SHAPE, STEP)
    assert [record.id for record in first.records()] == ["a/cpu:0", "b/cpu:0"]
    assert Book(path).records() == first.records() == read_book(path)
    assert first.records()[0].links["b/cpu:0"].bytes_per_s == 1_000_000_000
    assert [found.name for found in path.parent.iterdir()] == [FILE]


def test_the_newest_measurement_of_a_device_stays_and_links_gather(tmp_path: Path) -> None:
    known = Book(tmp_path / FILE)
    known.hear(measured("a", "b", at=100.0), SHAPE, STEP)
    known.hear(measured("a", "c", at=200.0, speed=0.25), SHAPE, STEP)
    known.hear(measured("a", "b", at=50.0), SHAPE, STEP)
    first = known.records()[0]
    assert first.measured_at == 200.0 and set(first.links) == {"b", "c"}
    assert first.forward_flops_per_s < 0.5 * known.records()[1].forward_flops_per_s


def test_the_book_remembers_how_fast_a_device_was(tmp_path: Path) -> None:
    known = Book(tmp_path / FILE)
    for at, speed in ((1000.0, 1.0), (1030.0, 0.9), (1060.0, 0.5), (1060.0, 0.5), (1400.0, 1.0)):
        known.hear(measured("a", at=at, speed=speed), SHAPE, STEP)
    (record,) = Book(tmp_path / FILE).records()
    assert [at for at, _ in record.history] == [1000.0, 1060.0, 1400.0]
    fast, slowed, newest = (rate for _, rate in record.history)
    assert slowed == pytest.approx(fast / 2, rel=0.05) and newest == record.training_flops_per_s == fast


def test_a_history_is_bounded_and_its_newest_points_are_kept() -> None:
    known = Book()
    for turn in range(book.MAX_HISTORY + 5):
        known.hear(measured("a", at=100.0 + turn * book.HISTORY_S), SHAPE, STEP)
    (record,) = known.records()
    assert len(record.history) == book.MAX_HISTORY and record.history[-1][0] == record.measured_at


@pytest.mark.parametrize("history", [3, [[1.0]], [[1.0, 0]], [["x", 1]], [None]])
def test_a_history_that_none_can_have_is_refused_by_its_name(history: object) -> None:
    known = Book()
    known.hear(measured("a"), SHAPE, STEP)
    with pytest.raises(UserError, match=r"records\.history"):
        DeviceRecord.from_dict({**known.records()[0].to_dict(), "history": history})


def test_workers_that_share_a_device_are_told_apart() -> None:
    assert book_ids(["a", "b", "a", "a"]) == ["a", "b", "a#2", "a#3"]
    known = Book()
    known.hear(measured("a", "a"), SHAPE, STEP)
    assert [record.id for record in known.records()] == ["a", "a#2"]
    assert set(known.records()[0].links) == {"a#2"}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"format": 9, "devices": []}', '{"format": 1, "devices": [{}]}']
)
def test_a_file_that_cannot_be_read_is_set_aside_and_the_book_begins_anew(tmp_path: Path, text: str) -> None:
    path = tmp_path / FILE
    path.write_text(text)
    assert read_book(path) == [] and path.read_text() == text
    fresh = Book(path)
    assert fresh.records() == []
    assert (tmp_path / f"{FILE}.bad").read_text() == text and not path.exists()
    fresh.hear(measured("a"), SHAPE, STEP)
    assert [record.id for record in read_book(path)] == ["a"]


def test_a_writer_that_dies_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / FILE
    known = Book(path)
    known.hear(measured("a"), SHAPE, STEP)

    def die(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(book.os, "fsync", die)
    known.hear(measured("b"), SHAPE, STEP)
    assert [record.id for record in read_book(path)] == ["a"]
    assert [record.id for record in known.records()] == ["a", "b"]


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    path, stop, seen = tmp_path / FILE, threading.Event(), set()
    known = Book(path)
    known.hear(measured("a"), SHAPE, STEP)

    def read() -> None:
        while not stop.is_set():
            seen.add(len(read_book(path)))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(30):
        known.hear(measured("a", f"d{number:02d}"), SHAPE, STEP)
    stop.set()
    reader.join()
    assert 0 not in seen


def test_the_longest_unseen_devices_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(book, "MAX_RECORDS", 2)
    known = Book(tmp_path / FILE)
    for at, name in enumerate(("old", "new", "newer")):
        known.hear(measured(name, at=100.0 + at), SHAPE, STEP)
    assert [record.id for record in known.records()] == ["new", "newer"]


def test_no_file_is_an_empty_book(tmp_path: Path) -> None:
    assert read_book(tmp_path / FILE) == [] == Book(tmp_path / FILE).records()


def test_records_are_plain_json(tmp_path: Path) -> None:
    Book(tmp_path / FILE).hear(measured("a"), SHAPE, STEP)
    data = json.loads((tmp_path / FILE).read_text())
    assert DeviceRecord.from_dict(data["devices"][0]).id == "a"
