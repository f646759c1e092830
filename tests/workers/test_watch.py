"""The watchdog: who is found when a group of real processes stalls, what is written, and who is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import psutil
import pytest

from scheduler.errors import SystemFault, UserError
from tests.waiting import until
from workers import watch
from workers.failures import record, root_cause
from workers.pulse import Account, Patience, created, pulse_path, read, stacks_path
from workers.watch import Seen, Watchdog, judge, strike_here

PATIENCE = Patience(step_s=2.0, first_step_s=2.0, start_s=60.0, frozen_s=2.5, beat_s=0.1)
PROGRAM = """
import ctypes, json, re, sys, time
from workers.pulse import Patience, Pulse

run_dir, rank, mode, patience = sys.argv[1], int(sys.argv[2]), sys.argv[3], Patience(**json.loads(sys.argv[4]))

def works(step):
    for index in range(10):
        pulse.at(index)
        time.sleep(0.01)

def takes_long(step):
    time.sleep(0.5)

def falls_asleep(step):
    works(step)
    if step == 3:
        time.sleep(600)

def waits_for_0(step):
    works(step)
    if step == 3:
        pulse.waits(0)
        time.sleep(600)

def waits_for_1(step):
    works(step)
    if step == 3:
        pulse.waits(1)
        time.sleep(600)

def calls_c(step):
    works(step)
    while step == 3:
        ctypes.CDLL(None).sleep(600)

def keeps_the_lock(step):
    works(step)
    if step == 3:
        re.match("(a+)+$", "a" * 64 + "b")

with Pulse(run_dir, rank, patience=patience) as pulse:
    pulse.phase("train")
    for step in range(100_000):
        pulse.step(step)
        globals()[mode](step)
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts workers, one for each mode, under a watchdog; they are gone after the test."""
    monkeypatch.setattr(watch, "OTHERS_S", 1.0)
    monkeypatch.setattr(watch, "STACKS_S", 1.0)
    processes, strikes, dogs = [], [], []

    def strike(account, sig):
        strikes.append((account.rank, sig))
        return strike_here(account, sig)

    def begin(*modes, patience=PATIENCE):
        dog = Watchdog(tmp_path, len(modes), strike, patience=patience)
        dogs.append(dog)
        dog.start()
        for rank, mode in enumerate(modes):
            told = [str(tmp_path), str(rank), mode, json.dumps(asdict(patience))]
            processes.append(subprocess.Popen([sys.executable, "-c", PROGRAM, *told]))
        until(lambda: all(step_of(tmp_path, rank) is not None for rank in range(len(modes))))
        return dog

    begin.processes, begin.strikes = processes, strikes
    yield begin
    for dog in dogs:
        dog.close()
    for process in processes:
        process.kill()
        process.wait(timeout=10)


def step_of(run_dir, rank):
    told = read(pulse_path(run_dir, rank))
    return told and told.step


def ended(process):
    return -process.wait(timeout=10)


def test_workers_that_go_on_are_left_alone_even_after_a_short_stop(tmp_path, start):
    dog = start("works", "works")
    os.kill(start.processes[0].pid, signal.SIGSTOP)
    until(lambda: dog.suspects(1.0))
    os.kill(start.processes[0].pid, signal.SIGCONT)
    until(lambda: not dog.suspects(1.0))
    time.sleep(2)
    assert dog.verdict is None and not start.strikes
    assert [process.poll() for process in start.processes] == [None, None]


def test_one_that_sleeps_is_hung_its_stacks_name_the_place_and_it_is_killed(tmp_path, start):
    dog = start("falls_asleep")
    until(lambda: dog.verdict is not None)
    assert ended(start.processes[0]) == signal.SIGKILL
    stall = dog.verdict
    assert (stall.rank, stall.kind, stall.phase, stall.step, stall.instruction) == (0, "hung", "train", 3, 9)
    assert stall.silent_s > PATIENCE.step_s and stall.stacks == [stacks_path(tmp_path, 0)]
    assert "in falls_asleep" in stall.stacks[0].read_text()
    cause = root_cause(tmp_path)
    assert isinstance(cause, SystemFault) and cause.code == "worker_stalled"
    for said in ("Worker 0", "phase train", "step 4", "instruction 9", str(stall.stacks[0])):
        assert said in cause.message
    (left,) = (tmp_path / "failures").iterdir()
    assert "in falls_asleep" in json.loads(left.read_text())["trace"]


def test_one_that_is_stopped_has_no_beat_and_is_killed(tmp_path, start):
    dog = start("works", "works")
    os.kill(start.processes[1].pid, signal.SIGSTOP)
    until(lambda: dog.verdict is not None)
    assert ended(start.processes[1]) == signal.SIGKILL
    assert (dog.verdict.rank, dog.verdict.kind) == (1, "stopped")
    assert "no sign of life" in root_cause(tmp_path).message and "no stacks" in root_cause(tmp_path).message
    assert ended(start.processes[0]) == signal.SIGKILL  # the others follow


def test_of_three_the_one_at_the_end_of_the_chain_is_the_culprit(tmp_path, start):
    dog = start("falls_asleep", "waits_for_0", "waits_for_1")
    until(lambda: dog.verdict is not None)
    assert [ended(process) for process in start.processes] == [signal.SIGKILL] * 3
    assert (dog.verdict.rank, dog.verdict.kind) == (0, "hung")
    assert dog.verdict.stacks == [stacks_path(tmp_path, rank) for rank in range(3)]
    assert "waits_for_1" in dog.verdict.stacks[2].read_text()
    kills = [rank for rank, sig in start.strikes if sig == signal.SIGKILL]
    assert kills[0] == 0 and sorted(kills) == [0, 1, 2]
    assert "Worker 0" in root_cause(tmp_path).message


def test_long_steps_raise_the_limit_of_the_one_that_takes_them(tmp_path, start):
    short = replace(PATIENCE, step_s=0.3, first_step_s=2.0)
    dog = start("takes_long", patience=short)
    until(lambda: step_of(tmp_path, 0) >= 7)
    time.sleep(0.5)
    assert 2.5 <= read(pulse_path(tmp_path, 0)).limit_s < 5
    assert dog.verdict is None and start.processes[0].poll() is None


def test_a_c_call_that_lets_the_lock_go_is_hung_with_stacks(tmp_path, start):
    dog = start("calls_c")
    until(lambda: dog.verdict is not None)
    assert ended(start.processes[0]) == signal.SIGKILL
    assert dog.verdict.kind == "hung" and "in calls_c" in dog.verdict.stacks[0].read_text()


def test_a_c_call_that_keeps_the_lock_is_stopped_and_has_stacks_all_the_same(tmp_path, start):
    dog = start("keeps_the_lock")
    until(lambda: dog.verdict is not None)
    assert ended(start.processes[0]) == signal.SIGKILL
    assert dog.verdict.kind == "stopped" and "in keeps_the_lock" in dog.verdict.stacks[0].read_text()


def test_one_that_is_dead_is_left_to_ray(tmp_path, start):
    dog = start("works", "waits_for_0")
    start.processes[0].kill()  # nobody waits for it: a zombie is dead, too
    until(lambda: dog.suspects(3.5))
    assert dog.verdict is None and not start.strikes


def account(rank=0, **changes):
    mine = psutil.Process()
    plain = Account(rank, mine.pid, created(mine), os.uname().nodename, "", "train", 5, 7, None, 1, 0.0, 30.0)
    return replace(plain, **changes)


def test_a_pid_that_is_another_process_by_now_is_not_signalled(monkeypatch):
    child = subprocess.Popen(["sleep", "60"])
    mine = account(pid=child.pid, created=created(psutil.Process(child.pid)))
    assert not strike_here(replace(mine, created=mine.created - 1), signal.SIGKILL)
    time.sleep(0.1)
    assert child.poll() is None
    # Somebody sets the machine's clock: the process is the same all the same.
    boot = psutil._pslinux.boot_time()
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: boot + 3600)
    assert strike_here(mine, signal.SIGKILL)
    assert ended(child) == signal.SIGKILL
    assert not strike_here(mine, signal.SIGKILL)


def test_a_pulse_has_no_time_of_day_and_a_pause_of_the_driver_condemns_nobody(tmp_path):
    now = [0.0]
    dog = Watchdog(tmp_path, 2, strike_here, clock=lambda: now[0])
    path = pulse_path(tmp_path, 1)
    path.parent.mkdir()
    told = asdict(account(1, host="elsewhere"))
    assert not [name for name, value in told.items() if isinstance(value, float) and value > 1e9]
    path.write_text(json.dumps(told))
    assert not dog.look()
    now[0] += 3600  # the driver was put aside
    assert not dog.look() and not dog.suspects(3)
    for _ in range(14):
        now[0] += 1
        found = dog.look()
    assert [one.account.rank for one in found] == [1] and dog.suspects(15)
    path.write_text(json.dumps({**told, "beat": 2}))
    assert not dog.look()
    path.write_text('{"rank":')  # half written is no beat, and no end
    now[0] += 1
    assert not dog.look() and dog.suspects(1)
    path.unlink()
    assert not dog.look() and not dog.suspects(0)


def test_pulses_of_the_group_before_are_removed(tmp_path):
    path = pulse_path(tmp_path, 5)
    path.parent.mkdir()
    path.write_text(json.dumps(asdict(account(5))))
    with Watchdog(tmp_path, 6, strike_here) as dog:
        assert not path.exists() and not dog.suspects(0)


def blamed(*accounts, frozen=(), dead=()):
    seen = {a.rank: Seen(a, 20.0 if a.rank in (*frozen, *dead) else 0.0, a.rank in dead) for a in accounts}
    return [one.account.rank for one in judge(seen, 15.0)]


def test_the_end_of_a_chain_is_blamed_once_it_is_over_its_own_limit():
    waits = [account(1, waiting_for=0, silent_s=40), account(2, waiting_for=1, silent_s=40)]
    assert blamed(account(0, silent_s=29), *waits) == []
    assert blamed(account(0, silent_s=31), *waits) == [0]
    assert blamed(account(0, silent_s=31), account(3, silent_s=32), *waits) == [0, 3]


def test_a_stopped_one_is_blamed_before_those_that_are_silent_and_a_dead_one_never():
    silent = account(0, silent_s=31)
    assert blamed(silent, account(1), frozen=[1]) == [1]
    assert blamed(silent, account(1), dead=[1]) == [0]
    assert blamed(account(0, silent_s=31, waiting_for=1), account(1), dead=[1]) == []


def test_where_nobody_is_at_the_end_all_silent_ones_are_blamed():
    circle = [account(0, waiting_for=1, silent_s=31), account(1, waiting_for=0, silent_s=31)]
    assert blamed(*circle, account(2)) == [0, 1]
    assert blamed(*circle, account(2, waiting_for=0, silent_s=33)) == [0, 1, 2]
    assert blamed(circle[0], account(1, waiting_for=0, silent_s=29)) == []
    assert blamed(account(0, waiting_for=7, silent_s=31), account(1)) == [0]


def test_a_stall_is_the_cause_of_what_comes_later_whatever_the_clocks_say(tmp_path, monkeypatch):
    watch.record_stall(tmp_path, 0, SystemFault("stalled", code="worker_stalled"), "")
    monkeypatch.setattr(time, "time", lambda: 1.0)
    record(tmp_path, 1, OSError("x"), SystemFault("of another machine", code="worker_failed"))
    record(tmp_path, 0, RuntimeError("x"), SystemFault("of the same worker", code="worker_failed"))
    assert root_cause(tmp_path).code == "worker_stalled"


def test_a_failure_that_was_there_before_a_stall_is_the_cause_but_an_echo_is_not(tmp_path):
    record(tmp_path, 1, RuntimeError("x"), SystemFault("an echo", code="peer_lost"))
    watch.record_stall(tmp_path, 0, SystemFault("stalled", code="worker_stalled"), "")
    assert root_cause(tmp_path).code == "worker_stalled"
    other = tmp_path / "other"
    record(other, 1, UserError("wrong"), UserError("wrong", code="bad_data"))
    watch.record_stall(other, 1, SystemFault("hangs while it ends", code="worker_stalled"), "")
    assert root_cause(other).code == "bad_data"


def test_a_strike_that_never_arrives_holds_nobody_up(tmp_path, monkeypatch):
    for name in ("STACKS_S", "STRIKE_S", "OTHERS_S"):
        monkeypatch.setattr(watch, name, 0.3)
    struck, over = [], threading.Event()

    def strike(account, sig):
        struck.append((account.rank, sig))
        if account.rank == 0:
            over.wait(10)
        raise OSError("no way there")

    with Watchdog(tmp_path, 2, strike, patience=replace(PATIENCE, beat_s=0.05)) as dog:
        pulse_path(tmp_path, 0).parent.mkdir()
        for rank in range(2):
            told = account(rank, host="elsewhere", silent_s=31)
            pulse_path(tmp_path, rank).write_text(json.dumps(asdict(told)))
        until(lambda: (1, signal.SIGKILL) in struck)
        assert dog.verdict.rank == 0 and dog.verdict.stacks == []
    assert len([1 for _, sig in struck if sig == signal.SIGKILL]) == 2
    over.set()
