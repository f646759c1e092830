"""Failpoints: the right action at the right time, once where processes share a directory, and nothing elsewhere."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from scheduler import failpoints
from scheduler.errors import SystemFault


@pytest.fixture(autouse=True)
def _fresh() -> None:
    failpoints._seen.clear()


def test_without_the_variable_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(failpoints.VARIABLE, raising=False)
    with failpoints.passing("store.commit"):
        failpoints.hit("step.begin")


def test_it_happens_the_nth_time_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(failpoints.VARIABLE, "step.begin:error@2")
    failpoints.hit("step.begin")
    with pytest.raises(SystemFault, match=r"step\.begin"):
        failpoints.hit("step.begin")
    failpoints.hit("step.begin")


def test_error_after_ok_comes_when_the_thing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(failpoints.VARIABLE, "store.commit:error_after_ok")
    done = []
    with pytest.raises(SystemFault), failpoints.passing("store.commit"):
        done.append(1)
    assert done == [1]


def test_a_full_disk_looks_like_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(failpoints.VARIABLE, "checkpoint.rename:enospc")
    with pytest.raises(OSError) as caught, failpoints.passing("checkpoint.rename"):
        raise AssertionError("not reached")
    assert caught.value.errno == errno.ENOSPC


def test_kill9_ends_the_process_once_in_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(failpoints.VARIABLE, "step.begin:kill9")
    monkeypatch.setenv(failpoints.DIRECTORY, str(tmp_path))
    code = "from scheduler import failpoints; failpoints.hit('step.begin'); print('alive')"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True) for _ in range(3)]
    assert [run.returncode for run in runs] == [-9, 0, 0]


@pytest.mark.parametrize("wrong", ["nowhere:error", "step.begin:explode", "step.begin:error@x", "step.begin"])
def test_a_word_that_is_none_is_refused(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(failpoints.VARIABLE, wrong)
    with pytest.raises(ValueError, match="NAME:ACTION@N"):
        failpoints.hit("step.begin")
