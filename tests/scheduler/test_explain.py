"""Every head has a reason and every worker something that binds it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler import gantt, timing
from scheduler.compiler import compile_step, rehearse
from scheduler.cost import Costs
from scheduler.domain import Op, Placement, Plan, Scores, SolverReport, StepShape, mean_forecast, uniform_ops
from scheduler.explain import BINDINGS, Explanation
from scheduler.memory import needs_of
from scheduler.placement import memory_bytes_of
from scheduler.simulate import forecast_of
from tests.scheduler.fleet import fleet, vit_shape

SHAPE = vit_shape(num_blocks=4, num_heads=4, dim=32, num_tokens=10)
REPORT = SolverReport("none", "GIVEN", 0.0, 0.0, 0.0, 0.0)
HALVES = Placement.make([[0, 0, 1, 1]] * 4, 2)
WHOLE = Placement.make(np.repeat([0, 0, 1, 1], 4).reshape(4, 4), 2)


def explained(placement, ops, speeds=None, worth=None, **fleet_words):
    costs = Costs(SHAPE, StepShape(ops[0].shape[2], 4), fleet(speeds or [1.0] * placement.num_workers, **fleet_words))
    full = uniform_ops(SHAPE, ops[0].shape[2], Op.FULL)
    forecast, all_full = (
        mean_forecast(forecast_of(rehearse(placement, table, costs), costs) for table in tables)
        for tables in (ops, [full])
    )
    worth_LH = np.ones((4, 4)) if worth is None else np.asarray(worth, dtype=float)
    needs = needs_of(placement, ops, costs, forecast, all_full, scored=False)
    totals = tuple(need.total for need in needs)
    plan = Plan(1, 0, placement, tuple(ops), forecast, all_full, REPORT, REPORT, memory_bytes=totals)
    return Explanation(plan, costs, Scores(worth_LH, np.ones((4, 4))))


@st.composite
def cases(draw):
    num_workers, num_micro_batches = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    placement = Placement.make(rng.integers(0, num_workers, (4, 4)), num_workers)
    cycle = [
        rng.choice(3, (4, 4, num_micro_batches), p=rng.dirichlet([0.6] * 3)).astype(np.int8)
        for _ in range(draw(st.integers(1, 3)))
    ]
    speeds = rng.uniform(0.2, 3, num_workers).tolist()
    return explained(placement, cycle, speeds, rng.uniform(0, 3, (4, 4)), shape=SHAPE, batch=4)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_what_heads_cost_adds_up_to_the_calls_of_their_owners(told):
    placement, costs, cycle = told.plan.placement, told.costs, told.plan.cycle
    called_us = np.zeros(placement.num_workers)
    for ops in cycle:
        for program in compile_step(placement, ops, costs):
            for i in (i for i in program.instructions if i.kind in ("fwd", "bwd")):
                called_us[program.worker] += timing.duration_us(costs, program.worker, i) / len(cycle)
    time_us_LH = told.time_us()
    for worker in range(placement.num_workers):
        own_LH = placement.owner_LH == worker
        assert time_us_LH[own_LH].sum() == pytest.approx(called_us[worker])
        assert called_us[worker] <= told.plan.forecast.busy_us[worker] + 1
    assert not time_us_LH[(np.stack(cycle) == Op.SKIP).all(axis=(0, 3))].any()


def test_what_is_told_is_small_json_and_the_chart_is_left_out_where_it_is_large(monkeypatch):
    told = explained(HALVES, [full(3)])
    found = json.loads(json.dumps(told.told(embed_grad=True)))
    assert set(found) == {"heads", "devices", "gantt"}
    assert set(found["heads"][0][0]) == {"owner", "ops", "worth", "time_us", "reason"}
    assert found["gantt"]["step_us"] == told.plan.forecast.step_us
    monkeypatch.setattr(gantt, "MOST_SPANS", 5)
    assert told.told(embed_grad=True)["gantt"] is None


@settings(max_examples=60, deadline=None)
@given(cases())
def test_every_head_has_a_reason_and_every_worker_a_binding(told):
    placement, heads, workers = told.plan.placement, told.heads(), told.workers()
    for block, row in enumerate(heads):
        for head, told_head in enumerate(row):
            assert told_head["owner"] == placement.owner_LH[block, head]
            assert told_head["ops"] == "".join("SOF"[op] for op in told.plan.cycle[0][block, head])
            assert told_head["reason"].endswith(".") and ";" in told_head["reason"]
            assert any(word in told_head["reason"] for word in ("FULL", "FORWARD", "SKIP"))
    assert [w["rank"] for w in workers] == list(range(placement.num_workers))
    assert sum(w["heads"] for w in workers) == 16
    for worker in workers:
        assert worker["binding"] in BINDINGS and worker["note"]
        assert (worker["binding"] == "idle") == (worker["heads"] == 0)
        assert worker["busy_us"] + worker["idle_us"] == told.plan.forecast.step_us
        assert worker["memory_bytes"] >= 0


def test_a_lone_worker_is_bound_by_its_time():
    (worker,) = explained(Placement.make(np.zeros((4, 4)), 1), [full(3)]).workers()
    assert worker["binding"] == "time" and "100%" in worker["note"]


def test_a_worker_without_heads_is_idle_and_told_why():
    placement = Placement.make(np.zeros((4, 4)), 2)
    slow = explained(placement, [full(3)], speeds=[4.0, 1.0], gflops=0.5).workers()[1]
    assert slow["binding"] == "idle" and "4.0 ×" in slow["note"]
    alike = explained(placement, [full(3)]).workers()[1]
    assert alike["binding"] == "idle" and "messages" in alike["note"]
    small = explained(placement, [full(3)], free_bytes=[1 << 30, 10]).workers()[1]
    assert small["binding"] == "idle" and "memory" in small["note"]


def test_a_worker_whose_memory_holds_no_further_head_is_bound_by_memory():
    roomy = explained(WHOLE, [full(3)])
    exact = memory_bytes_of(WHOLE, roomy.costs)
    tight = explained(WHOLE, [full(3)], free_bytes=[int(b) + 10 for b in exact]).workers()
    assert {w["binding"] for w in tight} == {"memory"}
    assert [w["memory_limit_bytes"] for w in tight] == [b + 10 for b in exact]
    assert all(w["memory_bytes"] <= w["memory_limit_bytes"] for w in tight)


def test_a_slow_wire_between_split_blocks_binds():
    told = explained(HALVES, [full(5)], link_bytes_per_s=10**6, gflops=1000.0, overhead_us=1)
    assert {w["binding"] for w in told.workers()} == {"link"}


def test_whole_blocks_without_enough_micro_batches_are_bound_by_the_path():
    told = explained(WHOLE, [full(1)], link_bytes_per_s=10**10, latency_us=1, speeds=[3.0, 1.0], gflops=0.1)
    assert told.workers()[0]["binding"] == "path"


def test_heads_that_are_worth_more_than_the_cut_are_full_for_that_reason():
    worth = np.arange(16, 0, -1).reshape(4, 4)
    ops = held(worth > 8, 3)
    heads = explained(HALVES, [ops], worth=worth).heads()
    assert "FULL: worth 16 (rank 1 of 16), not below the cut of 9" in heads[0][0]["reason"]
    assert "FORWARD: worth 1 (rank 16 of 16), not above the cut of 9" in heads[3][3]["reason"]


def test_a_slow_device_that_takes_forward_heads_says_so():
    worth = np.tile([1, 1, 5, 5], (4, 1))
    heads = explained(HALVES, [held(HALVES.owner_LH == 0, 3)], speeds=[4.0, 1.0], worth=worth, gflops=0.2).heads()
    assert "slow device takes FORWARD" in heads[0][3]["reason"] and "FULL though" in heads[0][0]["reason"]


def test_a_coherent_skip_is_told_from_a_scattered_one():
    coherent, scattered = full(2), full(2)
    coherent[1, 2:, 0] = Op.SKIP
    scattered[1, 2, 0] = Op.SKIP
    assert "messages fall away" in explained(HALVES, [coherent]).heads()[1][3]["reason"]
    told = explained(HALVES, [scattered]).heads()[1][2]["reason"]
    assert "sits out 50%" in told and "messages" not in told
    passed = full(2)
    passed[1, :, 0] = Op.SKIP
    assert "pass the whole block by" in explained(WHOLE, [passed]).heads()[1][0]["reason"]


def full(num_micro_batches):
    return uniform_ops(SHAPE, num_micro_batches, Op.FULL)


def held(full_LH, num_micro_batches):
    return np.repeat(np.where(full_LH, 2, 1)[:, :, None], num_micro_batches, axis=2).astype(np.int8)


def test_where_whole_micro_batches_are_chosen_no_head_is_ranked():
    ops = np.tile(np.array([Op.FULL, Op.FULL, Op.SKIP], dtype=np.int8), (4, 4, 1))
    reason = explained(HALVES, [ops]).heads()[1][2]["reason"]
    assert "FULL in 67%, SKIP in 33% of the micro-batches, as every head" in reason and "rank" not in reason
