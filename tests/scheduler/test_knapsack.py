"""The knapsacks equal brute force on tiny instances, or stay between it and the linear program's optimum."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.sparse import csr_matrix

from scheduler.domain import Op, Placement
from scheduler.selection.assign import Items, assign_by_price, assign_in_stages, assign_proved
from scheduler.selection.held import choose_full
from scheduler.selection.hull import pick_by_hull, price_bytes
from scheduler.selection.menus import Menus, Prices, best_ops, best_subsets, coherent_menus, scattered_menus
from scheduler.selection.polish import repaired, towards
from scheduler.selection.proof import pick_proved
from scheduler.selection.shares import whole
from scheduler.selection.stages import best_options, pick_in_stages

PLACEMENTS = [
    Placement(np.array([[0, 0, 1, 1]] * 2), 2, 1),
    Placement(np.array([[0, 0, 0, 0], [1, 1, 1, 1]]), 2, 1),
    Placement(np.array([[0, 1, 1, 1], [1, 1, 0, 2]]), 3, 2),
]


def random_menus(groups: int, seed: int, limited: bool, coherent: bool) -> Menus:
    """Two heads a group on two workers, with fixed charges."""
    rng = np.random.default_rng(seed)
    worker_G = np.arange(groups) % 2
    forward_GN, backward_GN = rng.exponential(size=(2, groups, 2))
    cost_GN1 = np.array([0, 1, 1])[None] * rng.integers(1, 6, (groups, 1)) + np.arange(3) * rng.integers(
        3, 9, (groups, 1)
    )
    bytes_G2 = rng.integers(0, 5, (groups, 2))
    budget_W = np.array([int(0.6 * (3 * cost_GN1[worker_G == w, 2]).sum()) for w in range(2)])
    limit = float(0.5 * bytes_G2.sum()) if limited else np.inf
    if coherent:
        cost_G2 = np.stack([cost_GN1[:, 2], 2 * cost_GN1[:, 2]], axis=1)
        heads_G = np.full(groups, 2)
        return coherent_menus(worker_G, forward_GN.sum(axis=1), backward_GN.sum(axis=1), heads_G, cost_G2, bytes_G2,
                              budget_W, limit)  # fmt: skip
    return scattered_menus(worker_G, forward_GN, backward_GN, cost_GN1, 2 * cost_GN1, bytes_G2, budget_W, limit)


def odd_menus(groups: int, seed: int) -> Menus:
    """Any options: of equal worth or none, missing, free, or without bytes; budgets of nothing and of more than all."""
    rng = np.random.default_rng(seed)
    shape, workers = (groups, int(rng.integers(1, 6))), int(rng.integers(1, 5))
    worth_GK = rng.integers(0, 3, shape) * 1.0 if rng.random() < 0.5 else rng.lognormal(0, 3, shape)
    cost_GK = rng.integers(0, 30, shape) if rng.random() < 0.7 else np.tile(7 * np.arange(shape[1]), (groups, 1))
    bytes_GK = rng.integers(0, 20, shape) * (rng.random((groups, 1)) < rng.random())
    worth_GK[rng.random(shape) < 0.2] = -np.inf
    for array in (worth_GK, cost_GK, bytes_GK):
        array[:, 0] = 0
    worker_G = rng.integers(0, workers, groups)
    budget_W = np.bincount(worker_G, cost_GK.max(axis=1), workers) * rng.choice([0.0, 0.1, 0.5, 0.9, 2.0], workers)
    max_bytes = float(rng.choice([0.0, 0.05, 0.5, 0.9, 2.0])) * bytes_GK.max(axis=1).sum()
    nothing_GK = np.zeros(shape, dtype=np.int64)
    return Menus(worker_G, 0.0 * cost_GK, worth_GK, cost_GK, bytes_GK, nothing_GK, nothing_GK,
                 budget_W.astype(np.int64), max_bytes if rng.random() < 0.8 else np.inf)  # fmt: skip


def best_by_force(menus: Menus) -> float:
    options = [np.flatnonzero(row) for row in np.isfinite(menus.worths)]
    choices = (np.array(choice) for choice in itertools.product(*options))
    return max(menus.totals(choice)[0] for choice in choices if menus.fits(choice))


def linear_optimum(menus: Menus) -> float:
    """Of the relaxation, by a solver that knows nothing of hulls."""
    usable = np.argwhere(np.isfinite(menus.worths))
    group, option = usable[:, 0], usable[:, 1]
    rows = [np.where(menus.worker_G[group] == w, menus.cost_GK[group, option], 0) for w in range(len(menus.budget_W))]
    limits = menus.budget_W.tolist()
    if np.isfinite(menus.max_bytes):
        rows.append(menus.bytes_GK[group, option])
        limits.append(menus.max_bytes)
    picks_one = csr_matrix((np.ones(len(group)), (group, np.arange(len(group)))))
    worth, ones = menus.worths[group, option], np.ones(len(menus.worker_G))
    solved = linprog(-worth, csr_matrix(np.array(rows)), limits, picks_one, ones, method="highs")
    return float(-solved.fun)


instances = st.builds(random_menus, st.integers(1, 4), st.integers(0, 10_000), st.booleans(), st.booleans())


@settings(max_examples=60, deadline=None)
@given(menus=instances)
def test_the_hull_lies_below_the_optimum_and_its_bound_above(menus: Menus) -> None:
    optimum, picked = best_by_force(menus), pick_by_hull(menus)
    assert menus.fits(picked.choice_G)
    assert picked.worth == pytest.approx(menus.totals(picked.choice_G)[0])
    assert picked.worth <= optimum + 1e-9 <= picked.bound + 1e-6


@settings(max_examples=30, deadline=None)
@given(groups=st.integers(2, 30), heads=st.integers(2, 16), part=st.floats(0.05, 0.95), limited=st.booleans())
def test_heads_of_equal_worth_keep_the_budgets_too(groups: int, heads: int, part: float, limited: bool) -> None:
    worker_G, worth_GN = np.arange(groups) % 2, np.full((groups, heads), 0.3)
    cost_GN1 = np.tile(7 * np.arange(heads + 1), (groups, 1))
    budget_W = np.array([int(part * 3 * cost_GN1[worker_G == w, -1].sum()) for w in range(2)])
    bytes_G2 = np.full((groups, 2), 3)
    limit = part * bytes_G2.sum() if limited else np.inf
    menus = scattered_menus(worker_G, worth_GN, worth_GN, cost_GN1, 2 * cost_GN1, bytes_G2, budget_W, limit)
    picked = pick_by_hull(menus)
    assert menus.fits(picked.choice_G)
    assert picked.worth <= picked.bound + 1e-9


@settings(max_examples=30, deadline=None)
@given(menus=instances)
def test_cpsat_proves_the_optimum(menus: Menus) -> None:
    picked = pick_proved(menus)
    assert picked.status == "OPTIMAL"
    assert menus.fits(picked.choice_G)
    assert picked.worth == pytest.approx(best_by_force(menus), abs=1e-4)
    assert picked.bound == pytest.approx(picked.worth, abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(groups=st.integers(5, 60), seed=st.integers(0, 1000), limited=st.booleans(), coherent=st.booleans())
def test_the_bound_is_the_optimum_of_the_relaxation(groups: int, seed: int, limited: bool, coherent: bool) -> None:
    menus = random_menus(groups, seed, limited, coherent)
    bound, optimum = price_bytes(menus)[1], linear_optimum(menus)
    assert optimum - 1e-6 <= bound <= optimum * (1 + 2e-4) + 1e-6


@settings(max_examples=60, deadline=None)
@given(groups=st.integers(1, 30), seed=st.integers(0, 10_000))
@example(groups=12, seed=227).via("whole groups of the mix send too much")
def test_odd_menus_are_solved_within_budgets_and_bounded_closely(groups: int, seed: int) -> None:
    menus = odd_menus(groups, seed)
    picked, bound, optimum = pick_by_hull(menus), price_bytes(menus)[1], linear_optimum(menus)
    assert menus.fits(picked.choice_G)
    assert picked.worth <= picked.bound
    assert optimum * (1 - 1e-9) - 1e-6 <= bound <= optimum * (1 + 2e-4) + 1e-6


@settings(max_examples=3, deadline=None)
@given(groups=st.integers(2100, 2500), seed=st.integers(0, 1000), coherent=st.booleans())
def test_prices_guessed_from_a_sample_lead_to_a_close_bound_and_choice(groups: int, seed: int, coherent: bool) -> None:
    menus = random_menus(groups, seed, limited=True, coherent=coherent)
    menus = replace(menus, budget_W=menus.budget_W * [1, 2])  # the second worker has time enough
    picked, optimum = pick_by_hull(menus), linear_optimum(menus)
    assert menus.fits(picked.choice_G)
    assert optimum * (1 - 1e-9) <= price_bytes(menus)[1] <= optimum * (1 + 2e-4)
    assert picked.gap <= 1e-3
    assert np.array_equal(picked.choice_G, pick_by_hull(menus).choice_G)


@settings(max_examples=60, deadline=None)
@given(groups=st.integers(1, 30), seed=st.integers(0, 10_000))
def test_on_the_way_to_any_choice_budgets_are_kept_and_no_worth_is_lost(groups: int, seed: int) -> None:
    menus, rng = odd_menus(groups, seed), np.random.default_rng(seed)
    goal_G = np.array([rng.choice(np.flatnonzero(np.isfinite(row))) for row in menus.worths])
    prices = Prices(rng.exponential(size=len(menus.budget_W)), float(rng.exponential()))
    start_G = pick_by_hull(replace(menus, budget_W=menus.budget_W // 2, max_bytes=menus.max_bytes / 2)).choice_G
    reached_G = towards(menus, start_G, goal_G, prices)
    assert menus.fits(reached_G)
    assert menus.totals(reached_G)[0] >= menus.totals(start_G)[0] - 1e-9
    assert ((reached_G == start_G) | (reached_G == goal_G)).all()
    if menus.fits(goal_G):
        assert menus.totals(reached_G)[0] >= menus.totals(goal_G)[0] - 1e-9


@settings(max_examples=60, deadline=None)
@given(groups=st.integers(1, 30), seed=st.integers(0, 10_000))
def test_too_many_bytes_are_given_up_without_more_time(groups: int, seed: int) -> None:
    menus, rng = odd_menus(groups, seed), np.random.default_rng(seed)
    choice_G = np.array([rng.choice(np.flatnonzero(np.isfinite(row))) for row in menus.worths])
    repaired_G = repaired(menus, choice_G)
    (_, before_W, sent), (worth, after_W, left) = menus.totals(choice_G), menus.totals(repaired_G)
    assert np.isfinite(worth)
    assert left <= menus.max_bytes
    assert (after_W <= before_W).all()
    changed = np.flatnonzero(repaired_G != choice_G)
    assert sent > menus.max_bytes or not len(changed)
    assert (menus.bytes_GK[changed, repaired_G[changed]] < menus.bytes_GK[changed, choice_G[changed]]).all()


@settings(max_examples=30, deadline=None)
@given(menus=instances)
def test_two_stages_keep_the_budgets_and_stay_below_the_optimum(menus: Menus) -> None:
    picked = pick_in_stages(menus)
    assert menus.fits(picked.choice_G)
    assert picked.worth <= best_by_force(menus) + 1e-9


@settings(max_examples=60, deadline=None)
@given(groups=st.integers(1, 5), budget=st.integers(0, 30), seed=st.integers(0, 1000))
def test_each_stage_is_optimal_by_dynamic_programming(groups: int, budget: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    value_GK, cost_GK = rng.exponential(size=(groups, 3)), rng.integers(1, 12, (groups, 3))
    value_GK[:, 0], cost_GK[:, 0] = 0.0, 0
    choice = best_options(value_GK, cost_GK, budget)
    rows = range(groups)
    assert sum(cost_GK[g, choice[g]] for g in rows) <= budget
    best = max(
        sum(value_GK[g, k] for g, k in enumerate(ks))
        for ks in itertools.product(range(3), repeat=groups)
        if sum(cost_GK[g, k] for g, k in enumerate(ks)) <= budget
    )
    assert sum(value_GK[g, choice[g]] for g in rows) == pytest.approx(best)


@settings(max_examples=40, deadline=None)
@given(heads=st.integers(1, 4), seed=st.integers(0, 1000))
def test_an_option_holds_the_best_heads_for_its_counts(heads: int, seed: int) -> None:
    forward_N, backward_N = np.random.default_rng(seed).exponential(size=(2, heads))
    worth, forward = best_subsets(forward_N[None], backward_N[None])
    for r in range(heads + 1):
        for t in range(r + 1):
            seen = max(
                sum(forward_N[h] for h in ran) + sum(backward_N[h] for h in trained)
                for ran in itertools.combinations(range(heads), r)
                for trained in itertools.combinations(ran, t)
            )
            assert worth[0, r, t] == pytest.approx(seen)
            ops = best_ops(forward_N, backward_N, r, t)
            assert ((ops > 0).sum(), (ops == Op.FULL).sum()) == (r, t)
            gained = forward_N[ops > 0].sum() + backward_N[ops == Op.FULL].sum()
            assert gained == pytest.approx(seen)
            assert forward[0, r, t] <= seen + 1e-9


def random_items(count: int, seed: int, grouped: bool) -> Items:
    rng = np.random.default_rng(seed)
    num_run = int(rng.integers(0, count + 1))
    group_I = np.arange(count) // 2 if grouped else np.arange(count)
    return Items(*rng.exponential(size=(2, count)), group_I, int(rng.integers(0, num_run + 1)), num_run)


@settings(max_examples=80, deadline=None)
@given(count=st.integers(1, 7), seed=st.integers(0, 10_000), grouped=st.booleans())
def test_assignments_have_the_counts_asked_and_lie_between_optimum_and_bound(
    count: int, seed: int, grouped: bool
) -> None:
    items = random_items(count, seed, grouped)
    tables = (np.array(t) for t in itertools.product(range(3), repeat=count))
    fitting = [t for t in tables if (t > 0).sum() == items.num_run and (t == 2).sum() == items.num_full]
    optimum = max(items.worth(t) for t in fitting)
    for assign in (assign_by_price, assign_in_stages, assign_proved):
        ops_I, bound = assign(items)
        assert (int((ops_I > 0).sum()), int((ops_I == Op.FULL).sum())) == (items.num_run, items.num_full)
        assert items.worth(ops_I) <= optimum + 1e-9
        if assign is not assign_proved:
            assert bound >= optimum - 1e-6
    if not grouped:
        assert items.worth(assign_by_price(items)[0]) == pytest.approx(optimum, rel=1e-6)
        assert items.worth(assign_proved(items)[0]) == pytest.approx(optimum, abs=1e-3)


@settings(max_examples=40, deadline=None)
@given(placement=st.sampled_from(PLACEMENTS), part=st.floats(0.1, 1.0), seed=st.integers(0, 10_000))
def test_heads_held_full_equal_brute_force(placement: Placement, part: float, seed: int) -> None:
    worth = np.random.default_rng(seed).exponential(size=placement.owner_LH.shape).round(4)
    total = max(1, int(part * worth.size))
    owned_W = np.bincount(placement.owner_LH.ravel(), minlength=placement.num_workers).astype(float)
    limits = whole(owned_W * total / worth.size, total, owned_W)
    best = -np.inf
    for heads in itertools.combinations(range(worth.size), total):
        count_W = np.bincount(placement.owner_LH.ravel()[list(heads)], minlength=placement.num_workers)
        if all(least <= n <= most for n, (least, most) in zip(count_W, limits, strict=True)):
            best = max(best, float(worth.ravel()[list(heads)].sum()))
    for proved in (False, True):
        held = choose_full(worth, placement, limits, total, proved=proved)
        assert held.worth == pytest.approx(best, abs=1e-6)
        assert held.full_LH.sum() == total


def test_more_heads_than_there_are_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="9 heads"):
        choose_full(np.ones((2, 4)), PLACEMENTS[0], [(0, 4), (0, 4)], 9)
