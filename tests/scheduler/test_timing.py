"""The clock is quick; a plain one says whether it is right."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler import timing, transfers
from scheduler.compiler import compile_step, with_frees
from scheduler.cost import Costs
from scheduler.domain import Op, Placement, uniform_ops
from scheduler.errors import DeadlockError
from tests.scheduler.plain_clock import play_plainly
from tests.scheduler.test_program import SHAPE, costs_of, plans


@settings(max_examples=60, deadline=None)
@given(plans(), st.sampled_from([None, 1, 2, 4]), st.integers(0, 400), st.integers(0, 30), st.booleans())
def test_the_quick_clock_goes_like_the_plain_one(plan, max_in_flight, latency_us, message_us, recompute):
    placement, ops = plan
    costs = costs_of(placement.num_workers, ops.shape[2], latency_us=latency_us)
    extra = {"send_us": message_us, "recv_us": message_us // 2, "trunk_us": 3, "end_us": 7}
    step = dataclasses.replace(costs.step, recompute=recompute)
    costs = Costs(costs.shape, step, [dataclasses.replace(p, **extra) for p in costs.profiles])
    lanes = [transfers.lower(placement, ops[:, :, m], m) for m in range(ops.shape[2])]
    workers = [[with_frees(lane[w]) for lane in lanes] for w in range(placement.num_workers)]
    seen = timing.play(workers, costs, max_in_flight=max_in_flight)
    plain = play_plainly(workers, costs, max_in_flight)
    assert (seen.order, seen.begin_us, seen.end_us, seen.link_bytes, seen.peak_bytes) == plain
    programs = [[program.instructions] for program in compile_step(placement, ops, costs)]
    seen, plain = timing.play(programs, costs), play_plainly(programs, costs)
    assert (seen.order, seen.begin_us, seen.end_us, seen.link_bytes, seen.peak_bytes) == plain


@settings(max_examples=30, deadline=None)
@given(plans())
def test_busy_time_is_the_sum_of_what_ran(plan):
    placement, ops = plan
    costs = costs_of(placement.num_workers, ops.shape[2])
    seen = timing.play([[p.instructions] for p in compile_step(placement, ops, costs)], costs)
    for worker, order in enumerate(seen.order):
        assert seen.busy_us[worker] == sum(timing.duration_us(costs, worker, i) for i in order)


def test_a_standstill_shows_where_every_worker_waits():
    costs = costs_of(2)
    split = Placement.make([[0, 0, 1, 1]] * 4, 2)
    first, second = compile_step(split, uniform_ops(SHAPE, 3, Op.FULL), costs)
    mute = [i for i in second.instructions if i.kind != "send"]
    with pytest.raises(DeadlockError, match=r"w0 at .*recv part b00\.attn m0 <w1"):
        timing.play([[first.instructions], [mute]], costs)
