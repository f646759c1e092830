"""What plans say of memory: never more than the constraint of placement lets through; and a cap divides a model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.check import forecast
from scheduler.cost import Costs
from scheduler.domain import Op, Placement, Plan, Scores, StepShape, uniform_ops
from scheduler.errors import InfeasibleError
from scheduler.memory import needs_of, num_params
from scheduler.placement import memory_bytes_of
from scheduler.plan import make_plan
from scheduler.request import PlanRequest
from tests.scheduler.fleet import fleet, vit_shape

SHAPE = vit_shape(num_blocks=4, num_heads=4, dim=32, num_tokens=10)
STEP = StepShape(3, 4)
BASE = 700_000_000


@st.composite
def cases(draw):
    workers = draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    placement = Placement.make(rng.integers(0, workers, (4, 4)), workers)
    cycle = [
        rng.choice(3, (4, 4, 3), p=rng.dirichlet([0.6] * 3)).astype(np.int8) for _ in range(draw(st.integers(1, 3)))
    ]
    profiles = [replace(p, base_bytes=BASE) for p in fleet([1.0] * workers, shape=SHAPE, batch=4)]
    return placement, cycle, Costs(SHAPE, STEP, profiles)


def seen_of(placement, ops_LHM, costs):
    return forecast(PlanRequest(), placement, ops_LHM, costs)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_training_never_needs_more_than_the_constraint_counts(case):
    placement, cycle, costs = case
    full = seen_of(placement, uniform_ops(SHAPE, 3, Op.FULL), costs)
    steps = [seen_of(placement, ops, costs) for ops in cycle]
    trained_LH = np.any([(ops == Op.FULL).any(axis=2) for ops in cycle], axis=0)
    bounds = memory_bytes_of(placement, costs, trained_LH)
    for step in steps:
        for worker, need in enumerate(needs_of(placement, cycle, costs, step, full, scored=True)):
            assert 0 <= need.training <= bounds[worker]
            assert need.total == BASE + max(need.set_up, need.rehearsal, need.training, need.end)
            assert need.set_up >= 4 * num_params(SHAPE)


def test_all_full_steps_need_two_numbers_per_parameter_less_in_rehearsal():
    placement = Placement.make(np.zeros((4, 4)), 1)
    profiles = [replace(profile, base_bytes=BASE) for profile in fleet([1.0], shape=SHAPE, batch=4)]
    costs, full = Costs(SHAPE, STEP, profiles), uniform_ops(SHAPE, 3, Op.FULL)
    seen = seen_of(placement, full, costs)
    (need,) = needs_of(placement, [full], costs, seen, seen, scored=False)
    of_blocks = SHAPE.num_blocks * (sum(SHAPE.head_params) + SHAPE.norm_params)
    assert need.training == 16 * num_params(SHAPE) + seen.peak_bytes[0]
    assert need.training - need.rehearsal == 8 * of_blocks
    assert need.end == 4 * num_params(SHAPE) + 4 * of_blocks + 16 * (num_params(SHAPE) - of_blocks)


def test_a_model_too_large_for_one_worker_is_divided_over_two():
    shape, step = vit_shape(12, 6, 384), StepShape(3, 2)
    worth = Scores(np.ones((12, 6)), np.ones((12, 6)))

    def planned(count: int, free: int, limit: int = 0) -> Plan:
        profiles = fleet([1.0] * count, shape=shape, batch=2, free_bytes=free)
        limited = [replace(p, base_bytes=BASE, limit_bytes=limit) for p in profiles]
        return make_plan(PlanRequest(), Costs(shape, step, limited), worth)

    (whole,) = planned(1, 1 << 40).memory_bytes
    room = round(0.6 * (whole - BASE))
    both = planned(2, room, BASE + room)
    assert all(heads > 0 for heads in both.placement.heads_owned)
    assert all(BASE < need <= BASE + room for need in both.memory_bytes)
    assert Plan.from_dict(both.to_dict()).memory_bytes == both.memory_bytes
    with pytest.raises(InfeasibleError, match=r"beside the 0\.7 of its process, of [\d.]+ allowed") as refused:
        planned(1, room, BASE + room)
    assert (refused.value.code, refused.value.param) == ("memory_infeasible", "worker_memory_bytes")
    assert "raise worker_memory_bytes" in refused.value.remedy
