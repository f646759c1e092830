"""Frozen blocks: nothing below them is FULL, what is asked holds for the blocks above, budgets for the whole."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.check import check
from scheduler.cost import Costs
from scheduler.domain import Op, StepShape, step_flops, uniform_ops
from scheduler.errors import InfeasibleError, UserError
from scheduler.explain import Explanation
from scheduler.placement import memory_bytes_of
from scheduler.plan import make_plan
from scheduler.request import PlanRequest
from scheduler.whatif import what_if
from tests.scheduler.fleet import fleet, vit_shape
from tests.scheduler.test_selection import random_scores

BLOCKS, HEADS = 4, 4
WAYS = [
    {},
    {"strategy": "hardest", "ratios": (3, 1, 1)},
    {"strategy": "hardest", "compute": 0.7},
    {"ratios": (3, 0, 2)},
    {"ratios": (2, 1, 2), "hold": "none"},
    {"ratios": (2, 2, 1), "strategy": "two_stage"},
    {"compute": 0.75},
    {"compute": 0.8, "max_bytes": 0.9, "placement": "split"},
    {"compute": 0.75, "strategy": "uniform", "hold": "none"},
]


def frozen_costs(frozen, speeds=(1.0, 1.0), micro_batches=5, **changes):
    shape = replace(vit_shape(BLOCKS, HEADS), num_frozen=frozen, **changes)
    return Costs(shape, StepShape(micro_batches, 8), fleet(speeds, shape=shape))


@pytest.mark.parametrize("frozen", [1, 2])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_plans_train_nothing_below_and_keep_what_is_asked(way, frozen):
    costs, scores = frozen_costs(frozen, (1.0, 0.5)), random_scores(BLOCKS, HEADS)
    request = PlanRequest(**{"embed_grad": False, **way})
    plan = make_plan(request, costs, scores)
    assert check(plan, costs, request) == []
    ops = np.stack(plan.cycle)
    assert (ops[:, :frozen] <= Op.FORWARD).all() and (ops[:, frozen:] == Op.FULL).any()
    # A frozen head runs exactly where something above it does.
    assert ((ops[:, :frozen] > 0).all(axis=(1, 2)) == (ops[:, frozen:] > 0).any(axis=(1, 2))).all()
    assert plan.compute_fraction <= way.get("compute", 1.0) + 1e-9
    assert plan.bytes_fraction <= way.get("max_bytes", 1.0) + 1e-9
    below = [head for row in Explanation(plan, costs, scores).heads()[:frozen] for head in row]
    assert all("the block is frozen" in head["reason"] for head in below)


@settings(max_examples=40, deadline=None)
@given(frozen=st.integers(1, BLOCKS - 1), compute=st.floats(0.3, 1.0), hold=st.sampled_from(["training", "none"]))
def test_budgets_are_fractions_of_the_whole(frozen, compute, hold):
    costs, scores = frozen_costs(frozen), random_scores(BLOCKS, HEADS)
    request = PlanRequest(compute=compute, hold=hold, embed_grad=False)
    try:
        plan = make_plan(request, costs, scores)
    except InfeasibleError as error:
        assert error.param == "method.budgets"
        return
    assert check(plan, costs, request) == [] and plan.compute_fraction <= compute + 1e-9
    full = uniform_ops(costs.shape, 5, Op.FULL)
    one_head = 2 * 5 * costs.shape.head_forward_flops(0, 8)
    room = compute * step_flops(costs.shape, costs.step, full) - plan.forecast.flops
    assert room <= 3 * one_head * costs.num_workers or compute == 1.0


@pytest.mark.parametrize("way", WAYS[:3], ids=str)
def test_with_all_blocks_frozen_the_classifier_still_learns(way):
    costs = frozen_costs(BLOCKS, trained_norm_params=0, trained_head_params=(0,) * HEADS, backward_weight=1)
    request = PlanRequest(**{"embed_grad": False, **way})
    plan = make_plan(request, costs, random_scores(BLOCKS, HEADS))
    assert check(plan, costs, request) == []
    assert all((ops <= Op.FORWARD).all() and ops.any() for ops in plan.cycle)
    weights = 4 * (sum(costs.shape.head_params) + costs.shape.norm_params) * BLOCKS
    needs = memory_bytes_of(plan.placement, costs, np.zeros((BLOCKS, HEADS), dtype=bool))
    assert sum(needs) < weights * 2 + 16 * 2 * (costs.shape.embed_params + costs.shape.classifier_params)


def test_no_head_can_be_chosen_where_all_are_frozen():
    costs = frozen_costs(BLOCKS)
    with pytest.raises(UserError, match="all of them are frozen") as refused:
        make_plan(PlanRequest(ratios=(3, 0, 2), embed_grad=False), costs, random_scores(BLOCKS, HEADS))
    assert refused.value.param == "method.strategy"


def test_budgets_below_what_the_frozen_blocks_take_are_refused_with_the_least():
    with pytest.raises(InfeasibleError, match=r"The 3 frozen blocks alone take 0\.49 of all-FULL's compute") as refused:
        make_plan(PlanRequest(compute=0.3, embed_grad=False), frozen_costs(3), random_scores(BLOCKS, HEADS))
    assert refused.value.param == "method.budgets" and "hardest" in refused.value.remedy


def test_a_refusal_above_the_frozen_blocks_says_of_what_its_fractions_are():
    with pytest.raises(InfeasibleError, match="of what the blocks above the 3 frozen ones take"):
        make_plan(PlanRequest(compute=0.55, embed_grad=False), frozen_costs(3), random_scores(BLOCKS, HEADS))


def test_blocks_that_train_are_shared_out():
    """Work is shared by what blocks take, and one that only runs forward takes a third."""
    costs = frozen_costs(2)
    plan = make_plan(PlanRequest(embed_grad=False, placement="whole"), costs, random_scores(BLOCKS, HEADS))
    trained = plan.placement.owner_LH[2:, 0]
    assert trained[0] != trained[1]


def test_a_what_if_knows_frozen_blocks():
    shape = {**vars(frozen_costs(2).shape), "num_frozen": 2}
    asked = {"shape": shape, "step": {"num_micro_batches": 5, "micro_batch_size": 8}, "devices": ["2x fast"]}
    assert {head["ops"] for row in what_if(asked)["heads"][:2] for head in row} == {"OOOOO"}
    with pytest.raises(UserError, match="more than the 4 blocks") as refused:
        what_if({**asked, "shape": {**shape, "num_frozen": 5}})
    assert refused.value.param == "shape.num_frozen"
