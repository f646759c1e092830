"""Planners for tests: the scheduler in this process, and one that gives the placements it was told to give."""

from __future__ import annotations

import json
import time

from scheduler.actor import Scheduler
from scheduler.compiler import compile_step
from scheduler.cost import Costs
from scheduler.domain import (
    DeviceProfile,
    ModelShape,
    Op,
    Placement,
    Plan,
    SolverReport,
    StepShape,
    mean_forecast,
    uniform_ops,
)
from scheduler.errors import from_dict
from scheduler.simulate import simulate
from workers.changes import Planned
from workers.gather import gather_json

REPORT = SolverReport("scripted", "KEPT", 0.0, 0.0, 0.0, 0.0)


def read_answer(answer):
    """The actor's answer as a worker reads it."""
    if "error" in answer:
        raise from_dict(answer["error"])
    return Planned.from_answer(json.loads(json.dumps(answer)))


def even_heads(num_blocks, num_heads, num_workers):
    """Owners by block and head: every worker has as many heads of every block as any other."""
    return [[head * num_workers // num_heads for head in range(num_heads)] for _ in range(num_blocks)]


class DirectPlanner:
    """Calls a `Scheduler` in this process; all ranks on threads share it."""

    def __init__(self, scheduler, rank, size):
        self.scheduler, self.rank, self.size = scheduler, rank, size

    def announce(self, announcement):
        announcement = json.loads(json.dumps(announcement))
        assert "error" not in self.scheduler.announce("job", 1, self.size, self.rank, announcement)

    def plan(self, window, report):
        while True:
            answer = self.scheduler.plan("job", 1, window, json.loads(json.dumps(report)), self.rank)
            if "waiting" not in answer:
                return read_answer(answer)
            time.sleep(0.01)


class GroupPlanner:
    """A scheduler in rank 0's process; workers in other processes get its answers."""

    def __init__(self, transport):
        self.transport, self.scheduler = transport, Scheduler()

    def announce(self, announcement):
        for rank, heard in enumerate(gather_json(self.transport, announcement)):
            answer = self.scheduler.announce("job", 1, self.transport.size, rank, heard)
            assert "error" not in answer, answer

    def plan(self, window, report):
        answer = None if self.transport.rank else self.scheduler.plan("job", 1, window, report, 0)
        return read_answer(gather_json(self.transport, answer)[0])


class ScriptedPlanner:
    """Gives placements and op tables from functions of the window; profiles come from the group or its reports."""

    def __init__(self, transport, owners, cycle=None):
        self.transport, self.owners = transport, owners
        self.cycle = cycle or (lambda window, shape, num: (uniform_ops(shape, num, Op.FULL),))
        self.reports = []

    def announce(self, announcement):
        self.shape = ModelShape(**{k: tuple(v) if isinstance(v, list) else v for k, v in announcement["shape"].items()})
        self.step = StepShape(**announcement["step"])
        self.profiles = [DeviceProfile.from_dict(p) for p in gather_json(self.transport, announcement["profile"])]

    def plan(self, window, report):
        if report is not None and "profiles" in report:
            self.reports.append(json.loads(json.dumps(report)))
            self.profiles = [DeviceProfile.from_dict(report["profiles"][str(r)]) for r in range(self.transport.size)]
        costs = Costs(self.shape, self.step, self.profiles)
        placement = Placement.make(self.owners(window), self.transport.size)
        cycle = self.cycle(window, self.shape, self.step.num_micro_batches)
        full = uniform_ops(self.shape, self.step.num_micro_batches, Op.FULL)
        seen = [simulate(compile_step(placement, ops, costs), costs) for ops in (*cycle, full)]
        forecast = mean_forecast(seen[:-1])
        plan = Plan(window + 1, window, placement, cycle, forecast, seen[-1], REPORT, REPORT, policy={"window": window})
        return Planned(plan, self.profiles, {"reason": "so it is written"}, {"heads": f"of window {window}"})
