"""A Gantt chart tells the same step as the forecast."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise

from hypothesis import given, settings

from scheduler import gantt, timing
from scheduler.compiler import compile_step, rehearse
from scheduler.cost import Costs
from scheduler.domain import Placement, StepShape, uniform_ops
from scheduler.simulate import forecast_of, simulate
from tests.scheduler.fleet import fleet, vit_shape
from tests.scheduler.test_program import SHAPE, costs_of, plans


@settings(max_examples=60, deadline=None)
@given(plans())
def test_spans_add_up_to_the_busy_time_and_never_overlap(plan):
    placement, ops = plan
    costs = costs_of(placement.num_workers, ops.shape[2])
    programs = compile_step(placement, ops, costs)
    forecast, spans = simulate(programs, costs), gantt.spans(programs, costs)
    busy, wait = gantt.busy_us(spans), gantt.wait_us(spans)
    for worker in range(placement.num_workers):
        own = [s for s in spans if s.worker == worker]
        assert busy.get(worker, 0) == forecast.busy_us[worker]
        assert all(a.end_us == b.begin_us for a, b in pairwise(own)) and all(s.duration_us > 0 for s in own)
        assert busy.get(worker, 0) + wait.get(worker, 0) == max((s.end_us for s in own), default=0)
    assert max((s.end_us for s in spans), default=0) == forecast.step_us


@settings(max_examples=40, deadline=None)
@given(plans())
def test_the_compilers_own_rehearsal_is_what_simulate_finds(plan):
    placement, ops = plan
    costs = costs_of(placement.num_workers, ops.shape[2], speeds=[1.0 + w for w in range(placement.num_workers)])
    seen, programs = rehearse(placement, ops, costs), compile_step(placement, ops, costs)
    assert forecast_of(seen, costs) == simulate(programs, costs)
    assert gantt.spans_of(seen, costs) == gantt.spans(programs, costs)


@settings(max_examples=20, deadline=None)
@given(plans())
def test_the_chart_is_json_and_reads_back_equal(plan):
    placement, ops = plan
    costs = costs_of(placement.num_workers, ops.shape[2])
    spans = gantt.spans(compile_step(placement, ops, costs), costs)
    data = json.loads(json.dumps(gantt.to_dict(spans)))
    assert gantt.from_dict(data) == spans
    assert data["step_us"] == max(s.end_us for s in spans)


def test_the_charts_of_large_models_on_many_devices_fit_into_an_event():
    shape = vit_shape(num_blocks=12, num_heads=12, dim=768, num_tokens=197)
    profiles = [dataclasses.replace(p, send_us=9, recv_us=4) for p in fleet([1.0] * 4, shape=shape)]
    costs = Costs(shape, StepShape(5, 16), profiles)
    split = Placement.make([[head // 3 for head in range(12)]] * 12, 4)
    spans = gantt.spans(compile_step(split, uniform_ops(shape, 5, 2), costs), costs)
    assert 3000 < len(spans) <= gantt.MOST_SPANS
    per_span = len(json.dumps(gantt.to_dict(spans), separators=(",", ":"))) / len(spans)
    assert per_span * gantt.MOST_SPANS < 350_000


def test_a_pipeline_shows_its_bubble_as_a_wait():
    whole = Placement.make([[0] * 4, [0] * 4, [1] * 4, [1] * 4], 2)
    costs = costs_of(2)
    spans = gantt.spans(compile_step(whole, uniform_ops(SHAPE, 3, 2), costs), costs)
    first = next(s for s in spans if s.worker == 1 and s.what == "wait")
    assert (first.begin_us, first.block, first.part, first.mb) == (0, 2, "attn", 0)
    assert {s.what for s in spans} >= {"embed", "fwd", "sum", "classify", "bwd", "unembed", "update", "wait"}


def test_messages_that_keep_a_worker_busy_are_spans():
    split = Placement.make([[0, 0, 1, 1]] * 4, 2)
    costs = costs_of(2)
    dear = type(costs)(
        costs.shape, costs.step, [type(p)(**{**vars(p), "send_us": 9, "recv_us": 4}) for p in costs.profiles]
    )
    spans = gantt.spans(compile_step(split, uniform_ops(SHAPE, 3, 2), dear), dear)
    seen = {(s.what, s.duration_us) for s in spans if s.what in ("send", "recv") and s.part}
    assert seen == {("send", 9), ("recv", 4)}


def test_an_instruction_that_takes_no_time_leaves_no_span():
    costs = costs_of(1)
    alone = Placement.make([[0] * 4] * 4, 1)
    programs = compile_step(alone, uniform_ops(SHAPE, 3, 2), costs)
    assert any(i.kind == "free" for i in programs[0].instructions)
    assert not [s for s in gantt.spans(programs, costs) if s.what in ("free", "wait")]
    assert timing.duration_us(costs, 0, programs[0].instructions[-1]) == 0
