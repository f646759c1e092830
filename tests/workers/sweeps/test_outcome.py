"""What trials came to: figures out of ledgers, points, fronts and the knee, as values."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.service.fake_driver import ledger
from workers.sweeps.outcome import figures_of, front_of

amounts = st.floats(0.1, 100)
figures = st.fixed_dictionaries(
    {"accuracy": st.floats(0, 1), "gflop": amounts, "mb": amounts, "seconds": amounts, "steps": st.just(4)}
)


def test_figures_are_what_the_run_took_in_all() -> None:
    assert figures_of(ledger(4, "x")) == {"accuracy": 0.87, "gflop": 5.0, "mb": 140.0, "seconds": 1.5, "steps": 4}
    assert (figures_of({**ledger(4, "x"), "placement": "split"}) or {})["placement"] == "split"


@pytest.mark.parametrize(
    "change",
    [{"rows": []}, {"rows": 3}, {"rows": [7]}, {"accuracy": None}, {"phases": {}}, {"steps": "4"}, {"steps": None}],
)
def test_a_ledger_that_lacks_one_has_no_figures(change: dict[str, Any]) -> None:
    assert figures_of({**ledger(4, "x"), **change}) is None and figures_of({}) is None


@given(trials=st.dictionaries(st.text("abc", min_size=1, max_size=3), figures, max_size=8), names_full=st.booleans())
def test_no_point_of_a_front_is_beaten_and_every_other_is(
    trials: dict[str, dict[str, float]], names_full: bool
) -> None:
    full = next(iter(trials), "none") if names_full else "none"
    found = front_of(trials, full)
    assert set(found.points) == set(trials)
    if not trials:
        assert found.knee is None and found.fronts == {}
        return
    assert found.against == ("full" if names_full else "largest") and found.knee in found.fronts["compute"]
    if names_full:
        assert found.points[full]["compute"] == found.points[full]["seconds"] == 1.0
    else:
        assert max(float(point["bytes"] or 0) for point in found.points.values()) == 1.0
    for cost, name in (("compute", "gflop"), ("bytes", "mb"), ("seconds", "seconds")):
        for key, point in trials.items():
            better = [
                other
                for other in trials.values()
                if other["accuracy"] >= point["accuracy"]
                and other[name] <= point[name]
                and (other["accuracy"], other[name]) != (point["accuracy"], point[name])
            ]
            assert (key in found.fronts[cost]) == (not better)


def test_without_traffic_there_is_no_share_of_it() -> None:
    one = {"accuracy": 0.5, "gflop": 2.0, "mb": 0.0, "seconds": 1.0, "steps": 4}
    found = front_of({"full": one, "a": {**one, "gflop": 1.0}}, "full")
    assert found.points["a"] == {"accuracy": 0.5, "compute": 0.5, "bytes": None, "seconds": 1.0}
    assert found.fronts == {"compute": ["a"], "bytes": ["full", "a"], "seconds": ["full", "a"]} and found.knee == "a"
