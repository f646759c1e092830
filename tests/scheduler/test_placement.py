"""Placement: equal to brute force on tiny fleets, within its bound on large ones, clear when memory is short."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.compiler import compile_step
from scheduler.cost import Costs
from scheduler.domain import Op, Placement, Scores, StaticPart, StepShape, uniform_ops
from scheduler.errors import InfeasibleError, UserError
from scheduler.placement import (
    PROVED_WITHIN,
    Candidate,
    Limits,
    assign_heads,
    counts_of,
    ideal_us,
    memory_bytes_of,
    propose,
    rows_of,
)
from scheduler.placement.chains import chains_of, quick_bound_us, trainers_of
from scheduler.placement.heads import arrange
from scheduler.placement.instance import Instance, Row, chain_of, linked
from scheduler.placement.memory import shortage_of
from scheduler.placement.model import interleaved, solver_of
from scheduler.placement.patterns import Prices, all_rows, price
from scheduler.placement.relaxation import Pool, relax
from scheduler.placement.search import solve_kinds
from scheduler.placement.worth import losses_of
from scheduler.simulate import simulate
from tests.scheduler.fleet import fleet, two_nodes, vit_shape

UNLIKE = (4, 3.3, 2.7, 2.1, 1.6, 1.3, 1.1, 1)


def costs_of(
    blocks: int, heads: int, speeds: tuple[float, ...], *, dim: int = 96, micro_batches: int = 3, **links: object
) -> Costs:
    shape = vit_shape(blocks, heads, dim)
    return Costs(shape, StepShape(micro_batches, 16), fleet(speeds, shape=shape, **links))  # type: ignore[arg-type]


def static_of(costs: Costs, share: float = 0.4, seed: int = 0, tolerance: float = 0.02) -> StaticPart:
    worth = np.random.default_rng(seed).gamma(2.0, 0.5, (costs.shape.num_blocks, costs.shape.num_heads))
    return StaticPart(worth, round(worth.size * share), tolerance=tolerance)


def simulated_us(candidate: Candidate, costs: Costs) -> int:
    ops = uniform_ops(costs.shape, costs.step.num_micro_batches, Op.FULL)
    if candidate.full_LH is not None:
        ops = np.where(candidate.full_LH[:, :, None], ops, int(Op.FORWARD)).astype(np.int8)
    return simulate(compile_step(candidate.placement, ops, costs), costs).step_us


def brute_force_us(instance: Instance, kind: str) -> int:
    """The least proxy over all placements of a kind, without a solver."""
    losses, best = losses_of(instance), None
    for chain in chains_of(instance, kind):
        rows = {team: all_rows(instance, team) or [] for team in chain}
        for lengths in itertools.product(range(1, instance.num_blocks + 1), repeat=len(chain)):
            if sum(lengths) != instance.num_blocks:
                continue
            teams = [team for team, length in zip(chain, lengths, strict=True) for _ in range(length)]
            for chosen in itertools.product(*(rows[team] for team in teams)):
                if losses is not None:
                    lost = sum(losses.loss_LK[block, row.num_full] for block, row in enumerate(chosen))
                    if lost > losses.slack or sum(row.num_full for row in chosen) != instance.num_full:
                        continue
                nested = len(linked(chain)) < len(chain)
                for classifier in teams[-1]:
                    us = instance.proxy_us(interleaved(chosen) if nested else chosen, classifier)
                    best = us if best is None else min(best, us)
    assert best is not None
    return best


@pytest.mark.parametrize("kind", ["split", "whole", "mixed"])
@pytest.mark.parametrize(
    ("blocks", "heads", "speeds", "width"),
    [
        (2, 3, (1.0, 1.0), 10**9),
        (2, 3, (2.5, 1.0), 10**7),
        (3, 3, (1.7, 1.0), 10**8),
        (2, 3, (3.0, 2.0, 1.0), 10**8),
        (3, 2, (1.0, 1.0, 2.0), 10**7),
    ],
)
def test_the_solver_finds_the_minimum_of_brute_force(
    kind: str, blocks: int, heads: int, speeds: tuple[float, ...], width: int
) -> None:
    costs = costs_of(blocks, heads, speeds, link_bytes_per_s=width)
    instance = Instance(costs)
    if not chains_of(instance, kind):
        pytest.skip("two workers have no mixed placement")
    [found] = solve_kinds(instance, [kind], Limits())
    least = brute_force_us(instance, kind)
    assert least <= found.answer.objective <= least * (1 + PROVED_WITHIN)
    assert found.bound <= least
    assert instance.proxy_us(found.answer.rows, found.answer.classifier) == found.answer.objective


@pytest.mark.parametrize(("speeds", "share"), [((1.0, 1.0), 0.5), ((3.0, 1.0), 0.5), ((2.0, 1.0), 0.34)])
@pytest.mark.parametrize("kind", ["split", "whole"])
def test_with_a_static_part_it_is_near_brute_force_and_its_bound_below(
    kind: str, speeds: tuple[float, ...], share: float
) -> None:
    costs = costs_of(3, 3, speeds, dim=384)
    instance = Instance(costs, static_of(costs, share, tolerance=0.2))
    [found] = solve_kinds(instance, [kind], Limits())
    least = brute_force_us(instance, kind)
    assert found.bound <= least <= found.answer.objective <= least * 1.1


@settings(max_examples=15, deadline=None)
@given(
    speeds=st.lists(st.floats(0.5, 4.0), min_size=2, max_size=4),
    width=st.sampled_from([10**7, 10**8, 10**9]),
    share=st.sampled_from([None, 0.3, 0.6]),
)
def test_every_head_is_placed_once_within_memory_and_always_alike(
    speeds: list[float], width: int, share: float | None
) -> None:
    costs = costs_of(4, 3, tuple(speeds), link_bytes_per_s=width)
    static = None if share is None else static_of(costs, share)
    candidates, again = propose(costs, static=static), propose(costs, static=static)
    for candidate, other in zip(candidates, again, strict=True):
        assert candidate.placement.to_dict() == other.placement.to_dict()
        counts_LW = counts_of(candidate.placement)
        assert (counts_LW.sum(axis=1) == 3).all()
        assert counts_LW[-1, candidate.placement.classifier] > 0
        needs = memory_bytes_of(candidate.placement, costs, candidate.full_LH)
        assert all(need <= profile.free_bytes for need, profile in zip(needs, costs.profiles, strict=True))
        assert candidate.report.bound <= candidate.report.objective
        assert simulated_us(candidate, costs) >= ideal_us(costs, static) * 0.999
        if static is not None:
            assert candidate.full_LH is not None
            assert candidate.full_LH.sum() == static.num_full
            best = np.sort(static.worth_LH.ravel())[::-1][: static.num_full].sum()
            assert static.worth_LH[candidate.full_LH].sum() >= best * (1 - static.tolerance) - 0.01


@pytest.mark.parametrize("name", ["alike", "unlike", "two nodes"])
def test_usual_sizes_are_proved_in_a_moment(name: str) -> None:
    speeds, width = {
        "alike": ((1, 1, 1, 1), 10**9),
        "unlike": ((4, 2, 2, 1), 10**9),
        "two nodes": ((3, 2.2, 1.3, 1), two_nodes),
    }[name]
    best = propose(costs_of(12, 6, speeds, dim=384, micro_batches=5, link_bytes_per_s=width))[0]
    # Teams in turns cross more often than the bound counts: its program knows them as runs.
    in_turns = len(chain_of(rows_of(best.placement))) > len({row.team for row in rows_of(best.placement)})
    assert best.report.gap <= (0.005 if in_turns else PROVED_WITHIN)
    assert in_turns or best.report.status == "OPTIMAL"
    assert 0 <= best.report.rounding_loss < 0.05


@pytest.mark.parametrize(("share", "gap"), [(None, 0.05), (0.4, 0.1)])
def test_large_fleets_get_an_answer_with_a_bound(share: float | None, gap: float) -> None:
    costs = costs_of(24, 16, UNLIKE * 2, dim=1024, micro_batches=5, gflops=2000.0)
    best = propose(costs, static=None if share is None else static_of(costs, share))[0]
    assert best.report.gap < gap


@pytest.mark.parametrize("speeds", [(1.0, 1.0), (2.0, 1.0), (3.0, 2.0, 1.0)])
@pytest.mark.parametrize("mode", ["split", "whole"])
@pytest.mark.parametrize("share", [None, 0.4])
def test_the_proxy_is_near_the_simulated_step(mode: str, speeds: tuple[float, ...], share: float | None) -> None:
    costs = costs_of(12, 6, speeds, dim=384, micro_batches=5)
    best = propose(costs, mode, static=None if share is None else static_of(costs, share))[0]
    assert best.report.objective == pytest.approx(simulated_us(best, costs), rel=0.15)


def test_fast_links_split_blocks_and_slow_links_keep_them_whole() -> None:
    for width, latency, wanted in ((10**10, 10, "split"), (2 * 10**6, 1000, "whole")):
        costs = costs_of(12, 6, (1.0, 1.0), dim=384, micro_batches=5, link_bytes_per_s=width, latency_us=latency)
        best, *others = propose(costs)
        sizes = {len(best.placement.holders(block)) for block in range(12)}
        assert sizes == ({2} if wanted == "split" else {1})
        assert all(simulated_us(best, costs) <= simulated_us(other, costs) for other in others)


def test_two_fast_nodes_on_a_slow_link_split_inside_and_keep_whole_across() -> None:
    def link(src: int, dst: int) -> int:
        return 10**10 if (src - dst) % 2 == 0 else 10**7

    costs = costs_of(12, 6, (1.0,) * 4, dim=384, micro_batches=5, link_bytes_per_s=link)
    best = propose(costs)[0]
    teams = [best.placement.holders(block) for block in range(12)]
    assert all(len(team) == 2 and len({worker % 2 for worker in team}) == 1 for team in teams)
    for mode in ("split", "whole"):
        assert simulated_us(best, costs) < simulated_us(propose(costs, mode)[0], costs)


def test_slow_devices_take_forward_heads() -> None:
    costs = costs_of(12, 6, (4.0, 1.0), dim=384, micro_batches=5)
    static = static_of(costs, 0.4)
    best = propose(costs, "split", static=static)[0]
    rows = rows_of(best.placement, best.full_LH)
    full = np.sum([row.full_W for row in rows], axis=0)
    assert full[0] > full[1]
    assert best.report.rounding_loss < 0.1


def test_a_faster_worker_gets_more_heads() -> None:
    placement = propose(costs_of(12, 6, (2.0, 1.0), dim=384), "split")[0].placement
    fast, slow = counts_of(placement).sum(axis=0)
    assert fast == pytest.approx(2 * slow, rel=0.1)


def test_a_very_slow_worker_may_own_nothing() -> None:
    placement = propose(costs_of(6, 6, (1.0, 1.0, 0.01), dim=384))[0].placement
    assert counts_of(placement)[:, 2].sum() == 0


def test_a_slow_worker_may_have_heads_in_some_blocks_only() -> None:
    costs = costs_of(8, 6, (1.0, 1.0, 0.33), dim=384, micro_batches=5, gflops=40.0, link_bytes_per_s=2 * 10**9)
    best = propose(costs)[0]
    counts_LW = counts_of(best.placement)
    assert counts_LW.sum(axis=0).tolist() == [21, 21, 6]
    assert 0 < np.count_nonzero(counts_LW[:, 2]) < 8
    assert simulated_us(best, costs) < 0.96 * simulated_us(propose(costs, "split")[0], costs)
    assert best.report.objective == pytest.approx(simulated_us(best, costs), rel=0.05)


def test_teams_that_share_members_go_in_step() -> None:
    assert linked(((0, 1), (2,), (0, 1, 3))) == [[(2,)], [(0, 1, 3), (0, 1)]]
    assert linked(((0,), (1,), (0, 1))) == [[(0, 1), (0,), (1,)]]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), splits=st.sampled_from([0, 2, 8]), share=st.sampled_from([None, 0.5]))
def test_pricing_bounds_the_reduced_cost_of_every_row_and_ends_exactly(
    seed: int, splits: int, share: float | None
) -> None:
    rng = np.random.default_rng(seed)
    costs = costs_of(3, 4, tuple(rng.uniform(1, 4, 3)))
    instance = Instance(costs, None if share is None else static_of(costs, share))
    team = (0, 1, 2)
    prices = Prices(
        instance.busy_WAO * rng.uniform(0, 2, (3, 1, 1)),
        float(rng.uniform(0, 3)),
        np.zeros(1) if share is None else rng.uniform(-1, 1, 5) * 1e3,
    )
    apart = {trainers: float(rng.uniform(0, 100)) for trainers in trainers_of(instance, team)}

    def reduced(row: Row) -> float:
        forward = max(int(instance.forward_WAO[w, row.full_W[w], row.only_W[w]]) for w in team)
        backward = max((int(instance.backward_SWN[:, w, row.full_W[w]].sum()) for w in row.trainers), default=0)
        own = sum(prices.cost_WAO[w, row.full_W[w], row.only_W[w]] for w in team)
        worth = prices.full_K[row.num_full if share is not None else 0]
        return float(own + prices.path * (forward + backward) + worth + apart[row.trainers])

    rows = all_rows(instance, team)
    assert rows is not None
    least = min(map(reduced, rows))
    bound, found = price(instance, team, prices, apart, np.inf, splits)
    assert bound <= least + 1e-6
    assert set(found) <= set(rows)
    if splits == 8:
        assert bound == pytest.approx(least)
        assert min(map(reduced, found)) == pytest.approx(least)


def test_one_worker_gets_everything() -> None:
    [candidate] = propose(costs_of(2, 3, (1.0,)))
    assert (candidate.placement.owner_LH == 0).all()
    assert candidate.report.status == "OPTIMAL"


def test_auto_offers_distinct_candidates_in_order_of_the_proxy() -> None:
    candidates = propose(costs_of(12, 6, (1.0, 2.0)))
    objectives = [candidate.report.objective for candidate in candidates]
    assert objectives == sorted(objectives)
    assert len({candidate.placement.owner_LH.tobytes() for candidate in candidates}) == len(candidates)


def test_the_placement_in_use_is_kept_if_none_is_better_and_never_makes_it_worse() -> None:
    costs = costs_of(12, 6, (4, 2, 2, 1), dim=384, micro_batches=5)
    plain = propose(costs)[0]
    shuffled = np.random.default_rng(0).permuted(plain.placement.owner_LH, axis=1)
    current = Placement(shuffled, 4, plain.placement.classifier)
    assert propose(costs, current=current)[0].placement is current
    poor = Placement(np.zeros((12, 6), dtype=np.int64), 4, 0)
    assert propose(costs, current=poor)[0].report.objective <= plain.report.objective


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000))
def test_as_few_heads_move_as_the_counts_allow(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = [rng.multinomial(4, [0.5, 0.5]) + 1 for _ in range(3)]
    rows = [Row(tuple(map(int, row)), (0, 0)) for row in counts]
    full = np.ones((3, 6), dtype=bool)
    current = Placement(rng.integers(0, 2, (3, 6)), 2, 0)
    moved = (assign_heads(arrange(rows, full, current), full, None, current) != current.owner_LH).sum()
    least = min(
        sum(
            int(abs(np.bincount(owners, minlength=2)[0] - row.full_W[0]))
            for owners, row in zip(current.owner_LH, order, strict=True)
        )
        for order in itertools.permutations(rows)
    )
    assert moved == least


def test_worthy_heads_are_shared_out_in_turns() -> None:
    worth = np.tile(np.arange(6.0), (4, 1))
    owners = assign_heads([Row((3, 3), (0, 0))] * 4, np.ones((4, 6), dtype=bool), Scores(worth, worth))
    assert sorted(owners[0, 4:].tolist()) == [0, 1]
    assert (counts_of(Placement(owners, 2, 1)) == 3).all()


def test_bounds_follow_each_other() -> None:
    for static in (False, True):
        costs = costs_of(12, 6, (4, 2, 2, 1), dim=384, micro_batches=5)
        instance = Instance(costs, static_of(costs) if static else None)
        chain = chains_of(instance, "split")[0]
        relaxed = relax(instance, chain, Pool(instance), losses_of(instance))
        [found] = solve_kinds(instance, ["split"], Limits())
        assert quick_bound_us(instance, chain) <= relaxed.bound
        assert found.bound <= found.answer.objective


def test_memory_moves_heads_to_where_there_is_room() -> None:
    shape, step = vit_shape(6, 6, 384), StepShape(3, 2)
    roomy = Costs(shape, step, fleet((2.0, 1.0), shape=shape))
    tight = Costs(shape, step, fleet((2.0, 1.0), shape=shape, free_bytes=[60_000_000, 1 << 33]))
    before, after = propose(roomy, "split")[0].placement, propose(tight, "split")[0].placement
    assert counts_of(after)[:, 0].sum() < counts_of(before)[:, 0].sum()
    assert memory_bytes_of(after, tight)[0] <= 60_000_000


def test_forward_heads_need_less_memory() -> None:
    costs = costs_of(6, 6, (2.0, 1.0), dim=384)
    placement = propose(costs, "split")[0].placement
    held = memory_bytes_of(placement, costs, np.zeros((6, 6), dtype=bool))
    assert all(some < full / 2 for some, full in zip(held, memory_bytes_of(placement, costs), strict=True))


@pytest.mark.parametrize("mode", ["auto", "split", "whole"])
def test_too_little_memory_names_the_worker_and_the_least_that_would_do(mode: str) -> None:
    free = [90_000_000, 20_000_000]
    costs = costs_of(6, 6, (1.0, 1.0), dim=384, free_bytes=free)
    with pytest.raises(
        InfeasibleError, match=r"worker \d needs [\d.]+ GB more \([\d.]+ needed, [\d.]+ free; cpu\)"
    ) as e:
        propose(costs, mode)
    assert (e.value.code, e.value.param) == ("memory_infeasible", "workers")
    instance = Instance(costs)
    kinds = ("split", "whole", "mixed") if mode == "auto" else (mode,)
    short = [s for kind in kinds for c in chains_of(instance, kind) if (s := shortage_of(instance, c, Limits()))]
    least = min(short, key=lambda s: s.total)
    enough = [have + lack for have, lack in zip(free, least.lacks_W, strict=True)]
    propose(costs_of(6, 6, (1.0, 1.0), dim=384, free_bytes=enough), mode)
    with pytest.raises(InfeasibleError):
        propose(
            costs_of(
                6, 6, (1.0, 1.0), dim=384, free_bytes=[b - 300_000 * (b > f) for b, f in zip(enough, free, strict=True)]
            ),
            mode,
        )


def test_solver_parameters_are_pinned() -> None:
    parameters = solver_of(Limits(seconds=3.0, seed=7)).parameters
    assert (parameters.num_workers, parameters.random_seed, parameters.linearization_level) == (1, 7, 2)
    assert parameters.max_deterministic_time == 3.0
    assert parameters.max_time_in_seconds > 3.0


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(UserError, match="'sideways' is not a placement mode"):
        propose(costs_of(2, 3, (1.0, 1.0)), "sideways")
