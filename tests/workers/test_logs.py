"""Logs of a run: everything that a process prints lands in its file, and nothing stays changed afterwards."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from workers.logs import kept, log_path

PROGRAM = """
import ctypes, logging, os, subprocess, sys
from pathlib import Path
from workers.logs import kept

logging.basicConfig()
print("before")
with kept(Path(sys.argv[1])) as say:
    print("of python")
    print("to stderr", file=sys.stderr)
    logging.getLogger("room").info("a record")
    logging.getLogger("room").warning("a warning")
    ctypes.CDLL(None).puts(b"of a C library")
    subprocess.run(["echo", "of a child"], check=True)
    if "while" in sys.argv:
        print(Path(sys.argv[1]).read_text().count("of python"), file=sys.__stderr__)
    say("a last word")
    if "fail" in sys.argv:
        raise ValueError("what went wrong")
print("after")
logging.getLogger("room").warning("later")
"""


def run(path, *words):
    command = [sys.executable, "-c", PROGRAM, str(path), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_all_that_a_process_prints_is_in_its_file_and_a_last_word_on_the_terminal(tmp_path):
    path = log_path(tmp_path, "rank3")
    done = run(path)
    assert path == tmp_path / "logs" / "rank3.log"
    text = path.read_text()
    for said in ("of python", "to stderr", "of a C library", "of a child", "a last word"):
        assert text.count(said) == 1, said
    assert done.returncode == 0 and done.stdout == "before\nafter\n"
    assert done.stderr == "a last word\nWARNING:room:later\n"


def test_records_of_logging_have_a_time_and_a_level_and_are_there_once(tmp_path):
    run(tmp_path / "driver.log")
    text = (tmp_path / "driver.log").read_text()
    for level, said in (("INFO", "a record"), ("WARNING", "a warning")):
        (line,) = [line for line in text.splitlines() if said in line]
        assert re.fullmatch(rf"\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{{3}}Z {level} room: {said}", line), line


def test_an_error_is_in_the_file_and_goes_on_to_the_terminal(tmp_path):
    done = run(tmp_path / "driver.log", "fail")
    text = (tmp_path / "driver.log").read_text()
    assert done.returncode == 1 and "ValueError: what went wrong" in done.stderr and "ValueError: what went" in text


def test_lines_are_in_the_file_as_soon_as_they_are_printed(tmp_path):
    run(tmp_path / "driver.log", "while")
    assert (tmp_path / "driver.log").read_text().splitlines().count("1") == 1


def test_a_log_is_appended_to_and_for_its_owner_alone(tmp_path):
    before = os.umask(0)
    try:
        for text in ("first", "second"):
            with kept(tmp_path / "logs" / "rank0.log"):
                os.write(1, f"{text}\n".encode())
    finally:
        os.umask(before)
    path = tmp_path / "logs" / "rank0.log"
    assert path.read_text() == "first\nsecond\n" and path.stat().st_mode & 0o777 == 0o600


def test_descriptors_handlers_and_level_are_as_before(tmp_path):
    def seen():  # descriptors, and how many are open
        root = logging.getLogger()
        return (
            os.fstat(1).st_ino,
            os.fstat(2).st_ino,
            list(root.handlers),
            root.level,
            len(list(Path("/proc/self/fd").iterdir())),
        )

    before = seen()
    with pytest.raises(KeyError), kept(tmp_path / "rank0.log"):
        assert os.fstat(1).st_ino == os.fstat(2).st_ino == (tmp_path / "rank0.log").stat().st_ino
        raise KeyError("x")
    assert seen() == before
