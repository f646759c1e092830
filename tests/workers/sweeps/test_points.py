"""Children as points: fractions, fronts, the table, and what of a search that is over counts."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.sweeps.children import CANCELLED, FAILED, STOPPED, SUCCEEDED, Child
from workers.sweeps.drawing import draw
from workers.sweeps.points import points_of, settled, share_of_knee


def done(key: str, accuracy: float | None, gflop: float, mb: float = 2.0, seconds: float = 3.0, **more: str) -> Child:
    figures = {"accuracy": accuracy, "gflop": gflop, "mb": mb, "seconds": seconds, "steps": 5.0}
    return Child(key, {"seed": 1}, job_id=key, status=SUCCEEDED, figures=figures, **more)


SWEEP = [
    done("full", 0.90, 100, baseline="full"), done("a", 0.50, 20), done("b", 0.88, 40), done("c", 0.86, 60, mb=1.0),
    done("stopped", 0.70, 40, baseline="stopped"), Child("d", {"seed": 2}, status=FAILED, error={"message": "gone"}),
]  # fmt: skip


def test_costs_are_fractions_of_full_fine_tuning() -> None:
    points = points_of(SWEEP)
    assert points.of == "full" and [point.compute for point in points.points] == [1.0, 0.2, 0.4, 0.6, 0.4, None]
    assert points.fronts == {"compute": ["full", "a", "b"], "bytes": ["full", "c"], "seconds": ["full"]}
    assert points.knee == "b" and share_of_knee(points) == pytest.approx(0.4)


def test_the_table_says_how_points_are_placed_and_if_not_alike() -> None:
    def placed(key: str, kind: str | None) -> Child:
        child = done(key, 0.9, 10)
        return replace(child, figures={**(child.figures or {}), "placement": kind})

    alike = points_of([placed("a", "whole"), placed("b", "whole"), placed("c", None), Child("d", status=FAILED)])
    assert (
        [point.placement for point in alike.points]
        == ["whole", "whole", None, None]
        == [point["placement"] for point in alike.to_dict()["points"]]
    )
    assert "whole" in alike.table()[1] and not any("alike" in line for line in alike.table())
    assert "not all are placed alike" in points_of([placed("a", "whole"), placed("b", "split")]).table()[-2]


def test_without_baselines_they_are_fractions_of_the_largest() -> None:
    points = points_of(SWEEP[1:4])
    assert points.of == "largest" and [point.compute for point in points.points] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert "the largest of the sweep" in points.table()[-1]


def test_a_job_of_one_worker_sends_nothing_and_is_on_no_front_of_bytes() -> None:
    points = points_of([done("full", 0.9, 100, mb=0.0, baseline="full"), done("a", 0.8, 50, mb=0.0)])
    assert points.fronts["bytes"] == [] and points.fronts["compute"] == ["full", "a"]


def test_no_points_have_no_knee() -> None:
    points = points_of([Child("a", status=FAILED)])
    assert points.knee is None and share_of_knee(points) == 1.0 and len(points.table()) == 3


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.01, 10)), min_size=1, max_size=8))
def test_the_shorter_baseline_never_asks_for_more_than_full(trials: list[tuple[float, float]]) -> None:
    children = [done("full", 0.5, 5.0, baseline="full"), *(done(f"t{i}", a, c) for i, (a, c) in enumerate(trials))]
    assert 0 < share_of_knee(points_of(children)) <= 1


def test_the_table_names_the_knee_the_front_and_what_failed() -> None:
    lines = points_of(SWEEP).table()
    rows = {line.split()[0]: line for line in lines[1:-1]}
    assert rows["b"].endswith("* the knee") and rows["a"].endswith("*") and rows["d"].endswith("failed: gone")
    assert "full fine-tuning" in rows["full"] and not rows["c"].endswith("*")
    assert rows["b"].index("0.880") == rows["full"].index("0.900")


def test_what_tune_saw_no_end_of_was_stopped_unless_it_ended_all_the_same() -> None:
    running = Child("a", {"seed": 1}, job_id="j", status="running", step=3, accuracy=0.4)
    assert settled([running], [replace(running, status=CANCELLED)]) == [
        Child("a", {"seed": 1}, job_id="j", status=STOPPED, step=3)
    ]
    assert settled([running], [done("a", 0.9, 1)]) == [done("a", 0.9, 1)]
    failed = Child("b", status=FAILED, error={"code": "metric_missing"})
    assert settled([failed], [done("b", None, 1), done("full", 1, 1, baseline="full")]) == [failed]
    assert settled([], [done("lost", 0.9, 1)]) == [done("lost", 0.9, 1)]


def test_the_fronts_are_drawn_without_a_display(tmp_path: Path) -> None:
    svg, png = draw(points_of(SWEEP), tmp_path)
    assert svg.read_text().startswith("<?xml") and png.read_bytes().startswith(b"\x89PNG")
    text = svg.read_text()
    assert "full fine-tuning, stopped" in text and "#009e73" in text and "seed = 1" in text


def test_a_sweep_without_points_is_drawn_empty(tmp_path: Path) -> None:
    assert len(draw(points_of([Child("a", status=FAILED)]), tmp_path)) == 2


def test_without_matplotlib_drawing_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError):
        draw(points_of(SWEEP), tmp_path)
