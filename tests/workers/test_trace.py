"""A traced step is the forecast's step, measured: the same instructions, one after the other, as long as the step."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler import gantt
from scheduler.cost import Costs
from scheduler.domain import Op, Placement, uniform_ops
from tests.workers.engine import costs_for, images_and_labels, run_step, tiny_vit
from tests.workers.test_engine import cases
from workers import executor, trace
from workers.partition import model_shape
from workers.spans import window_spans
from workers.timeline import WARM, is_traced
from workers.trace import Trace

TICK_US = 10  # between two looks at the clock, whatever happens between them


def traced(model, placement, ops, batch=2, **words):
    """One traced step, and its forecast on devices on which every instruction takes time."""
    costs = costs_for(model, placement.num_workers, ops.shape[2], batch)
    profiles = [replace(p, send_us=9, recv_us=4, end_us=7, trunk_us=3) for p in costs.profiles]
    costs = Costs(costs.shape, costs.step, profiles)
    traces = [Trace() for _ in profiles]
    batches = images_and_labels(model, ops.shape[2], batch)
    programs, results = run_step(model, placement, ops, batches, costs=costs, traces=traces, **words)
    spans = [each.spans(worker) for worker, each in enumerate(traces)]
    return programs, [report for report, _ in results], spans, gantt.spans(programs, costs)


def places(spans, *left_out):
    return Counter((s.worker, s.what, s.block, s.part, s.mb) for s in spans if s.what not in left_out)


@settings(max_examples=40, deadline=None)
@given(case=cases(), embed_grad=st.booleans())
def test_the_spans_of_a_step_are_the_instructions_of_its_forecast(case, embed_grad):
    ticks = itertools.count(step=TICK_US)
    clock = SimpleNamespace(perf_counter=lambda: next(ticks) / 1e6, process_time=time.process_time)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "time", clock)
        patch.setattr(trace, "time", clock)
        programs, reports, spans, forecast = traced(*case, embed_grad=embed_grad)
    found = [span for of in spans for span in of]
    run = Counter(
        (p.worker, i.kind, i.block, i.part, i.mb) for p in programs for i in p.instructions if i.kind != "free"
    )
    assert places(found, "wait", "update") == run
    assert places(forecast, "wait", "update") <= run  # a tally is so small that its handling takes no time there
    assert {s.what for s in forecast} <= {s.what for s in found}
    waits = Counter((p.worker, "wait", i.block, i.part, i.mb) for p in programs for i in p.receives())
    assert +Counter({key: n for key, n in places(found).items() if key[1] == "wait"}) == waits
    for worker, own in enumerate(spans):
        assert all(a.end_us == b.begin_us for a, b in pairwise(own)) and all(s.duration_us > 0 for s in own)
        assert [s.what for s in own][-2:] == ["step", "update"] and {s.worker for s in own} == {worker}
        assert own[0].begin_us > 0 and own[-1].end_us <= 1e6 * reports[worker].wall_s
    assert gantt.from_dict(gantt.to_dict(found)) == found


def test_work_adds_up_to_the_busy_time_and_spans_to_the_step():
    model = tiny_vit(embed_dim=96, depth=4, img_size=28)
    placement = Placement.make([[0, 0, 1, 1]] * 4, 2)
    ops = uniform_ops(model_shape(model), 3, Op.FULL)
    _, reports, spans, _ = traced(model, placement, ops, batch=16)
    for report, own in zip(reports, spans, strict=True):
        busy_us = gantt.busy_us(own)[own[0].worker]
        assert busy_us == pytest.approx(1e6 * (report.wall_s - report.wait_s), rel=0.05)
        assert own[-1].end_us == pytest.approx(1e6 * report.wall_s, rel=0.05)


def test_what_comes_to_nothing_leaves_no_span():
    model = tiny_vit()
    ops = uniform_ops(model_shape(model), 2, Op.SKIP)
    _, _, spans, _ = traced(model, Placement.make([[0, 1, 1, 0]] * 3, 2), ops)
    assert {s.what for of in spans for s in of} <= {"wait", "recv", "send", "step", "update"}


@given(
    total=st.integers(1, 60),
    window=st.integers(1, 20),
    cycle=st.integers(1, 9),
    done=st.integers(0, 59),
)
def test_of_every_window_one_step_is_traced_when_it_is_warm(total, window, cycle, done):
    for span in window_spans(total, window, [0.4, 0.6]):
        span = replace(span, first=min(max(span.begin, done), span.end - 1))
        steps = range(span.first, span.end)
        (step,) = (step for step in steps if is_traced(step, span, cycle))
        warm = [step for step in steps if step >= span.first + WARM]
        assert step in warm if warm else step == span.end - 1
        first_tables = [step for step in warm if (step - span.begin) % cycle == 0]
        assert not first_tables or step == first_tables[0]
