"""Runs of a small job that are paused and go on, for tests: workers on threads, plans that timing cannot change."""

from __future__ import annotations

import threading

import safetensors.torch
import torch

from tests.workers.engine import flat_profiles, on_threads
from tests.workers.planners import ScriptedPlanner
from workers import control, session
from workers.checkpoint import Vault
from workers.contract import JobSpec
from workers.events import EventLog, read_events
from workers.model import build_model
from workers.session import Place, Session

EVEN = [[0, 0, 0, 1, 1, 1]] * 6
TURNED = [[1, 1, 1, 1, 0, 0]] * 5 + [[0] * 6]
THREE = [[0, 0, 1, 1, 2, 2]] * 3 + [[2] * 6, [1] * 6, [0, 0, 0, 2, 2, 1]]
ALONE = [[0] * 6] * 6

_ONE_MODEL_AT_A_TIME = threading.Lock()


def build_alone(*args, **kwargs):
    """Threads share torch's generator: models that are built at once would not start alike."""
    with _ONE_MODEL_AT_A_TIME:
        return build_model(*args, **kwargs)


class FixedPlanner(ScriptedPlanner):
    """Profiles from a seed: how instructions interleave, and so the last bit of a sum, must not depend on timing."""

    def announce(self, announcement):
        super().announce(announcement)
        self.announced = announcement

    def plan(self, window, report):
        self.profiles = flat_profiles(self.shape, self.transport.size)
        planned = super().plan(window, report and {k: v for k, v in report.items() if k != "profiles"})
        self.reports.append(report)
        return planned


class PausingLog(EventLog):
    """Asks for a pause so that a step is the last one; 1 has to be asked for before the run."""

    def __init__(self, run_dir, pause_at):
        super().__init__(run_dir)
        self.pause_at = pause_at

    def emit(self, type, message="", *, level="info", **data):
        super().emit(type, message, level=level, **data)
        if type == "metrics" and data["step"] + 1 == self.pause_at:
            control.ask(self.path.parent, "pause")


class Run:
    """One attempt: `losses` by step, `events`, `state` of the exported model, `saved`."""

    def __init__(self, run_dir, spec, vault, *, owners=EVEN, cycle=None, pause_at=None, evaluates=False):
        run_dir.mkdir(parents=True, exist_ok=True)
        if pause_at == 1:
            control.ask(run_dir, "pause")
        size = 1 + max(map(max, owners))
        sessions, self.planners = {}, {}

        def work(rank, transport):
            planner = self.planners[rank] = FixedPlanner(transport, lambda _: owners, cycle)
            log = PausingLog(run_dir, pause_at) if rank == 0 else None
            sessions[rank] = Session(spec, run_dir, transport, planner, log, Place(sharers=size), vault)
            if not evaluates:
                sessions[rank]._evaluate = lambda when: 0.25
            try:
                return sessions[rank].run()
            finally:
                if log:
                    log.close()

        torch.set_num_threads(1)
        self.ledger = on_threads(size, work)[0]
        assert len({session.saved for session in sessions.values()}) == 1
        self.saved = sessions[0].saved
        self.events = [event for _, event in read_events(run_dir / "events.jsonl", 0)]
        self.losses = {e["data"]["step"]: e["data"]["loss"] for e in self.told("metrics")}
        result = run_dir / "result" / "model.safetensors"
        self.state = safetensors.torch.load_file(result) if result.exists() else None

    def told(self, type):
        return [event for event in self.events if event["type"] == type]


def spec_of(**fields):
    base = {"steps": 8, "window": 3, "micro_batch_size": 4, "micro_batches": 3, "images_per_class": 4}
    return JobSpec.model_validate({**base, "optimiser": {"learning_rate": 1e-3, "clip_norm": 0.5}, **fields})


def patch(monkeypatch):
    monkeypatch.setattr(session, "build_model", build_alone)


def vault_at(tmp_path, attempt=1, resumes=False):
    directory = tmp_path / "checkpoints" / "job"
    return Vault(directory, "job", attempt, directory if resumes else None)
