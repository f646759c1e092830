"""Selections: exact ratios, coherent groups, shares by time, no starved micro-batch, the same for the same seed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from scheduler.cost import Costs
from scheduler.domain import Op, OpTable, Placement, Scores, StepShape, step_flops, uniform_ops
from scheduler.errors import D2ftError, InfeasibleError, UserError
from scheduler.scores import normalise
from scheduler.selection import (
    GRAINS,
    HOLDS,
    PERIOD,
    STRATEGIES,
    Selection,
    SelectionRequest,
    all_full,
    groups_of,
    select,
    static_part,
    worth_fraction,
)
from scheduler.selection.shares import Shares, pace_of, timed_shares
from scheduler.transfers import step_bytes
from tests.scheduler.fleet import fleet, vit_shape

CHOOSING = tuple(name for name in STRATEGIES if name not in ("full", "hardest"))  # heads


def random_scores(blocks: int, heads: int, seed: int = 0) -> Scores:
    worth = np.random.default_rng(seed).exponential(size=(2, blocks, heads))
    return Scores(normalise(worth[0]), normalise(worth[1]))


def scores_by_step(blocks: int, heads: int, steps: int, micro_batches: int, seed: int = 0) -> Scores:
    """Scores in which every micro-batch of the window has worths of its own."""
    mean = random_scores(blocks, heads, seed)
    worth = mean.backward_LH[:, :, None] * np.random.default_rng(seed).lognormal(
        0, 0.7, (steps, blocks, heads, micro_batches)
    )
    return Scores(mean.backward_LH, mean.forward_LH, worth / worth.mean(axis=(1, 2), keepdims=True))


def split(blocks: int, heads: int, workers: int) -> Placement:
    """Every block shared out evenly."""
    counts = [heads * (w + 1) // workers - heads * w // workers for w in range(workers)]
    return Placement(np.tile(np.repeat(np.arange(workers), counts), (blocks, 1)), workers, workers - 1)


def whole(blocks: int, heads: int, workers: int) -> Placement:
    """Each worker one run of whole blocks."""
    owners = np.repeat([[block * workers // blocks] for block in range(blocks)], heads, axis=1)
    return Placement(owners, workers, int(owners[-1, 0]))


def costs_of(
    blocks: int, heads: int, workers: int, micro_batches: int = 5, speeds: tuple[float, ...] | None = None
) -> Costs:
    shape = vit_shape(blocks, heads, 64 * heads)
    return Costs(shape, StepShape(micro_batches, 16), fleet(speeds or (1.0,) * workers, shape=shape))


def counts(ops: OpTable) -> tuple[int, int, int]:
    return tuple(int((ops == op).sum()) for op in (Op.FULL, Op.FORWARD, Op.SKIP))  # type: ignore[return-value]


def chosen(placement: Placement, scores: Scores, speeds: tuple[float, ...] | None = None, **words: object) -> Selection:
    request = SelectionRequest(**words)  # type: ignore[arg-type]
    micro_batches = sum(request.ratios) if request.ratios else 5
    blocks, heads = placement.owner_LH.shape
    return select(request, placement, costs_of(blocks, heads, placement.num_workers, micro_batches, speeds), scores)


placements = st.builds(
    lambda kind, blocks, heads, workers: kind(blocks, heads, min(workers, heads)),
    st.sampled_from([split, whole]),
    st.integers(2, 5),
    st.integers(2, 6),
    st.integers(1, 3),
)
ratios = st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(0, 3))
speeds_of_three = st.tuples(*[st.sampled_from([0.5, 1.0, 2.0])] * 3)


@settings(max_examples=150, deadline=None)
@given(
    placement=placements,
    ratio=ratios,
    words=st.tuples(st.sampled_from(CHOOSING), st.sampled_from(HOLDS), st.sampled_from(GRAINS)),
    speeds=speeds_of_three,
    seed=st.integers(0, 99),
)
def test_ratios_are_exact_in_every_table_and_nothing_starves(
    placement: Placement,
    ratio: tuple[int, int, int],
    words: tuple[str, str, str],
    speeds: tuple[float, ...],
    seed: int,
) -> None:
    blocks, heads = placement.owner_LH.shape
    named = dict(zip(("strategy", "hold", "grain"), words, strict=True))
    try:
        found = chosen(placement, random_scores(blocks, heads, seed), speeds[: placement.num_workers], ratios=ratio,
                       seed=seed, **named)  # fmt: skip
    except InfeasibleError as error:
        assert error.param == "method.ratios"
        assume(False)
    for ops in found.cycle:
        assert ops.shape == (blocks, heads, sum(ratio))
        assert ops.dtype == np.int8
        assert counts(ops) == tuple(blocks * heads * n for n in ratio)
        assert (ops == Op.FULL).any(axis=(0, 1)).all()
    assert found.report.objective <= found.report.bound + 1e-9


@settings(max_examples=40, deadline=None)
@given(placement=placements, ratio=ratios, seed=st.integers(0, 99))
def test_training_held_still_keeps_heads_full_or_forward_and_skips_per_group(
    placement: Placement, ratio: tuple[int, int, int], seed: int
) -> None:
    blocks, heads = placement.owner_LH.shape
    try:
        cycle = np.stack(chosen(placement, random_scores(blocks, heads), ratios=ratio, seed=seed).cycle)
    except InfeasibleError:
        assume(False)
    assert len(cycle) <= PERIOD
    even = len(set(np.bincount(placement.owner_LH.ravel(), minlength=placement.num_workers).tolist())) == 1
    if not even:
        return
    mixed = sum({int(op) for op in np.unique(cycle[:, b, h])} >= {1, 2} for b in range(blocks) for h in range(heads))
    assert mixed <= 1 + 2 * placement.num_workers * (ratio[2] > 0)


@pytest.mark.parametrize("strategy", CHOOSING)
@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("grain", GRAINS)
def test_the_seed_and_the_window_decide_everything(strategy: str, hold: str, grain: str) -> None:
    placement, scores = split(6, 6, 2), random_scores(6, 6)
    words = {"ratios": (2, 1, 2), "strategy": strategy, "hold": hold, "grain": grain, "seed": 1}
    first, again, other = (np.stack(chosen(placement, scores, window=w, **words).cycle) for w in (3, 3, 4))
    assert (first == again).all()
    if hold != "all" or strategy in ("random", "uniform"):
        assert (first != other).any()


def test_coherent_skips_are_those_of_whole_groups() -> None:
    for hold, strategy in itertools.product(("training", "none"), ("hull", "random")):
        cycle = np.stack(
            chosen(split(6, 6, 2), random_scores(6, 6), ratios=(2, 1, 2), hold=hold, strategy=strategy).cycle
        )
        for unit in groups_of(split(6, 6, 2)):
            rests = cycle[:, unit.block, list(unit.heads)] == Op.SKIP
            assert (rests == rests[:, :1]).mean() > 0.98  # a total may cut one group


def test_skips_are_spread_over_micro_batches_and_over_the_workers_of_a_block() -> None:
    placement = split(12, 6, 2)
    cycle = np.stack(chosen(placement, random_scores(12, 6), ratios=(3, 0, 2)).cycle)
    skips_M = (cycle == Op.SKIP).mean(axis=(0, 1, 2))
    assert skips_M == pytest.approx(0.4, abs=0.05)
    both = [(ops[b, placement.owner_LH[b] == 0, m] == 0).all() and (ops[b, placement.owner_LH[b] == 1, m] == 0).all()
            for ops in cycle for b in range(12) for m in range(5)]  # fmt: skip
    assert np.mean(both) < 0.01
    assert len({ops[b].tobytes() for ops in cycle for b in range(12)}) > 10


def test_each_worker_trains_its_share_and_the_most_worthy_heads() -> None:
    scores, placement = random_scores(12, 6), split(12, 6, 2)
    found = chosen(placement, scores, ratios=(2, 3, 0))
    full_LH = (found.cycle[0] == Op.FULL).all(axis=2)
    for worker in range(2):
        assert full_LH[placement.owner_LH == worker].sum() in (14, 15)
    assert scores.backward_LH[full_LH].mean() > 1.5 * scores.backward_LH.mean()
    assert found.report.gap < 0.01


def test_a_worker_at_half_the_speed_trains_fewer_heads_and_all_finish_together() -> None:
    placement, scores = split(12, 6, 2), random_scores(12, 6)
    even, slowed = (chosen(placement, scores, speeds, ratios=(3, 2, 0)) for speeds in ((1.0, 1.0), (1.0, 0.5)))
    full_W = [
        [int((found.cycle[0] == Op.FULL)[placement.owner_LH == w].sum()) for w in range(2)] for found in (even, slowed)
    ]
    assert abs(full_W[0][0] - full_W[0][1]) <= 5
    assert full_W[1][1] < 0.6 * full_W[1][0]
    assert sum(full_W[0]) == sum(full_W[1])
    pace = pace_of(placement, costs_of(12, 6, 2, 5, (1.0, 0.5)))
    took_W = pace.step_us(np.full(2, 5.0), np.array(full_W[1]) / 5, 5)
    assert took_W.max() <= 1.05 * took_W.min() or full_W[1][1] == 0


def test_a_slow_worker_sits_out_more_where_no_head_is_forward() -> None:
    placement = split(12, 6, 2)
    cycle = np.stack(chosen(placement, random_scores(12, 6), (1.0, 0.6), ratios=(3, 0, 2)).cycle)
    skips_W = [(cycle[:, placement.owner_LH == w] == Op.SKIP).mean() for w in range(2)]
    assert skips_W[1] > skips_W[0] + 0.1


@settings(max_examples=60, deadline=None)
@given(ratio=ratios, speeds=speeds_of_three, kind=st.sampled_from([split, whole]))
def test_shares_keep_the_totals_and_level_what_can_be_levelled(
    ratio: tuple[int, int, int], speeds: tuple[float, ...], kind: object
) -> None:
    placement, costs = kind(6, 6, 3), costs_of(6, 6, 3, sum(ratio), speeds)  # type: ignore[operator]
    shares, pace = timed_shares(placement, costs, ratio), pace_of(placement, costs)
    full, forward, skip = ratio
    runs_W = sum(ratio) - shares.skips_W
    assert pace.owned_W @ shares.skips_W == pytest.approx(36 * skip, abs=1e-3)
    plain = Shares(pace.owned_W * full / (full + forward), np.full(3, float(skip)))
    took, before = (pace.step_us(sum(ratio) - s.skips_W, s.fulls_W, sum(ratio)).max() for s in (shares, plain))
    assert took <= before * 1.02
    assert (shares.fulls_W <= pace.owned_W + 1e-6).all()
    assert (runs_W >= 1 - 1e-6).all()


def test_full_heads_of_the_placement_are_taken_where_they_let_workers_finish_together() -> None:
    placement, scores = split(6, 6, 2), random_scores(6, 6)
    given_LH = np.zeros((6, 6), dtype=bool)
    given_LH[:, [0, 3]] = True
    lopsided_LH = np.zeros((6, 6), dtype=bool)
    lopsided_LH[:4, :3] = True
    request, costs = SelectionRequest(ratios=(1, 2, 0)), costs_of(6, 6, 2, 3)
    kept, refused = (
        (select(request, placement, costs, scores, full_LH=full).cycle[0] == Op.FULL).all(axis=2)
        for full in (given_LH, lopsided_LH)
    )
    assert (kept == given_LH).all()
    assert (refused != lopsided_LH).any()


@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("known", [False, True])
def test_without_holding_every_head_is_trained_once_a_period(grain: str, known: bool) -> None:
    scores = scores_by_step(6, 6, 16, 5) if known else random_scores(6, 6)
    cycle = np.stack(chosen(split(6, 6, 2), scores, ratios=(2, 1, 2), hold="none", grain=grain).cycle)
    assert len(cycle) == (16 if known else PERIOD)
    for begin in range(0, len(cycle), PERIOD):
        assert (cycle[begin : begin + PERIOD] == Op.FULL).any(axis=(0, 3)).all()


def test_micro_batches_with_worths_of_their_own_are_chosen_by_them() -> None:
    scores = scores_by_step(6, 6, 8, 5)
    by_worth, by_chance = (
        chosen(split(6, 6, 2), scores, ratios=(2, 1, 2), hold="none", grain="scattered", strategy=s).report.objective
        for s in ("hull", "random")
    )
    assert by_worth > 1.2 * by_chance


def test_strategies_that_look_at_worth_find_more_of_it() -> None:
    placement, scores = split(12, 6, 2), random_scores(12, 6)
    for hold in HOLDS:
        worth = {
            s: chosen(placement, scores, ratios=(2, 1, 2), hold=hold, strategy=s).report.objective for s in CHOOSING
        }
        assert worth["hull"] >= 0.999 * worth["two_stage"]
        assert worth["hull"] > max(worth["random"], worth["uniform"])
        assert worth["hull"] >= 0.98 * worth["cpsat"]


@pytest.mark.parametrize(("ratio", "compute", "most_bytes"), [((3, 0, 2), 0.60, 0.45), ((2, 1, 2), 0.47, 0.30)])
def test_coherent_skips_save_bytes_as_well_as_compute(
    ratio: tuple[int, int, int], compute: float, most_bytes: float
) -> None:
    shape, step, placement = vit_shape(12, 6, 384), StepShape(5, 16), split(12, 6, 2)
    cycle = chosen(placement, random_scores(12, 6), ratios=ratio).cycle
    full = uniform_ops(shape, 5, Op.FULL)
    flops = np.mean([step_flops(shape, step, ops) for ops in cycle]) / step_flops(shape, step, full)
    sent = np.mean([step_bytes(placement, ops, shape, step).sum() for ops in cycle])
    assert flops == pytest.approx(compute, abs=0.01)
    assert sent / step_bytes(placement, full, shape, step).sum() < most_bytes


def test_all_full_is_worth_one() -> None:
    scores = random_scores(3, 4)
    found = all_full(vit_shape(3, 4), 5)
    assert len(found.cycle) == 1
    assert worth_fraction(found.cycle, scores) == pytest.approx(1.0)
    for words in ({}, {"strategy": "full"}, {"compute": 1.0}, {"ratios": (5, 0, 0)}):
        assert (chosen(split(3, 4, 2), scores, **words).cycle[0] == Op.FULL).all()


@pytest.mark.parametrize(
    ("words", "error", "param"),
    [
        ({"ratios": (3, 0, 1)}, UserError, "method.ratios"),
        ({"ratios": (6, 0, -1)}, UserError, "method.ratios"),
        ({"ratios": (0, 3, 2)}, InfeasibleError, "method.ratios"),
        ({"ratios": (3, 0, 2), "strategy": "full"}, UserError, "method.strategy"),
        ({"ratios": (3, 0, 2), "strategy": "held"}, UserError, "method.strategy"),
        ({"ratios": (3, 0, 2), "hold": "some"}, UserError, "method.hold"),
        ({"ratios": (3, 0, 2), "grain": "fine"}, UserError, "method.grain"),
    ],
)
def test_what_cannot_be_is_refused_by_its_field(words: dict[str, object], error: type[D2ftError], param: str) -> None:
    request = SelectionRequest(**words)  # type: ignore[arg-type]
    with pytest.raises(error) as caught:
        select(request, split(3, 4, 2), costs_of(3, 4, 2), random_scores(3, 4))
    assert caught.value.param == param


def test_one_group_cannot_feed_micro_batches_that_it_sits_out() -> None:
    with pytest.raises(InfeasibleError, match="without a FULL head"):
        chosen(whole(1, 4, 1), random_scores(1, 4), ratios=(2, 0, 3))


def test_the_static_part_is_what_a_window_will_hold() -> None:
    costs, scores = costs_of(6, 6, 2), random_scores(6, 6)
    part = static_part(SelectionRequest(ratios=(2, 1, 2)), costs, scores)
    assert part is not None
    assert (part.num_full, part.run_share) == (24, 0.6)
    budget = static_part(SelectionRequest(compute=0.6), costs, scores)
    assert budget is not None
    assert 13 <= budget.num_full <= 15
    assert budget.run_share == 1.0
    for words in ({}, {"ratios": (3, 0, 2)}, {"ratios": (2, 1, 2), "hold": "none"}, {"compute": 1.0}):
        assert static_part(SelectionRequest(**words), costs, scores) is None  # type: ignore[arg-type]
