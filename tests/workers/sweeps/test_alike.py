"""All points of a sweep are placed alike, unless somebody asks for something else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.domain import Placement
from scheduler.placement import propose
from tests.scheduler.test_placement import costs_of
from workers.ledger import kind_of
from workers.sweeps.alike import placed, placement_of, told
from workers.sweeps.children import FAILED, SUCCEEDED, Child
from workers.sweeps.contract import SweepSpec

RATIOS = {"space": {"method.ratios": {"values": [[3, 0, 2], [2, 0, 3]]}}}
KINDS = st.sampled_from([None, "single", "whole", "split", "mixed", "split, whole", "whole, mixed"])


def spec_of(**change: Any) -> SweepSpec:
    return SweepSpec.model_validate({**RATIOS, **change})


def ended(key: str, kind: str | None) -> Child:
    figures = {"accuracy": 0.9, "gflop": 1.0, "mb": 1.0, "seconds": 1.0, "steps": 5, "placement": kind}
    return Child(key, status=SUCCEEDED, figures=figures)


def test_trials_follow_full_fine_tuning() -> None:
    spec = spec_of()
    assert placement_of(spec, []) == placement_of(spec, [Child("full")]) == "unmixed"
    assert placement_of(spec, [ended("full", "whole"), ended("t-000", "split")]) == "whole"
    assert placed(spec.full(), "whole").placement == "whole" and placed(spec.full(), None).placement == "auto"


@given(st.lists(KINDS, max_size=5), st.lists(KINDS, max_size=5))
def test_what_has_been_settled_stays(before: list[str | None], after: list[str | None]) -> None:
    """However later points come out, and whoever asks: a driver that goes on as well as the first."""
    children = [ended(f"t-{number}", kind) for number, kind in enumerate([*before, *after])]
    early, late = placement_of(spec_of(), children[: len(before)]), placement_of(spec_of(), children)
    assert early in ("unmixed", "split", "whole") and (early == "unmixed" or early == late)


@pytest.mark.parametrize(
    "change",
    [
        {"job": {"placement": "whole"}},
        {"space": {"placement": {"values": ["auto", "split"]}}},
        {"space": {"placement": {"values": ["auto"]}, **RATIOS["space"]}},
    ],
)
def test_who_says_where_blocks_lie_is_heard(change: dict[str, Any]) -> None:
    spec = spec_of(**change)
    assert placement_of(spec, [ended("full", "split")]) is None
    setting = next(iter(spec.settings()))
    assert placed(spec.trial(setting), None) == spec.trial(setting)


def test_where_heads_are_to_save_bytes_blocks_are_split_from_the_start() -> None:
    def budget(strategy: str) -> SweepSpec:
        path = {"method.budgets.bytes": {"values": [0.5, 1.0]}}
        return spec_of(space=path, job={"method": {"strategy": strategy, "budgets": {"compute": 0.6}}})

    assert placement_of(budget("hull"), []) == "split"
    assert placement_of(budget("hardest"), []) == "unmixed"  # sits micro-batches out, which saves bytes anywhere


def test_a_refusal_says_that_the_sweep_has_chosen() -> None:
    error = {"code": "memory_infeasible", "message": "worker 1 needs 2 GB more.", "param": "workers"}
    refused = Child("t-000", status=FAILED, error=error)
    said = told(refused, "whole").error or {}
    assert said["message"].startswith("worker 1 needs 2 GB more. All points of this sweep are placed whole; set job.")
    assert said["code"] == "memory_infeasible" and said["param"] == "workers"
    other = replace(refused, error={"code": "worker_failed", "message": "gone"})
    assert told(refused, None) == told(refused, "unmixed") == refused and told(other, "whole") == other


@pytest.mark.parametrize("speeds", [(1.0, 1.0), (2.0, 1.0, 1.0)])
@pytest.mark.parametrize("mode", ["unmixed", "split", "whole"])
def test_the_planners_words_and_the_ledgers_are_the_same(mode: str, speeds: tuple[float, ...]) -> None:
    kinds = {kind_of(each.placement) for each in propose(costs_of(6, 6, speeds, dim=384), mode)}
    assert kinds <= ({"split", "whole"} if mode == "unmixed" else {mode}) and kinds


@given(st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=3), min_size=1, max_size=4), st.integers(0, 2))
def test_a_kind_does_not_hang_on_the_order_of_blocks_and_heads(owners: list[list[int]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    shuffled = rng.permuted(rng.permutation(np.array(owners)), axis=1)
    assert kind_of(Placement.make(owners, 3)) == kind_of(Placement.make(shuffled, 3))
    assert kind_of(Placement.make(np.zeros((2, 3)), 1)) == "single"
