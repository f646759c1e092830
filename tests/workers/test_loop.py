"""The driver's decisions without a cluster: what it reads, waits for, asks and reports."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import torch

from scheduler.domain import Placement, Plan, SolverReport, uniform_ops
from scheduler.errors import CapacityError, InfeasibleError, SystemFault, UserError
from scheduler.plan import make_plan
from scheduler.request import PlanRequest
from scheduler.scores import make_scores
from tests.scheduler.test_program import SHAPE, costs_of
from tests.service.conftest import free_port
from workers import attempt, control, failures, loop, muster, rank
from workers.contract import JobSpec, RunContext
from workers.events import EventLog, read_events
from workers.pulse import Pulse, accounts
from workers.tracking import Trackers


def context_of(tmp_path, **spec):
    return RunContext(
        job_id="job", spec=JobSpec(**spec), run_dir=str(tmp_path), storage_path=str(tmp_path), start_timeout_s=0.1
    )


def test_a_spec_becomes_a_run_of_its_own(tmp_path):
    path = tmp_path / "job.json"
    path.write_text('{"steps": 3}')
    context = loop.read_context(["--spec", str(path), "--out", str(tmp_path / "run")])
    assert context.spec.steps == 3 and context.run_dir == str(tmp_path / "run") and context.attempt == 1


def test_a_context_is_read_as_it_was_written(tmp_path):
    context = context_of(tmp_path, steps=4)
    (tmp_path / "context.json").write_text(context.model_dump_json())
    assert loop.read_context(["--context", str(tmp_path / "context.json")]) == context


@pytest.mark.parametrize("text", ["{", '{"stepps": 3}', '{"method": {"ratios": {"full": 9}}}'])
def test_a_bad_spec_ends_with_status_2_and_says_why(tmp_path, capsys, text):
    path = tmp_path / "job.json"
    path.write_text(text)
    with pytest.raises(SystemExit) as end:
        loop.read_context(["--spec", str(path)])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert any(word in said for word in ("stepps", "Invalid JSON", "method.ratios"))


def test_more_workers_than_the_cluster_holds_is_said_with_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(muster, "cluster", lambda: [{"CPU": 1.5}, {"CPU": 0.5}])
    assert muster.muster(context_of(tmp_path, workers=4)) == 4
    with pytest.raises(CapacityError, match=r"5 workers need 2\.5 CPU.*the cluster has 1\.5 CPU \+ 0\.5 CPU") as error:
        muster.muster(context_of(tmp_path, workers=5))
    assert error.value.param == "workers" and error.value.code == "cluster_too_small"
    monkeypatch.setattr(muster, "cluster", lambda: [{"CPU": 0.9}, {"CPU": 0.9}])  # 1.8, but in parts
    with pytest.raises(CapacityError, match=r"3 workers need 1\.5 CPU.*the cluster has 0\.9 CPU \+ 0\.9 CPU"):
        muster.muster(context_of(tmp_path, workers=3))


def test_a_node_whose_raylet_is_gone_does_not_count_though_ray_still_believes_in_it(monkeypatch):
    def node(port, alive=True):
        return {
            "Alive": alive, "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": port, "Resources": {"CPU": 1.0}
        }  # fmt: skip

    with socket.create_server(("127.0.0.1", 0)) as raylet:
        port = raylet.getsockname()[1]
        monkeypatch.setattr(ray, "nodes", lambda: [node(port), node(free_port()), node(port, alive=False)])
        assert muster.cluster() == [{"CPU": 1.0}]


def test_fewer_workers_are_enough_after_a_wait_or_at_once_for_a_later_group(tmp_path, monkeypatch):
    monkeypatch.setattr(muster, "cluster", lambda: [{"CPU": 1.0}])
    context = context_of(tmp_path, workers={"min": 2, "max": 4})
    assert (context.spec.workers, context.spec.fewest_workers) == (4, 2)
    assert muster.muster(context) == 2
    patient = context.model_copy(update={"start_timeout_s": 1000.0, "group": 1})
    assert muster.muster(patient) == 2
    monkeypatch.setattr(muster, "cluster", lambda: [{"CPU": 0.5}])
    with pytest.raises(CapacityError, match=r"2 workers need 1 CPU.*the cluster has 0\.5"):
        muster.muster(context)


def test_more_workers_are_taken_in_once_the_cluster_holds_them(tmp_path, monkeypatch):
    monkeypatch.setattr(muster, "RECRUIT_S", 0.01)
    have = {"CPU": 1.0}
    monkeypatch.setattr(muster, "cluster", lambda: [have])
    context = context_of(tmp_path, workers={"min": 2, "max": 4})
    with muster.Recruiter(context, 2):
        time.sleep(0.1)
        assert control.asked(tmp_path) is None
        have["CPU"] = 1.5
        for _ in range(500):
            if control.asked(tmp_path):
                break
            time.sleep(0.01)
    assert control.asked(tmp_path) == control.REGROUP


def lose(tmp_path, monkeypatch, *outcomes, **context):
    """How an attempt ended, and the contexts of its groups; an outcome is (error, step that was reached)."""
    left, seen = list(outcomes), []

    def group(context):
        seen.append(context)
        error, step = left.pop(0)
        if step >= 5:
            (Path(context.vault_dir) / "step-00000005").mkdir(parents=True, exist_ok=True)
        with EventLog(tmp_path) as log:
            log.emit("metrics", step=step)
        return error

    monkeypatch.setattr(attempt, "_group", group)
    return attempt.attempt(context_of(tmp_path).model_copy(update=context)), seen


GONE = SystemFault("worker 1 is gone", code="worker_failed")


def test_a_lost_group_is_followed_by_one_that_goes_on(tmp_path, monkeypatch):
    end, seen = lose(tmp_path, monkeypatch, (GONE, 3), (GONE, 9), (None, 20), resume_from="/earlier")
    assert end is None and [context.group for context in seen] == [0, 1, 2]
    assert [context.resume_from for context in seen] == ["/earlier", "/earlier", seen[0].vault_dir]
    told = [event for _, event in read_events(tmp_path / "events.jsonl", 0) if event["type"] == "phase"]
    assert [event["data"]["failures"] for event in told] == [1, 2] and "worker 1 is gone" in told[0]["message"]


def test_losses_have_an_end(tmp_path, monkeypatch):
    end, seen = lose(tmp_path, monkeypatch, *((GONE, step) for step in (1, 2, 3)), max_losses=2)
    assert end.code == "worker_failed" and "3 groups of workers were lost" in end.message and len(seen) == 3


def test_what_stops_every_group_at_one_step_is_poison(tmp_path, monkeypatch):
    end, seen = lose(tmp_path, monkeypatch, *((GONE, step) for step in (5, 7, 6, 7)))
    assert end.code == "poisoned" and "step 7" in end.message and len(seen) == 4


@pytest.mark.parametrize(
    "error",
    [UserError("bad weights", code="weights_mismatch"), SystemFault("nan", code="not_finite"),
     CapacityError("too small", code="cluster_too_small")],
)  # fmt: skip
def test_what_would_go_the_same_way_again_ends_at_once(tmp_path, monkeypatch, error):
    end, seen = lose(tmp_path, monkeypatch, (error, 3))
    assert end is error and len(seen) == 1


def test_a_group_that_makes_room_for_more_is_no_loss(tmp_path, monkeypatch):
    control.ask(tmp_path, control.REGROUP)
    calls = []

    def group(context):
        calls.append((context.group, control.asked(tmp_path)))
        if len(calls) == 1:
            control.ask(tmp_path, control.REGROUP)
            (tmp_path / control.PAUSED_FILE).write_text("{}")

    monkeypatch.setattr(attempt, "_group", group)
    assert attempt.attempt(context_of(tmp_path).model_copy(update={"max_losses": 0})) is None
    assert calls == [(0, None), (1, None)] and attempt.paused(context_of(tmp_path)) is None


def test_a_machine_that_is_switched_off_asks_for_a_checkpoint_once_there_is_training(tmp_path):
    with pytest.raises(loop._SwitchedOffError):
        loop._switched_off(tmp_path, Trackers([]))
    with Pulse(tmp_path, 0) as pulse:
        pulse.phase("train")
        for _ in range(300):
            if any(account.phase == "train" for account in accounts(tmp_path)):
                break
            time.sleep(0.02)
        loop._switched_off(tmp_path, Trackers([]))
    assert control.asked(tmp_path) == control.DRAIN


@pytest.mark.parametrize("want", [control.CANCEL, control.END])
def test_a_run_that_nobody_wants_any_more_ends_at_once(tmp_path, want):
    code = (
        "import sys; from pathlib import Path; from workers import control, loop, tracking; "
        "run_dir = Path(sys.argv[1]); control.ask(run_dir, sys.argv[2]); "
        "loop._switched_off(run_dir, tracking.Trackers([]))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path), want], check=False).returncode == 143


def fail(tmp_path, number, error):
    failures.record(tmp_path, number, error, rank.as_known(error, number))


def test_the_root_cause_is_the_first_failure_that_is_not_an_echo(tmp_path):
    assert failures.root_cause(tmp_path) is None
    fail(tmp_path, 1, RuntimeError("Connection closed by peer"))
    fail(tmp_path, 2, SystemFault("A worker on this machine is gone.", code="peer_lost"))
    fail(tmp_path, 0, UserError("weights do not fit", code="weights_mismatch", param="weights"))
    found = failures.root_cause(tmp_path)
    assert isinstance(found, UserError) and found.to_dict()["param"] == "weights"


def test_out_of_memory_is_a_matter_of_capacity(tmp_path):
    fail(tmp_path, 0, torch.OutOfMemoryError("CUDA out of memory"))
    assert failures.root_cause(tmp_path).to_dict()["code"] == "out_of_memory"


@pytest.mark.parametrize(
    ("ended", "status", "code"), [("all", "succeeded", 0), ("pause", "paused", 0), ("no", "failed", 1)]
)
def test_the_last_line_of_a_run_is_its_outcome(tmp_path, monkeypatch, capfd, ended, status, code):
    def group(context):
        if ended == "pause":
            (tmp_path / control.PAUSED_FILE).write_text("{}")
        return UserError("all is lost", code="lost") if ended == "no" else None

    (tmp_path / control.PAUSED_FILE).write_text("{}")  # of an earlier attempt in the same directory
    monkeypatch.setattr(ray, "init", lambda **_: os.write(1, b"what Ray has to say\n"))
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(attempt, "_group", group)
    (tmp_path / "context.json").write_text(context_of(tmp_path).model_dump_json())
    assert loop.main(["--context", str(tmp_path / "context.json")]) == code
    *_, (_, event) = read_events(tmp_path / "events.jsonl", 0)
    error = UserError("all is lost", code="lost").to_dict() if ended == "no" else None
    why = {"why": "pause"} if ended == "pause" else {}
    assert event["type"] == "outcome" and event["data"] == {"status": status, "error": error, **why}
    out, err = capfd.readouterr()
    assert out == "" and err == "starting\n" + ("d2ft: job job failed: all is lost\n" if ended == "no" else "")
    assert "what Ray has to say" in (tmp_path / "logs" / "driver.log").read_text()


def test_the_driver_and_the_controller_load_no_torch():
    modules = "workers.loop, workers.sweep, workers.meeting"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_checkpoints_lie_beside_rays_own_files_by_job(tmp_path):
    vault = rank.vault_of(context_of(tmp_path).model_copy(update={"attempt": 3, "resume_from": "/elsewhere"}))
    assert vault.directory == tmp_path / "checkpoints" / "job" and vault.attempt == 3
    assert vault.resume_from == Path("/elsewhere") and rank.vault_of(context_of(tmp_path)).resume_from is None


class FakeActor:
    """Answers from a list; remembers what it was told."""

    def __init__(self, answers):
        self.answers, self.announced = list(answers), []
        self.asked, self.connected = [], 0
        self.plan = SimpleNamespace(remote=self._plan)
        self.announce = SimpleNamespace(remote=self._announce)

    def _plan(self, job, attempt, window, report, rank):
        self.asked.append((window, report, rank))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _announce(self, job, attempt, world_size, rank, announcement):
        self.announced.append((rank, announcement))
        return {"announced": 1}


@pytest.fixture
def planner_with(tmp_path, monkeypatch):
    def make(answers):
        actor = FakeActor(answers)

        def connect(state_dir):
            assert state_dir == str(tmp_path / "scheduler")
            actor.connected += 1
            return actor

        monkeypatch.setattr(rank.actor, "connect", connect)
        monkeypatch.setattr(ray, "get", lambda answer: answer)
        return rank.ActorPlanner(context_of(tmp_path), 1, 2), actor

    return make


def plan_answer(**change):
    costs = costs_of(2)
    scores = make_scores("random", np.ones((4, 4)), np.ones((4, 4)), 0)
    plan = make_plan(PlanRequest(ratios=(2, 0, 1)), costs, scores)
    answer = {**plan.to_dict(), "profiles": [asdict(p) for p in costs.profiles], "change": change or None}
    return json.loads(json.dumps(answer)), costs


def forgotten():
    return {"error": SystemFault("Nobody announced this attempt.", code="unknown_attempt").to_dict()}


def test_the_planner_waits_announces_again_after_a_restart_and_keeps_the_placement(planner_with):
    first, costs = plan_answer()
    second, _ = plan_answer(reason="heads move")
    planner, actor = planner_with([{"waiting": 1}, first, forgotten(), second])
    planner.announce({"profile": 1})
    planned = planner.plan(0, None)
    assert isinstance(planned.plan, Plan) and tuple(planned.profiles) == costs.profiles and planned.change == {}
    report = {"placement": planned.plan.placement.to_dict(), "progress": 0.5}
    assert planner.plan(1, report).change == {"reason": "heads move"}
    assert actor.asked == [(0, None, 1)] * 2 + [(1, report, 1)] * 2
    assert list(actor.announced[1][1]) == ["profile", "placement"]
    kept = Placement.from_dict(actor.announced[1][1]["placement"])
    assert np.array_equal(kept.owner_LH, planned.plan.placement.owner_LH)


def test_a_scheduler_that_is_gone_is_made_anew_and_told_again(planner_with):
    answer, _ = plan_answer()
    planner, actor = planner_with([ray.exceptions.RayActorError(), forgotten(), answer])
    planner.announce({"profile": 1})
    planner.plan(0, None)
    assert actor.connected == 2 and [rank for rank, _ in actor.announced] == [1, 1]


def test_a_scheduler_that_stays_away_is_a_fault_of_the_system(planner_with, monkeypatch):
    monkeypatch.setattr(rank, "PLAN_TIMEOUT_S", 0.1)
    planner, _ = planner_with([ray.exceptions.RayActorError()] * 50)
    with pytest.raises(SystemFault) as raised:
        planner.plan(0, None)
    assert raised.value.code == "scheduler_lost"


def test_a_lost_scheduler_does_not_change_how_a_job_ended(monkeypatch):
    def get(answer, timeout):
        raise ray.exceptions.GetTimeoutError("no answer")

    monkeypatch.setattr(ray, "get", get)
    attempt._forget(SimpleNamespace(forget=SimpleNamespace(remote=lambda job: job)), "job")


def test_cores_are_given_to_every_rank_or_to_none(tmp_path):
    assert context_of(tmp_path).cores is None
    given = RunContext.model_validate_json(context_of(tmp_path).model_copy(update={"cores": (0, 1)}).model_dump_json())
    assert given.cores == (0, 1)
    with pytest.raises(ValueError, match="1 cores for 2 workers"):
        RunContext(job_id="job", spec=JobSpec(), run_dir="r", storage_path="s", cores=(0,))


def test_an_infeasible_plan_is_the_users_error(planner_with):
    error = InfeasibleError("no plan", code="budgets_infeasible", param="method.budgets").to_dict()
    planner, _ = planner_with([{"error": error}])
    with pytest.raises(UserError) as raised:
        planner.plan(0, None)
    assert raised.value.code == "budgets_infeasible" and raised.value.param == "method.budgets"


def test_plans_survive_json():
    answer, _ = plan_answer()
    plan = Plan.from_dict(answer)
    assert json.loads(json.dumps(plan.to_dict())) == {
        k: v for k, v in answer.items() if k not in ("profiles", "change")
    }
    assert isinstance(plan.placement_report, SolverReport)
    assert uniform_ops(SHAPE, 3, 2).shape == plan.cycle[0].shape
