"""Plans on the terminal."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.cli import draw
from tests.service.fake_driver import chart, plan


def test_a_cell_shows_what_took_most_of_its_time() -> None:
    rows = [[0, 40, "fwd", 0, "attn", 0], [40, 60, "wait", 0, "attn", 0], [60, 80, "bwd", 0, "mlp", 0]]
    assert draw.gantt_cells(rows, 100, 5) == "ff·b "
    assert draw.gantt_cells([[0, 9, "sum", 0, "", 0], [9, 100, "embed", 0, "", 0]], 100, 2) == "tt"


@given(st.lists(st.integers(0, 500), min_size=1, max_size=30), st.integers(1, 90))
def test_a_chart_is_as_wide_as_asked_and_blank_only_where_nothing_happens(lengths: list[int], width: int) -> None:
    rows, now = [], 0
    for length in lengths:
        rows.append([now, now + length, "fwd", 0, "attn", 0])
        now += length
    cells = draw.gantt_cells([row for row in rows if row[1] > row[0]], max(1, now), width)
    assert len(cells) == width and (now == 0 or set(cells) == {"f"})


def test_a_wide_block_is_told_in_counts_and_then_in_shares() -> None:
    owners = [head % 2 for head in range(16)]
    words = ["FFFOS" if head < 8 else "OOOOS" for head in range(16)]
    assert draw._block_line(owners[:2], words[:2], 100) == [" w0", "h0", "FFFOS", " w1", "h1", "FFFOS"]
    counts = draw._block_line(owners, words, 50)
    assert counts == [" w0", "4×", "FFFOS", "4×", "OOOOS", " w1", "4×", "FFFOS", "4×", "OOOOS"]
    assert draw._block_line(owners, words, 20)[:5] == [" w0", "8h", "FULL 30%", "FORWARD 50%", "SKIP 20%"]


def test_heads_that_are_neighbours_and_do_the_same_are_a_run() -> None:
    assert draw._runs([0, 1, 2, 4, 5], ["FF", "FF", "OO", "SS", "OO", "OO"]) == ["h0-1", "FF", "h2", "OO", "h4-5", "OO"]


def test_the_plan_of_a_job_is_drawn_with_what_it_says_of_itself(capsys: pytest.CaptureFixture[str]) -> None:
    draw.put_plan(plan())
    text = capsys.readouterr().out
    assert "52.0 ms forecast" in text and "b00-b01" not in text and "FFS" in text
    assert "box-1" in text and "one step, 52.0 ms" in text
    draw.put_plan({**plan(), "gantt": None, "devices": []})
    assert "one step" not in capsys.readouterr().out


def test_a_step_as_forecast_stands_above_one_as_measured_over_the_same_time(capsys: pytest.CaptureFixture[str]) -> None:
    slower = {**chart(), "step_us": 104_000, "step": 3}
    draw.put_timeline(chart(), slower)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "forecast, 52.0 ms" and lines[4] == "measured in step 3, 104.0 ms"
    assert lines[1:3] == lines[5:7] and lines[3] == lines[7] and lines[3].endswith("104 ms")
    draw.put_timeline(None, slower)
    assert "forecast" not in capsys.readouterr().out
    draw.put_timeline(None, None)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("found", [{"plan": {}}, {"plan": {"placement": {"owners": []}, "cycle": []}}])
def test_a_plan_that_lacks_parts_is_drawn_as_far_as_it_goes(
    found: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    draw.put_plan(found)
    assert "plan" in capsys.readouterr().out


def test_the_telling_heads_differ_in_what_they_do() -> None:
    heads = [[{"ops": "FFF", "worth": 1}, {"ops": "FFF", "worth": 2}, {"ops": "OOO", "worth": 3}]]
    assert draw.telling_heads(heads) == [(0, 1), (0, 2)]
