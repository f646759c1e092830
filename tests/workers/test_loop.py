"""The driver's decisions without a cluster: what it reads, waits for, asks and reports."""

from __future__ import annotations

import json
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import torch

from scheduler.domain import Placement, Plan, SolverReport, uniform_ops
from scheduler.errors import CapacityError, InfeasibleError, SystemFault, UserError
from scheduler.plan import PlanRequest, make_plan
from scheduler.scores import make_scores
from tests.scheduler.test_program import SHAPE, costs_of
from workers import loop
from workers.contract import JobSpec, RunContext


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
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    loop.wait_for_capacity(context_of(tmp_path, workers=4))
    with pytest.raises(CapacityError, match=r"5 workers need 2\.5 CPU.*the cluster has 2") as error:
        loop.wait_for_capacity(context_of(tmp_path, workers=5))
    assert error.value.param == "workers" and error.value.code == "cluster_too_small"


def test_the_root_cause_is_the_first_failure_that_is_not_an_echo(tmp_path):
    assert loop.root_cause(tmp_path) is None
    loop._record_failure(tmp_path, 1, RuntimeError("Connection closed by peer"))
    loop._record_failure(tmp_path, 2, SystemFault("A worker on this machine is gone.", code="peer_lost"))
    loop._record_failure(tmp_path, 0, UserError("weights do not fit", code="weights_mismatch", param="weights"))
    found = loop.root_cause(tmp_path)
    assert isinstance(found, UserError) and found.to_dict()["param"] == "weights"


def test_out_of_memory_is_a_matter_of_capacity(tmp_path):
    loop._record_failure(tmp_path, 0, torch.OutOfMemoryError("CUDA out of memory"))
    assert loop.root_cause(tmp_path).to_dict()["code"] == "out_of_memory"


class FakeActor:
    """Answers from a list; remembers what it was told."""

    def __init__(self, answers):
        self.answers, self.announced = list(answers), []
        self.plan = SimpleNamespace(remote=lambda *args: self.answers.pop(0))
        self.announce = SimpleNamespace(remote=self._announce)

    def _announce(self, job, attempt, world_size, rank, announcement):
        self.announced.append((rank, announcement))
        return {"announced": 1}


@pytest.fixture
def planner_with(tmp_path, monkeypatch):
    def make(answers):
        actor = FakeActor(answers)
        monkeypatch.setattr(loop.actor, "connect", lambda: actor)
        monkeypatch.setattr(ray, "get", lambda answer: answer)
        return loop.ActorPlanner(context_of(tmp_path), 1, 2), actor

    return make


def plan_answer():
    costs = costs_of(2)
    scores = make_scores("random", np.ones((4, 4)), np.ones((4, 4)), 0)
    plan = make_plan(PlanRequest(ratios=(2, 0, 1)), costs, scores)
    return json.loads(json.dumps({**plan.to_dict(), "profiles": [asdict(p) for p in costs.profiles]})), costs


def test_the_planner_waits_announces_again_after_a_restart_and_keeps_the_placement(planner_with):
    answer, costs = plan_answer()
    forgotten = {"error": SystemFault("Nobody announced this attempt.", code="unknown_attempt").to_dict()}
    planner, actor = planner_with([{"waiting": 1}, answer, forgotten, answer])
    planner.announce({"profile": 1})
    plan, profiles = planner.plan(0)
    assert isinstance(plan, Plan) and tuple(profiles) == costs.profiles
    planner.plan(1)
    assert list(actor.announced[1][1]) == ["profile", "placement"]
    kept = Placement.from_dict(actor.announced[1][1]["placement"])
    assert np.array_equal(kept.owner_LH, plan.placement.owner_LH)


def test_an_infeasible_plan_is_the_users_error(planner_with):
    error = InfeasibleError("no plan", code="budgets_infeasible", param="method.budgets").to_dict()
    planner, _ = planner_with([{"error": error}])
    with pytest.raises(UserError) as raised:
        planner.plan(0)
    assert raised.value.code == "budgets_infeasible" and raised.value.param == "method.budgets"


def test_plans_survive_json():
    answer, _ = plan_answer()
    plan = Plan.from_dict(answer)
    assert json.loads(json.dumps(plan.to_dict())) == {k: v for k, v in answer.items() if k != "profiles"}
    assert isinstance(plan.placement_report, SolverReport)
    assert uniform_ops(SHAPE, 3, 2).shape == plan.cycle[0].shape
