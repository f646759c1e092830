"""Budgets are kept by the exact judges, used up, certified, and refused with the nearest that can be met."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.cost import Costs
from scheduler.domain import Op, OpTable, Placement, step_flops, uniform_ops
from scheduler.errors import InfeasibleError
from scheduler.selection import GRAINS, HOLDS, Selection, SelectionRequest, groups_of, heads_of, select, worth_fraction
from scheduler.selection.bound import MeansProgram
from scheduler.selection.draws import evenly
from scheduler.selection.meter import Meter
from scheduler.transfers import step_bytes
from tests.scheduler.test_selection import CHOOSING, costs_of, random_scores, split, whole


def spent(
    costs: Costs, placement: Placement, cycle: tuple[OpTable, ...], embed_grad: bool = True
) -> tuple[float, float]:
    """(compute, bytes) of the mean step as fractions of all-FULL."""
    shape, step = costs.shape, costs.step
    full = uniform_ops(shape, step.num_micro_batches, Op.FULL)
    flops = np.mean([step_flops(shape, step, ops) for ops in cycle]) / step_flops(shape, step, full)
    sent = np.mean([step_bytes(placement, ops, shape, step, embed_grad).sum() for ops in cycle])
    return float(flops), float(sent / max(1, step_bytes(placement, full, shape, step, embed_grad).sum()))


def chosen(compute: float, max_bytes: float, placement: Placement, costs: Costs, **words: object) -> Selection:
    request = SelectionRequest(compute=compute, max_bytes=max_bytes, seed=2, **words)  # type: ignore[arg-type]
    return select(request, placement, costs, random_scores(*placement.owner_LH.shape))


@settings(max_examples=20, deadline=None)
@given(
    compute=st.floats(0.2, 1.0),
    max_bytes=st.floats(0.3, 1.0),
    words=st.tuples(st.sampled_from(CHOOSING), st.sampled_from(HOLDS), st.sampled_from(GRAINS)),
    workers=st.integers(1, 3),
    kind=st.sampled_from([split, whole]),
    seed=st.integers(0, 99),
)
def test_budgets_are_kept_or_refused(
    compute: float, max_bytes: float, words: tuple[str, str, str], workers: int, kind: object, seed: int
) -> None:
    costs, scores = costs_of(3, 4, workers), random_scores(3, 4, seed)
    placement = kind(3, 4, workers)  # type: ignore[operator]
    strategy, hold, grain = words
    request = SelectionRequest(
        compute=compute, max_bytes=max_bytes, strategy=strategy, hold=hold, grain=grain, seed=seed
    )
    try:
        found = select(request, placement, costs, scores)
    except InfeasibleError as error:
        assert (error.code, error.param) == ("budgets_infeasible", "method.budgets")
        return
    flops, sent = spent(costs, placement, found.cycle)
    assert flops <= compute + 1e-9
    assert sent <= max_bytes + 1e-9
    assert all((ops == Op.FULL).any(axis=(0, 1)).all() for ops in found.cycle)
    assert found.report.objective == pytest.approx(worth_fraction(found.cycle, scores))
    assert found.report.objective <= found.report.bound + 1e-6


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from([split, whole]),
    workers=st.integers(1, 4),
    coherent=st.booleans(),
    embed_grad=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_the_bound_allows_whatever_random_tables_spend(
    kind: object, workers: int, coherent: bool, embed_grad: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    placement, costs, scores = kind(4, 4, workers), costs_of(4, 4, workers, 3), random_scores(4, 4)  # type: ignore[operator]
    units = groups_of(placement) if coherent else heads_of(placement)
    ops_LHM = rng.integers(0, 3, (4, 4, 3)).astype(np.int8)
    if coherent:  # a group sits out as one, its heads may be FULL or FORWARD
        for unit in units:
            rests_M = rng.random(3) < 0.3
            heads = list(unit.heads)
            ops_LHM[unit.block, heads] = np.where(rests_M, 0, np.maximum(1, ops_LHM[unit.block, heads]))
    meter = Meter(placement, costs, embed_grad)
    head_flops = float(meter.flops(ops_LHM) - meter.trunk_flops)
    caps_W = np.full(workers, head_flops)
    means = MeansProgram(meter, scores, units, head_flops, caps_W).solve(meter.bytes(ops_LHM))
    assert means is not None
    assert means.worth >= worth_fraction((ops_LHM,), scores) - 1e-6


@pytest.mark.parametrize("strategy", ["hull", "cpsat", "random", "uniform"])
@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("compute", [0.3, 0.45, 0.6, 0.8])
def test_the_compute_budget_is_used_up_when_bytes_are_free(strategy: str, hold: str, compute: float) -> None:
    costs, placement = costs_of(6, 6, 2), split(6, 6, 2)
    flops, _ = spent(costs, placement, chosen(compute, 1.0, placement, costs, strategy=strategy, hold=hold).cycle)
    assert 0.92 * compute <= flops <= compute


def test_half_the_bytes_at_three_fifths_of_the_compute_on_two_workers() -> None:
    costs, placement = costs_of(6, 6, 2), split(6, 6, 2)
    found = chosen(0.6, 0.5, placement, costs)
    flops, sent = spent(costs, placement, found.cycle)
    assert 0.55 <= flops <= 0.6
    assert 0.45 <= sent <= 0.5
    assert found.report.gap < 0.07


@pytest.mark.parametrize(("blocks", "heads", "workers"), [(12, 6, 4), (12, 12, 8)])
def test_many_workers_and_tight_bytes_come_near_the_bound(blocks: int, heads: int, workers: int) -> None:
    placement, costs = split(blocks, heads, workers), costs_of(blocks, heads, workers)
    report = chosen(0.6, 0.5, placement, costs).report
    assert report.gap < 0.05


def test_skips_stay_coherent_and_full_heads_held() -> None:
    costs, placement = costs_of(6, 6, 2), split(6, 6, 2)
    cycle = np.stack(chosen(0.5, 0.4, placement, costs).cycle)
    for unit in groups_of(placement):
        rests = cycle[:, unit.block, list(unit.heads)] == Op.SKIP
        assert (rests == rests[:, :1]).all()
    mixed = [(b, h) for b in range(6) for h in range(6) if {1, 2} <= set(np.unique(cycle[:, b, h]).tolist())]
    assert len(mixed) <= 1


@pytest.mark.parametrize("kind", [split, whole])
def test_without_a_byte_limit_held_heads_are_near_the_bound(kind: object) -> None:
    costs, placement = costs_of(12, 6, 2), kind(12, 6, 2)  # type: ignore[operator]
    assert chosen(0.6, 1.0, placement, costs).report.gap < 0.01


def test_every_prefix_of_a_cycle_is_close_to_the_budget() -> None:
    costs, placement = costs_of(6, 6, 2), split(6, 6, 2)
    for hold in HOLDS:
        cycle = chosen(0.3, 1.0, placement, costs, hold=hold).cycle
        for end in range(1, len(cycle) + 1):
            assert spent(costs, placement, cycle[:end])[0] <= 0.3 + 0.06 / end


def test_tables_are_ordered_so_that_prefixes_level_out() -> None:
    cost_T = np.array([9.0, 9.0, 9.0, 1.0, 1.0, 1.0])
    tables = [np.full((1, 1, 1), int(c), dtype=np.int8) for c in cost_T]
    ordered = np.array([float(t[0, 0, 0]) for t in evenly(tables, cost_T)])
    assert ordered[0] == 1
    assert np.abs(np.cumsum(ordered - 5)).max() <= 4


def test_a_slow_worker_gets_less_of_the_compute() -> None:
    placement = split(6, 6, 2)
    for hold in HOLDS:
        cycle = np.stack(chosen(0.5, 1.0, placement, costs_of(6, 6, 2, 5, (1.0, 0.5)), hold=hold).cycle)
        work_W = [np.array([0, 1, 3])[cycle[:, placement.owner_LH == w]].sum() for w in range(2)]
        assert work_W[1] == pytest.approx(work_W[0] / 2, rel=0.15)


def test_whole_blocks_cannot_save_bytes_while_the_embedding_is_trained() -> None:
    costs = costs_of(6, 6, 2)
    with pytest.raises(
        InfeasibleError, match=r"least bytes fraction found at compute 0\.60 on this placement is 1\.00"
    ):
        chosen(0.6, 0.5, whole(6, 6, 2), costs)


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize(("compute", "max_bytes", "field"), [(0.02, 1.0, "compute"), (0.6, 0.01, "bytes")])
def test_impossible_budgets_name_the_nearest_that_can_be_met(
    hold: str, compute: float, max_bytes: float, field: str
) -> None:
    costs, placement = costs_of(6, 6, 2), split(6, 6, 2)
    with pytest.raises(InfeasibleError) as caught:
        chosen(compute, max_bytes, placement, costs, hold=hold)
    nearest = float(re.search(rf"Set {field} to ([\d.]+)", caught.value.remedy or "")[1])  # type: ignore[index]
    relaxed = (nearest, max_bytes) if field == "compute" else (compute, nearest)
    flops, sent = spent(costs, placement, chosen(*relaxed, placement, costs, hold=hold).cycle)
    assert flops <= relaxed[0]
    assert sent <= relaxed[1]


@pytest.mark.parametrize("hold", HOLDS)
def test_the_same_request_gives_the_same_cycle(hold: str) -> None:
    costs, placement = costs_of(6, 6, 2), split(6, 6, 2)
    first, again = (np.stack(chosen(0.6, 0.6, placement, costs, hold=hold).cycle) for _ in range(2))
    assert (first == again).all()
