"""The short version of `python -m tests.chaos.api`: one failpoint of each kind, one round."""

from __future__ import annotations

from pathlib import Path

import pytest

from scheduler.failpoints import NAMES
from tests.chaos.api import PAIRS, PLACES, READY_S, measure
from tests.chaos.checker import RULES


def test_every_place_of_the_service_is_tried() -> None:
    workers = {name for name in NAMES if name.partition(".")[0] in ("checkpoint", "step", "result", "scheduler")}
    assert {*PLACES} >= {name for name in NAMES if name.startswith(("store.", "supervisor."))}
    assert len(PAIRS) == 5 * len(PLACES) and not workers & {*PLACES}


@pytest.mark.parametrize(
    ("name", "action"),
    [
        ("store.commit", "kill9"),
        ("supervisor.claimed", "kill9"),
        ("supervisor.submit", "error_after_ok"),
        ("supervisor.absorb", "enospc"),
    ],
)
def test_nothing_is_lost_or_doubled_when_the_api_fails_there(tmp_path: Path, name: str, action: str) -> None:
    row = measure(tmp_path / "home", None, name, action, rounds=1)
    assert {rule: row[rule] for rule in RULES} == dict.fromkeys(RULES, 0)
    assert row["accepted"] > 0 and row["missed"] == 0 and row["left"] == 0
    assert row["ready max s"] <= 2 * READY_S
