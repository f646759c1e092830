"""Budgets are kept by the exact judges, used up, certified, and refused with the nearest that can be met."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.budgets import select_budgets
from scheduler.cost import Costs
from scheduler.domain import Op, OpTable, Placement, StepShape, step_flops, uniform_ops
from scheduler.draws import groups_of
from scheduler.errors import InfeasibleError
from scheduler.selection import STRATEGIES, Selection, SelectionRequest, worth_fraction
from scheduler.transfers import step_bytes
from tests.scheduler.fleet import fleet, vit_shape
from tests.scheduler.test_selection import random_scores, split, whole


def costs_of(blocks: int, heads: int, workers: int, micro_batches: int = 5) -> Costs:
    shape = vit_shape(blocks, heads, 16 * heads)
    return Costs(shape, StepShape(micro_batches, 16), fleet((1.0,) * workers, shape=shape))


def spent(
    costs: Costs, placement: Placement, cycle: tuple[OpTable, ...], embed_grad: bool = True
) -> tuple[float, float]:
    """(compute, bytes) of the mean step as fractions of all-FULL."""
    shape, step = costs.shape, costs.step
    full = uniform_ops(shape, step.num_micro_batches, Op.FULL)
    flops = np.mean([step_flops(shape, step, ops) for ops in cycle]) / step_flops(shape, step, full)
    sent = np.mean([step_bytes(placement, ops, shape, step, embed_grad).sum() for ops in cycle])
    return float(flops), float(sent / max(1, step_bytes(placement, full, shape, step, embed_grad).sum()))


def chosen(compute: float, max_bytes: float, placement: Placement, costs: Costs, strategy: str = "held") -> Selection:
    request = SelectionRequest(compute=compute, max_bytes=max_bytes, strategy=strategy, seed=2)
    return select_budgets(request, placement, costs, random_scores(*placement.owner_LH.shape))


@settings(max_examples=25, deadline=None)
@given(
    compute=st.floats(0.2, 1.0),
    max_bytes=st.floats(0.2, 1.0),
    strategy=st.sampled_from(STRATEGIES),
    workers=st.integers(1, 3),
    kind=st.sampled_from([split, whole]),
    seed=st.integers(0, 99),
)
def test_budgets_are_kept_or_refused(
    compute: float, max_bytes: float, strategy: str, workers: int, kind: object, seed: int
) -> None:
    costs, scores = costs_of(4, 6, workers), random_scores(4, 6, seed)
    placement = kind(4, 6, workers)  # type: ignore[operator]
    request = SelectionRequest(compute=compute, max_bytes=max_bytes, strategy=strategy, seed=seed)
    try:
        found = select_budgets(request, placement, costs, scores)
    except InfeasibleError as error:
        assert (error.code, error.param) == ("budgets_infeasible", "method.budgets")
        return
    flops, sent = spent(costs, placement, found.cycle)
    assert flops <= compute + 1e-9
    assert sent <= max_bytes + 1e-9
    assert all((ops == Op.FULL).any(axis=(0, 1)).all() for ops in found.cycle)
    assert found.report.objective == pytest.approx(worth_fraction(found.cycle, scores))
    assert found.report.objective <= found.report.bound + 1e-6


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("compute", [0.3, 0.45, 0.6, 0.8])
def test_the_compute_budget_is_used_up_when_bytes_are_free(strategy: str, compute: float) -> None:
    costs, placement = costs_of(6, 6, 2), split(6, 6, 2)
    flops, _ = spent(costs, placement, chosen(compute, 1.0, placement, costs, strategy).cycle)
    assert 0.95 * compute <= flops <= compute


@pytest.mark.parametrize("style", ["even", "lead"])
def test_half_the_bytes_at_three_fifths_of_the_compute_on_two_workers(style: str) -> None:
    costs, scores = costs_of(6, 6, 2), random_scores(6, 6)
    placement = split(6, 6, 2, scores, style)
    found = select_budgets(SelectionRequest(compute=0.6, max_bytes=0.5), placement, costs, scores)
    flops, sent = spent(costs, placement, found.cycle)
    assert 0.57 <= flops <= 0.6
    assert sent <= 0.5
    skipped = np.mean([(ops == Op.SKIP).mean() for ops in found.cycle])
    assert skipped <= 0.1  # FULL and FORWARD are held; SKIP only as far as the bytes ask for it
    assert found.report.gap < (0.07 if style == "lead" else 0.15)


def test_skips_stay_coherent_and_full_heads_held() -> None:
    costs, placement = costs_of(6, 6, 2), split(6, 6, 2)
    cycle = np.stack(chosen(0.5, 0.3, placement, costs).cycle)
    for unit in groups_of(placement):
        rests = cycle[:, unit.block, list(unit.heads)] == Op.SKIP
        assert (rests == rests[:, :1]).all()
    mixed = [(b, h) for b in range(6) for h in range(6) if {1, 2} <= set(np.unique(cycle[:, b, h]).tolist())]
    assert len(mixed) <= 1


def test_without_a_byte_limit_held_is_near_the_bound() -> None:
    costs, placement = costs_of(12, 6, 2), split(12, 6, 2)
    report = chosen(0.6, 1.0, placement, costs).report
    assert report.gap < 0.02


def test_whole_blocks_keep_a_compute_budget() -> None:
    costs, placement = costs_of(6, 6, 2), whole(6, 6, 2)
    flops, _ = spent(costs, placement, chosen(0.6, 1.0, placement, costs).cycle)
    assert 0.57 <= flops <= 0.6


def test_whole_blocks_cannot_save_bytes_while_the_embedding_is_trained() -> None:
    costs, scores = costs_of(6, 6, 2), random_scores(6, 6)
    request = SelectionRequest(compute=0.6, max_bytes=0.5)
    with pytest.raises(
        InfeasibleError, match=r"least bytes fraction found at compute 0\.60 on this placement is 1\.00"
    ):
        select_budgets(request, whole(6, 6, 2), costs, scores)


@pytest.mark.parametrize(("compute", "max_bytes", "field"), [(0.02, 1.0, "compute"), (0.6, 0.01, "bytes")])
def test_impossible_budgets_name_the_nearest_that_can_be_met(compute: float, max_bytes: float, field: str) -> None:
    costs, placement = costs_of(6, 6, 2), split(6, 6, 2)
    with pytest.raises(InfeasibleError) as caught:
        chosen(compute, max_bytes, placement, costs)
    nearest = float(re.search(rf"Set {field} to ([\d.]+)", caught.value.remedy or "")[1])  # type: ignore[index]
    relaxed = (nearest, max_bytes) if field == "compute" else (compute, nearest)
    flops, sent = spent(costs, placement, chosen(*relaxed, placement, costs).cycle)
    assert flops <= relaxed[0]
    assert sent <= relaxed[1]


def test_the_same_request_gives_the_same_cycle() -> None:
    costs, placement = costs_of(6, 6, 2), split(6, 6, 2)
    first, again = (np.stack(chosen(0.6, 0.5, placement, costs).cycle) for _ in range(2))
    assert (first == again).all()
