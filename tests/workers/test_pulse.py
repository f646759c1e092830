"""The pulse of a worker: what it says of itself, how long it may be silent, and what a note costs."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from pathlib import Path

import psutil
import pytest

from tests.waiting import until
from workers import pulse
from workers.pulse import Patience, Pulse, created, p99, pulse_path, read, stacks_path

QUICK = Patience(beat_s=0.05)


def test_the_file_says_where_the_worker_is_and_beats(tmp_path):
    with Pulse(tmp_path, 3, node="n1", patience=QUICK) as mine:
        until(lambda: read(pulse_path(tmp_path, 3)) is not None)
        assert read(pulse_path(tmp_path, 3)).phase == "prepare"
        mine.phase("train")
        mine.step(7)
        mine.at(41)
        mine.waits(2)
        until(lambda: read(pulse_path(tmp_path, 3)).waiting_for == 2)
        told = read(tmp_path / "pulse" / "rank003.json")
        assert (told.rank, told.pid, told.node, told.phase, told.step) == (3, os.getpid(), "n1", "train", 7)
        assert (told.instruction, told.waiting_for) == (41, 2)
        assert told.created == pytest.approx(created(psutil.Process()), abs=0.01)
        until(lambda: read(pulse_path(tmp_path, 3)).beat > told.beat + 1)
        mine.waits(None)
        until(lambda: read(pulse_path(tmp_path, 3)).waiting_for is None)
        mine.phase("checkpoint")
        until(lambda: read(pulse_path(tmp_path, 3)).phase == "checkpoint")
        assert read(pulse_path(tmp_path, 3)).step is None


def test_silence_grows_until_the_next_note_of_any_kind(tmp_path):
    with Pulse(tmp_path, 0, patience=QUICK) as mine:
        for note in (lambda: mine.at(1), lambda: mine.waits(None), lambda: mine.step(1), lambda: mine.phase("plan")):
            until(lambda: (told := read(pulse_path(tmp_path, 0))) is not None and told.silent_s > 0.2)
            note()
            until(lambda: read(pulse_path(tmp_path, 0)).silent_s < 0.1)


def test_nothing_is_left_after_the_end_but_the_stacks(tmp_path):
    before = threading.active_count()
    mine = Pulse(tmp_path, 0, patience=QUICK)
    os.kill(os.getpid(), signal.SIGUSR1)
    until(lambda: "test_nothing_is_left" in stacks_path(tmp_path, 0).read_text())
    mine.close()
    mine.close()
    assert threading.active_count() == before
    assert not list((tmp_path / "pulse").iterdir())
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_a_thread_that_is_not_the_main_one_has_a_pulse_too(tmp_path):
    def work():
        with Pulse(tmp_path, 0, patience=QUICK):
            os.kill(os.getpid(), signal.SIGUSR1)
            until(lambda: "in work" in stacks_path(tmp_path, 0).read_text())
            done.set()

    done = threading.Event()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=20)
    assert done.is_set()


def test_each_phase_has_its_limit_and_training_follows_its_own_steps():
    patience = Patience()
    for phase, limit in (("prepare", 300), ("plan", 300), ("evaluate", 600), ("evaluate after", 600), ("export", 300)):
        assert patience.limit(phase, [1.0] * 50) == limit
    assert patience.limit("train", []) == 120
    assert patience.limit("train", [1.0] * 4) == 120
    assert patience.limit("train", [50.0] * 4) == 250  # what is known counts, however little it is
    assert patience.limit("train", [1.0] * 5) == 30
    assert patience.limit("train", [1.0] * 4 + [9.0]) == 45


def test_one_odd_step_in_two_hundred_is_above_the_p99():
    assert p99([]) == 0.0
    assert p99([1.0, 3.0, 2.0]) == 3.0
    assert p99([1.0] * 199 + [60.0]) == 1.0
    assert p99([1.0] * 197 + [60.0] * 3) == 60.0


def test_only_steps_of_training_are_counted_and_a_phase_ends_the_last_one(tmp_path, monkeypatch):
    now = [100.0]
    with Pulse(tmp_path, 0, patience=Patience(beat_s=60)) as mine:
        monkeypatch.setattr(pulse.time, "monotonic", lambda: now[0])
        mine.phase("rehearse")
        for step in range(3):
            mine.step(step)
            now[0] += 50
        mine.phase("train")
        for step in range(2):
            mine.step(step)
            now[0] += 2
        mine.phase("plan")
        now[0] += 40
        mine.phase("train")
        monkeypatch.undo()
        assert list(mine._durations_s) == [2, 2]


def test_a_full_disk_stops_no_pulse(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Pulse(tmp_path, 0, patience=QUICK):
        path = pulse_path(tmp_path, 0)
        until(lambda: read(path) is not None)
        monkeypatch.setattr(Path, "write_bytes", full)
        beat = read(path).beat
        until(lambda: (told := read(path)) is not None and told.beat > beat + 2)
        assert path.stat().st_size < 1000


def test_half_an_account_is_none(tmp_path):
    path = tmp_path / "rank000.json"
    assert read(path) is None
    for text in ("", '{"rank": 1', "[]", json.dumps({"rank": 1})):
        path.write_text(text)
        assert read(path) is None
