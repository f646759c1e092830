"""Plans meet what was asked and survive JSON; a judge without a solver finds what is wrong with a bad one."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from scheduler.check import check
from scheduler.cost import Costs
from scheduler.domain import Forecast, Op, Placement, Plan, Scores, StepShape
from scheduler.errors import InfeasibleError, UserError
from scheduler.plan import held_rows, make_plan
from scheduler.request import Phase, PlanRequest
from tests.scheduler.fleet import fleet, random_scores, vit_shape

REQUESTS = {
    "all-FULL": PlanRequest(),
    "3F2S": PlanRequest(ratios=(3, 0, 2)),
    "2F3O": PlanRequest(ratios=(2, 3, 0)),
    "2F1O2S redrawn": PlanRequest(ratios=(2, 1, 2), hold="none"),
    "2F1O2S scattered": PlanRequest(ratios=(2, 1, 2), hold="none", grain="scattered"),
    "2F1O2S static": PlanRequest(ratios=(2, 1, 2), hold="all"),
    "two-stage": PlanRequest(ratios=(2, 1, 2), strategy="two_stage", hold="none"),
    "random": PlanRequest(ratios=(2, 3, 0), strategy="random"),
    "uniform": PlanRequest(ratios=(2, 3, 0), strategy="uniform"),
    "full": PlanRequest(strategy="full"),
    "budgets": PlanRequest(compute=0.6, max_bytes=0.5),
    "budgets whole": PlanRequest(compute=0.5, placement="whole", embed_grad=False),
}


def setting(
    speeds: tuple[float, ...] = (1.0, 1.0), blocks: int = 6, dim: int = 96, **links: object
) -> tuple[Costs, Scores]:
    shape = vit_shape(blocks, 6, dim)
    return Costs(shape, StepShape(5, 16), fleet(speeds, shape=shape, **links)), random_scores(blocks, 6)  # type: ignore[arg-type]


@pytest.mark.parametrize("speeds", [(1.0,), (1.0, 1.0), (2.0, 1.0, 1.0)])
@pytest.mark.parametrize("name", REQUESTS)
def test_every_request_gives_a_plan_that_the_judge_accepts(name: str, speeds: tuple[float, ...]) -> None:
    request, (costs, scores) = REQUESTS[name], setting(speeds)
    plan = make_plan(request, costs, scores)
    assert check(plan, costs, request) == []
    assert plan.forecast.step_us <= plan.all_full.step_us
    if request.compute is not None:
        assert 0.95 * request.compute <= plan.compute_fraction <= request.compute
        assert plan.bytes_fraction <= request.max_bytes
    if request.ratios is not None:
        full, forward, _ = request.ratios
        assert plan.compute_fraction == pytest.approx((full + forward / 3) / 5, abs=0.01)


def test_auto_takes_the_placement_that_is_fastest_as_simulated() -> None:
    costs, scores = setting((2.0, 1.0), blocks=12, dim=384)
    steps = {
        mode: make_plan(PlanRequest(placement=mode), costs, scores).forecast.step_us
        for mode in ("auto", "unmixed", "split", "whole")
    }
    assert steps["auto"] <= steps["unmixed"] <= min(steps["split"], steps["whole"])


def test_slow_links_lead_to_whole_blocks_and_fast_ones_to_split_blocks() -> None:
    fast, scores = setting(dim=384, link_bytes_per_s=10**10)
    slow, _ = setting(dim=384, link_bytes_per_s=3 * 10**6)
    sizes = [
        {len(plan.placement.holders(block)) for block in range(6)}
        for plan in (make_plan(PlanRequest(), costs, scores) for costs in (fast, slow))
    ]
    assert sizes == [{2}, {1}]


def test_auto_keeps_a_bytes_budget_even_where_whole_blocks_are_faster() -> None:
    costs, scores = setting(link_bytes_per_s=3 * 10**6)
    assert {len(make_plan(PlanRequest(), costs, scores).placement.holders(block)) for block in range(6)} == {1}
    assert make_plan(PlanRequest(compute=0.6, max_bytes=0.5), costs, scores).bytes_fraction <= 0.5


def test_the_next_window_keeps_the_placement_and_redraws() -> None:
    costs, scores = setting()
    request = PlanRequest(ratios=(3, 0, 2), seed=5)
    first = make_plan(request, costs, scores)
    second = make_plan(request, costs, scores, version=2, window=1, placement=first.placement)
    assert (second.placement.owner_LH == first.placement.owner_LH).all()
    assert (second.version, second.window, second.placement_report.status) == (2, 1, "KEPT")
    assert (np.stack(second.cycle) != np.stack(first.cycle)).any()


def test_held_heads_stay_held_over_windows_while_they_are_worth_it() -> None:
    costs, scores = setting()
    request = PlanRequest(ratios=(2, 3, 0))
    first = make_plan(request, costs, scores)
    noisy = replace(scores, backward_LH=scores.backward_LH * np.random.default_rng(1).uniform(0.95, 1.05, (6, 6)))
    turned = replace(scores, backward_LH=scores.backward_LH[::-1])
    kept, changed = (
        make_plan(request, costs, now, window=1, placement=first.placement, held=held_rows(first))
        for now in (noisy, turned)
    )
    assert held_rows(kept) == held_rows(first) != held_rows(changed)


def test_a_plan_survives_json() -> None:
    costs, scores = setting()
    request = REQUESTS["budgets"]
    plan = make_plan(request, costs, scores)
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again.to_dict() == plan.to_dict()
    assert check(again, costs, request) == []


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_survives_json(name: str) -> None:
    request = REQUESTS[name]
    assert PlanRequest.from_dict(json.loads(json.dumps(request.to_dict()))) == request


def test_an_unknown_strategy_is_named() -> None:
    with pytest.raises(UserError, match="'greedy' is not a strategy") as caught:
        PlanRequest(strategy="greedy")
    assert caught.value.param == "method.strategy"


def test_a_schedule_says_what_holds_when() -> None:
    first, second = Phase(0.25, ratios=(1, 0, 4)), Phase(0.75, compute=0.5, max_bytes=0.9)
    request = PlanRequest(schedule=(first, second), seed=3)
    assert [request.at(progress).ratios for progress in (0.0, 0.24, 0.25, 1.0)] == [(1, 0, 4), (1, 0, 4), None, None]
    assert (request.at(0.25).compute, request.at(0.25).max_bytes, request.at(0.25).seed) == (0.5, 0.9, 3)
    assert request.at(0.5).at(0.0) == request.at(0.5)
    assert PlanRequest.from_dict(json.loads(json.dumps(request.to_dict()))) == request


def test_budgets_that_no_placement_meets_say_how_near_each_one_comes() -> None:
    costs, scores = setting()
    with pytest.raises(InfeasibleError, match=r"Placement 1: .*Placement 2: .*least bytes fraction") as caught:
        make_plan(PlanRequest(compute=0.6, max_bytes=0.01), costs, scores)
    assert caught.value.code == "budgets_infeasible"


def spoil(plan: Plan, name: str) -> Plan:
    """A plan with one thing wrong."""
    owners, ops = plan.placement.owner_LH.copy(), plan.cycle[0].copy()
    if name == "owner":
        owners[0, 0] = 7
        return replace(plan, placement=Placement(owners, 2, plan.placement.classifier))
    if name == "classifier":
        owners[-1] = 1 - plan.placement.classifier
        return replace(plan, placement=Placement(owners, 2, plan.placement.classifier))
    if name == "shape":
        return replace(plan, cycle=(ops[:, :, :3],))
    if name == "op":
        ops[0, 0, 0] = 5
    if name == "starved":
        ops[:, :, 2] = int(Op.FORWARD)
    if name == "counts":
        ops[:, :, 0] = int(Op.FULL)
    if name == "forecast":
        wrong = {**plan.forecast.to_dict(), "step_us": -1}
        return replace(plan, forecast=Forecast.from_dict(wrong))
    return replace(plan, cycle=(ops,))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("owner", "owner is not one of the ranks 0 to 1"),
        ("classifier", "holds no head of the last block"),
        ("shape", r"table 0 has shape \(6, 6, 3\)"),
        ("op", "values that are no op"),
        ("starved", r"no FULL head for micro-batches \[2\]"),
        ("counts", "FULL, FORWARD and SKIP, not"),
        ("forecast", "negative number"),
    ],
)
def test_the_judge_names_what_is_wrong(name: str, words: str) -> None:
    costs, scores = setting()
    request = REQUESTS["2F3O"]
    faults = check(spoil(make_plan(request, costs, scores), name), costs, request)
    assert faults
    with pytest.raises(AssertionError, match=words):
        raise AssertionError("; ".join(faults))


def test_the_judge_counts_budgets_and_memory_itself() -> None:
    costs, scores = setting()
    plan = make_plan(PlanRequest(ratios=(4, 1, 0)), costs, scores)
    faults = check(plan, costs, PlanRequest(compute=0.6, max_bytes=0.5))
    assert [fault.split()[1] for fault in faults] == ["computes", "sends"]
    cramped = Costs(costs.shape, costs.step, fleet((1.0, 1.0), shape=costs.shape, free_bytes=1000))
    assert any("GB more than it has" in fault for fault in check(plan, cramped, PlanRequest(ratios=(4, 1, 0))))
