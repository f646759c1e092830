"""Selections: exact ratios, coherent groups, no starved micro-batch, the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from scheduler.domain import Op, OpTable, Placement, Scores, StepShape, step_flops, uniform_ops
from scheduler.draws import PERIOD, groups_of
from scheduler.errors import InfeasibleError, UserError
from scheduler.placement import assign_heads
from scheduler.scores import normalise
from scheduler.selection import STRATEGIES, SelectionRequest, all_full, select_ratios, worth_fraction
from scheduler.transfers import step_bytes
from tests.scheduler.fleet import vit_shape


def random_scores(blocks: int, heads: int, seed: int = 0) -> Scores:
    worth = np.random.default_rng(seed).exponential(size=(2, blocks, heads))
    return Scores(normalise(worth[0]), normalise(worth[1]))


def split(blocks: int, heads: int, workers: int, scores: Scores | None = None, style: str = "even") -> Placement:
    """Every block shared out evenly."""
    row = [heads * (w + 1) // workers - heads * w // workers for w in range(workers)]
    owners = assign_heads(np.tile(row, (blocks, 1)), workers - 1, scores, style)
    return Placement(owners, workers, workers - 1)


def whole(blocks: int, heads: int, workers: int) -> Placement:
    """Each worker one run of whole blocks."""
    owners = np.repeat([[block * workers // blocks] for block in range(blocks)], heads, axis=1)
    return Placement(owners, workers, workers - 1)


def counts(ops: OpTable) -> tuple[int, int, int]:
    return tuple(int((ops == op).sum()) for op in (Op.FULL, Op.FORWARD, Op.SKIP))  # type: ignore[return-value]


placements = st.builds(
    lambda kind, blocks, heads, workers: kind(blocks, heads, min(workers, heads)),
    st.sampled_from([split, whole]),
    st.integers(2, 5),
    st.integers(2, 6),
    st.integers(1, 3),
)
ratios = st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(0, 3))


@settings(max_examples=80, deadline=None)
@given(placement=placements, ratio=ratios, strategy=st.sampled_from(STRATEGIES), seed=st.integers(0, 99))
def test_ratios_are_exact_in_every_table_and_nothing_starves(
    placement: Placement, ratio: tuple[int, int, int], strategy: str, seed: int
) -> None:
    blocks, heads = placement.owner_LH.shape
    request = SelectionRequest(ratios=ratio, strategy=strategy, seed=seed)
    try:
        chosen = select_ratios(request, placement, random_scores(blocks, heads, seed), sum(ratio))
    except InfeasibleError:
        assume(False)
    for ops in chosen.cycle:
        assert ops.shape == (blocks, heads, sum(ratio))
        assert ops.dtype == np.int8
        assert counts(ops) == tuple(blocks * heads * n for n in ratio)
        assert (ops == Op.FULL).any(axis=(0, 1)).all()


@settings(max_examples=40, deadline=None)
@given(placement=placements, ratio=ratios, seed=st.integers(0, 99))
def test_held_keeps_heads_full_or_forward_and_skips_per_group(
    placement: Placement, ratio: tuple[int, int, int], seed: int
) -> None:
    blocks, heads = placement.owner_LH.shape
    try:
        request = SelectionRequest(ratios=ratio, seed=seed)
        cycle = np.stack(select_ratios(request, placement, random_scores(blocks, heads), sum(ratio)).cycle)
    except InfeasibleError:
        assume(False)
    assert len(cycle) == (PERIOD if ratio[2] else 1)
    swings = sum({int(op) for op in np.unique(cycle[:, b, h])} >= {1, 2} for b in range(blocks) for h in range(heads))
    assert swings <= 1
    for unit in groups_of(placement):
        rests = cycle[:, unit.block, list(unit.heads)] == Op.SKIP
        assert (rests == rests[:, :1]).all()
        assert (rests[:, 0].sum(axis=1) == ratio[2]).all()


@settings(max_examples=40, deadline=None)
@given(placement=placements, ratio=ratios, seed=st.integers(0, 99))
def test_coherent_groups_do_one_thing_and_scattered_heads_keep_their_ratio(
    placement: Placement, ratio: tuple[int, int, int], seed: int
) -> None:
    blocks, heads = placement.owner_LH.shape
    for strategy in ("coherent", "scattered"):
        request = SelectionRequest(ratios=ratio, strategy=strategy, seed=seed)
        try:
            cycle = np.stack(select_ratios(request, placement, random_scores(blocks, heads), sum(ratio)).cycle)
        except InfeasibleError:
            assume(False)
        for op, wanted in zip((Op.FULL, Op.FORWARD, Op.SKIP), ratio, strict=True):
            assert ((cycle == op).sum(axis=3) == wanted).all()
        if strategy == "coherent":
            for unit in groups_of(placement):
                words = cycle[:, unit.block, list(unit.heads)]
                assert (words == words[:, :1]).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_seed_and_the_window_decide_everything(strategy: str) -> None:
    placement, scores = split(6, 6, 2), random_scores(6, 6)
    first, again, other = (
        np.stack(select_ratios(request, placement, scores, 5).cycle)
        for request in (
            SelectionRequest(ratios=(2, 1, 2), strategy=strategy, seed=1, window=3),
            SelectionRequest(ratios=(2, 1, 2), strategy=strategy, seed=1, window=3),
            SelectionRequest(ratios=(2, 1, 2), strategy=strategy, seed=1, window=4),
        )
    )
    assert (first == again).all()
    assert (first != other).any()


def test_skips_are_spread_over_micro_batches_and_over_the_workers_of_a_block() -> None:
    placement = split(12, 6, 2)
    cycle = np.stack(select_ratios(SelectionRequest(ratios=(3, 0, 2)), placement, random_scores(12, 6), 5).cycle)
    skips_M = (cycle == Op.SKIP).mean(axis=(0, 1, 2))
    assert skips_M == pytest.approx(0.4, abs=0.05)
    both = [(ops[b, placement.owner_LH[b] == 0, m] == 0).all() and (ops[b, placement.owner_LH[b] == 1, m] == 0).all()
            for ops in cycle for b in range(12) for m in range(5)]  # fmt: skip
    assert np.mean(both) < 0.01
    patterns = {ops[b].tobytes() for ops in cycle for b in range(12)}
    assert len(patterns) > 10


def test_each_worker_trains_its_share_and_the_most_worthy_heads() -> None:
    scores = random_scores(12, 6)
    placement = split(12, 6, 2, scores)
    chosen = select_ratios(SelectionRequest(ratios=(2, 3, 0)), placement, scores, 5)
    full_LH = (chosen.cycle[0] == Op.FULL).all(axis=2)
    for worker in range(2):
        assert full_LH[placement.owner_LH == worker].sum() in (14, 15)
    assert scores.backward_LH[full_LH].mean() > 1.5 * scores.backward_LH.mean()
    assert chosen.report.gap == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("ratio", "compute", "most_bytes"), [((3, 0, 2), 0.60, 0.45), ((2, 1, 2), 0.47, 0.30)])
def test_coherent_skips_save_bytes_as_well_as_compute(
    ratio: tuple[int, int, int], compute: float, most_bytes: float
) -> None:
    shape, step, placement = vit_shape(12, 6, 384), StepShape(5, 16), split(12, 6, 2)
    cycle = select_ratios(SelectionRequest(ratios=ratio), placement, random_scores(12, 6), 5).cycle
    full = uniform_ops(shape, 5, Op.FULL)
    flops = np.mean([step_flops(shape, step, ops) for ops in cycle]) / step_flops(shape, step, full)
    sent = np.mean([step_bytes(placement, ops, shape, step).sum() for ops in cycle])
    assert flops == pytest.approx(compute, abs=0.01)
    assert sent / step_bytes(placement, full, shape, step).sum() < most_bytes


def test_all_full_is_worth_one() -> None:
    scores = random_scores(3, 4)
    chosen = all_full(split(3, 4, 2), 5)
    assert len(chosen.cycle) == 1
    assert worth_fraction(chosen.cycle, scores) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("ratio", "error", "words"),
    [
        ((3, 0, 1), UserError, "do not sum to the step's 5"),
        ((6, 0, -1), UserError, "do not sum"),
        ((0, 3, 2), InfeasibleError, "train no head"),
    ],
)
def test_ratios_that_cannot_be_are_refused(ratio: tuple[int, int, int], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        select_ratios(SelectionRequest(ratios=ratio), split(3, 4, 2), random_scores(3, 4), 5)
    assert caught.value.param == "method.ratios"  # type: ignore[attr-defined]


def test_one_group_cannot_feed_micro_batches_that_it_sits_out() -> None:
    with pytest.raises(InfeasibleError, match="without a FULL head"):
        select_ratios(SelectionRequest(ratios=(2, 0, 3)), whole(1, 4, 1), random_scores(1, 4), 5)
