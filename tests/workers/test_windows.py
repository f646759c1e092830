"""The window loop: where windows end, what is reported after each, and heads that move in the middle of a job."""

from __future__ import annotations

import threading
from itertools import pairwise

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from scheduler import gantt
from scheduler.domain import Op, uniform_ops
from tests.workers.engine import on_threads
from tests.workers.planners import ScriptedPlanner
from workers import session, timeline
from workers.contract import JobSpec
from workers.events import EventLog, read_events
from workers.ledger import Ledger, WindowSeen
from workers.model import build_model
from workers.session import Place, Session
from workers.spans import spans_from, window_spans

EVEN = [[0, 0, 0, 1, 1, 1]] * 6
SPLIT = [[0, 0, 1, 1, 1, 1]] * 3 + [[0] * 6] + [[1] * 6] * 2
TURNED = [[1, 1, 1, 1, 0, 0]] * 5 + [[0] * 6]


@pytest.fixture(autouse=True)
def one_model_at_a_time(monkeypatch):
    """Threads share torch's generator: models that are built at once would not start alike."""
    lock = threading.Lock()

    def build(*args, **kwargs):
        with lock:
            return build_model(*args, **kwargs)

    monkeypatch.setattr(session, "build_model", build)


@given(
    total=st.integers(1, 400),
    window=st.integers(1, 120),
    cuts=st.lists(st.integers(1, 99), max_size=4, unique=True).map(sorted),
)
def test_windows_cover_all_steps_and_never_cross_a_phase(total, window, cuts):
    shares = np.diff([0, *cuts, 100]) / 100
    spans = window_spans(total, window, shares.tolist())
    assert [span.begin for span in spans] == [0, *(span.end for span in spans[:-1])] and spans[-1].end == total
    assert all(0 < span.end - span.begin <= window and span.first == span.begin for span in spans)
    assert [span.number for span in spans] == list(range(1, len(spans) + 1))

    def phase(step):
        return int(np.searchsorted(np.cumsum(shares), step / total + 1e-9, side="right"))

    for span in spans:
        assert phase(span.begin) == phase(span.end - 1)


def test_a_schedule_of_halves_cuts_in_the_middle():
    def borders(*args):
        return [(span.begin, span.end) for span in window_spans(*args)]

    assert borders(10, 4, [0.5, 0.5]) == [(0, 4), (4, 5), (5, 9), (9, 10)]
    assert borders(10, 100, []) == [(0, 10)]
    assert borders(10, 100, [0.25, 0.75]) == [(0, 3), (3, 10)]


@given(total=st.integers(1, 60), window=st.integers(1, 20), data=st.data())
def test_what_is_left_keeps_its_borders_and_numbers_and_begins_where_it_was_stopped(total, window, data):
    spans = window_spans(total, window, [0.3, 0.7])
    step = data.draw(st.integers(0, total))
    left = spans_from(spans, step)
    assert [(s.number, s.begin, s.end) for s in left] == [(s.number, s.begin, s.end) for s in spans if s.end > step]
    assert [i for s in left for i in range(s.first, s.end)] == list(range(step, total))


def job(tmp_path, owners, size=2, cycle=None, **fields):
    spec = JobSpec.model_validate(
        {"steps": 10, "window": 3, "micro_batch_size": 4, "micro_batches": 2, "images_per_class": 10, **fields}
    )
    planners = {}

    def work(rank, transport):
        planners[rank] = ScriptedPlanner(transport, owners, cycle)
        log = EventLog(tmp_path) if rank == 0 else None
        run = Session(spec, tmp_path, transport, planners[rank], log, Place(sharers=size))
        run._evaluate = lambda when: 0.0
        try:
            return run.run()
        finally:
            if log:
                log.close()

    torch.set_num_threads(1)
    ledger = on_threads(size, work)[0]
    state = safetensors.torch.load_file(tmp_path / "result" / "model.safetensors")
    events = [event for _, event in read_events(tmp_path / "events.jsonl", 0)]
    return ledger, events, state, planners


def some_skipped(window, shape, num):
    ops = uniform_ops(shape, num, Op.FULL)
    ops[window % shape.num_blocks, :, 0] = int(Op.SKIP)
    return (ops,)


def test_a_job_whose_heads_move_ends_like_one_whose_heads_stay(tmp_path):
    grids = [EVEN, EVEN, SPLIT, TURNED, TURNED]
    moved, events, state, _ = job(tmp_path / "moved", lambda window: grids[window], cycle=some_skipped)
    stayed, calm, expected, _ = job(tmp_path / "stayed", lambda _: EVEN, cycle=some_skipped)
    losses, expected_losses = (
        [event["data"]["loss"] for event in log if event["type"] == "metrics"] for log in (events, calm)
    )
    assert len(losses) == 10 and losses == pytest.approx(expected_losses, abs=1e-4)
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=2e-3)
    assert len(moved["migrations"]) == 2 and not stayed["migrations"]
    for ledger in (moved, stayed):
        for row in ledger["rows"][:2]:
            assert row["measured"] == pytest.approx(row["predicted"], abs=1e-9), row["name"]


def test_a_move_is_told_with_before_and_after(tmp_path):
    grids = [EVEN, EVEN, SPLIT, SPLIT, SPLIT]
    ledger, events, _, planners = job(tmp_path, lambda window: grids[window])
    (event,) = [event for event in events if event["type"] == "plan.changed"]
    change = event["data"]["change"]
    assert change["migrated"] and change["moved_heads"] == np.sum(np.array(EVEN) != np.array(SPLIT))
    assert change["before"]["heads"] == [18, 18] and change["after"]["heads"] == [12, 24]
    assert change["before"]["full_heads"] == [18.0, 18.0] and change["after"]["full_heads"] == [12.0, 24.0]
    assert change["reason"] == "so it is written" and change["migration"]["bytes"] > 0
    assert ledger["migrations"] == [change["migration"]]
    assert planners[0].reports == planners[1].reports


def test_every_window_is_reported_and_its_forecast_judged(tmp_path):
    ledger, events, _, planners = job(
        tmp_path, lambda _: EVEN, method={"budgets": {"compute": 0.6}, "strategy": "hull"}
    )
    windows = [event["data"] for event in events if event["type"] == "window"]
    assert [(w["window"], w["steps"]) for w in windows] == [(0, 2), (1, 3), (2, 3), (3, 3), (4, 1)]
    for window in windows:
        assert window["error"] == pytest.approx(window["step_seconds_median"] / window["forecast_seconds"] - 1)
        assert len(window["busy"]) == 2 and min(window["busy"]) > 0
    row = {row["name"]: row for row in ledger["rows"]}["forecast error"]
    assert row["measured"] == pytest.approx(np.median([abs(w["error"]) for w in windows[1:]]))
    assert row["all_full"] == pytest.approx(abs(windows[0]["error"]))
    reports = planners[0].reports
    assert [r["progress"] for r in reports] == [0.0, 0.3, 0.6, 0.9] and [r["steps_left"] for r in reports] == [
        10,
        7,
        4,
        1,
    ]
    assert [r["policy"] for r in reports] == [{"window": w} for w in range(4)]
    assert all(set(r["profiles"]) == {"0", "1"} and r["placement"]["owners"] == EVEN for r in reports)
    assert np.shape(reports[0]["worth"]["backward"]) == (6, 6) and reports[0]["worth_TLHM"] is None


def test_a_job_that_holds_nothing_reports_the_worth_of_coming_micro_batches(tmp_path):
    method = {"ratios": {"full": 1, "skip": 1}, "hold": "none"}
    _, _, _, planners = job(tmp_path, lambda _: EVEN, method=method)
    shapes = [np.shape(report["worth_TLHM"]) for report in planners[1].reports]
    assert shapes == [(3, 6, 6, 2), (3, 6, 6, 2), (3, 6, 6, 2), (1, 6, 6, 2)]
    assert np.asarray(planners[1].reports[0]["worth_TLHM"]).mean((1, 2)) == pytest.approx(1, abs=1e-3)


def test_the_forecast_row_is_the_median_size_of_the_error():
    ledger = Ledger()
    ledger.windows = [WindowSeen(w, 1, seconds, 1.0, []) for w, seconds in enumerate((2.0, 0.9, 1.3, 1.0))]
    (row,) = [row for row in ledger.rows() if row.name == "forecast error"]
    assert row.measured == pytest.approx(0.1) and row.all_full == pytest.approx(1.0) and row.predicted is None


@pytest.mark.parametrize(("period_s", "steps"), [(60.0, [3]), (0.0, [3, 6, 9, 10])])
def test_one_step_of_a_window_is_told_as_all_workers_lived_it(tmp_path, monkeypatch, period_s, steps):
    monkeypatch.setattr(timeline, "PERIOD_S", period_s)
    _, events, _, _ = job(tmp_path, lambda _: SPLIT)
    metrics = {event["data"]["step"]: event["data"] for event in events if event["type"] == "metrics"}
    told = [event["data"] for event in events if event["type"] == "timeline"]
    assert [data["step"] for data in told] == steps
    assert [data["window"] for data in told] == list(range(1, len(steps) + 1))
    for data in told:
        spans, of_rank_0 = gantt.from_dict(data), metrics[data["step"]]
        assert len(data["workers"]) == 2 and all(data["workers"])
        for rank in range(2):
            own = [s for s in spans if s.worker == rank]
            assert all(a.end_us == b.begin_us for a, b in pairwise(own)) and own[-1].what == "update"
        assert max(s.end_us for s in spans) <= data["step_us"]
        assert data["step_us"] >= 1e6 * of_rank_0["step_seconds"] - 1
        waited_s = gantt.wait_us(spans).get(0, 0) / 1e6
        assert waited_s == pytest.approx(of_rank_0["idle_share"] * of_rank_0["step_seconds"], rel=0.1, abs=1e-3)
    kinds = {s.what for data in told for s in gantt.from_dict(data)}
    assert kinds >= {"wait", "embed", "fwd", "bwd", "sum", "classify", "unembed", "send", "step", "update"}
