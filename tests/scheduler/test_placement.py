"""Placement: proved on usual sizes in seconds, equal to brute force on tiny ones, and clear when memory is short."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from scheduler.compiler import compile_step
from scheduler.cost import Costs
from scheduler.domain import IntArray, Op, Placement, Scores, StepShape, uniform_ops
from scheduler.errors import InfeasibleError, UserError
from scheduler.placement import PROVED_WITHIN, Limits, assign_heads, counts_of, propose, solve
from scheduler.simulate import simulate
from scheduler.teams import Instance, teams_of
from tests.scheduler.fleet import fleet, two_nodes, vit_shape


def costs_of(
    blocks: int, heads: int, speeds: tuple[float, ...], *, dim: int = 96, micro_batches: int = 3, **links: object
) -> Costs:
    shape = vit_shape(blocks, heads, dim)
    return Costs(shape, StepShape(micro_batches, 16), fleet(speeds, shape=shape, **links))  # type: ignore[arg-type]


def all_counts(costs: Costs) -> Iterator[IntArray]:
    """Every way to share the heads of every block out over the workers."""
    heads, workers = costs.shape.num_heads, costs.num_workers
    rows = [row for row in itertools.product(range(heads + 1), repeat=workers) if sum(row) == heads]
    for chosen in itertools.product(rows, repeat=costs.shape.num_blocks):
        yield np.array(chosen)


def in_runs(teams: list[tuple[int, ...]]) -> bool:
    runs = [team for team, _ in itertools.groupby(teams)]
    return len(runs) == len(set(runs))


def brute_force_us(costs: Costs, kind: str) -> int:
    """The least proxy over all placements of a kind, without a solver."""
    instance, allowed = Instance(costs, ()), set(teams_of(costs, kind))
    best = None
    for counts in all_counts(costs):
        teams = [tuple(int(w) for w in np.flatnonzero(row)) for row in counts]
        if not set(teams) <= allowed or not in_runs(teams) or (kind == "split" and len(set(teams)) > 1):
            continue
        for classifier in teams[-1]:
            us = instance.proxy_us(counts, classifier)
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
    found = solve(costs, kind)
    least = brute_force_us(costs, kind)
    assert least <= found.report.objective <= least * (1 + PROVED_WITHIN)
    assert found.report.bound <= least
    assert Instance(costs, ()).proxy_us(found.counts_LW, found.classifier) == found.report.objective


@pytest.mark.parametrize(
    ("blocks", "heads", "dim", "speeds", "width"),
    [
        (12, 6, 384, (1, 1), 10**9),
        (12, 6, 384, (1.7, 1), 10**8),
        (12, 6, 384, (2, 1, 1), 10**9),
        (12, 6, 384, (1, 1, 1, 1), 10**9),
        (12, 6, 384, (4, 2, 2, 1), 10**9),
        (12, 6, 384, (3, 2.2, 1.3, 1), two_nodes),
        (12, 12, 768, (1,) * 8, two_nodes),
        (12, 12, 768, (4, 4, 4, 4, 2, 2, 1, 1), two_nodes),
    ],
)
def test_usual_sizes_are_proved_in_seconds(
    blocks: int, heads: int, dim: int, speeds: tuple[float, ...], width: object
) -> None:
    costs = costs_of(blocks, heads, speeds, dim=dim, micro_batches=5, link_bytes_per_s=width)
    hint = None
    for kind in ("split", "whole", "mixed"):
        report = (found := solve(costs, kind, limits=Limits(seconds=60), hint=hint)).report
        hint = found if hint is None or found.report.objective < hint.report.objective else hint
        assert report.status == "OPTIMAL", (kind, report)
        assert report.gap <= PROVED_WITHIN
        assert report.seconds < 40  # 2 when the machine is quiet


def test_a_hint_is_never_lost() -> None:
    costs = costs_of(12, 6, (4, 3, 2, 1.5), dim=384, micro_batches=5)
    split = solve(costs, "split")
    mixed = solve(costs, "mixed", hint=split, limits=Limits(seconds=0.5))
    assert mixed.report.objective <= split.report.objective


@pytest.mark.parametrize("speeds", [(1.0, 1.0), (2.0, 1.0), (3.0, 2.0, 1.0)])
@pytest.mark.parametrize("kind", ["split", "whole", "mixed"])
def test_the_proxy_is_near_the_simulated_step(kind: str, speeds: tuple[float, ...]) -> None:
    costs = costs_of(12, 6, speeds, dim=384, micro_batches=5)
    found = solve(costs, kind)
    placement = Placement(assign_heads(found.counts_LW, found.classifier), len(speeds), found.classifier)
    seen = simulate(compile_step(placement, uniform_ops(costs.shape, 5, Op.FULL), costs), costs)
    assert found.report.objective == pytest.approx(seen.step_us, rel=0.15)


def test_a_faster_worker_gets_more_heads() -> None:
    placement, _ = propose(costs_of(12, 6, (2.0, 1.0), dim=384), "split")[0]
    fast, slow = counts_of(placement).sum(axis=0)
    assert fast == pytest.approx(2 * slow, rel=0.1)


def test_a_very_slow_worker_may_own_nothing() -> None:
    placement, _ = propose(costs_of(6, 6, (1.0, 1.0, 0.01), dim=384), "auto")[0]
    assert counts_of(placement)[:, 2].sum() == 0


def test_whole_gives_each_worker_one_run_of_blocks() -> None:
    placement, _ = propose(costs_of(12, 6, (1.0, 2.0, 1.0)), "whole")[0]
    teams = [placement.holders(block) for block in range(12)]
    assert all(len(team) == 1 for team in teams)
    assert in_runs(teams)


def test_slow_links_between_nodes_keep_blocks_inside_a_node() -> None:
    placement, _ = propose(costs_of(12, 6, (1.0,) * 4, dim=384, link_bytes_per_s=two_nodes), "auto")[0]
    for block in range(12):
        assert len({worker % 2 for worker in placement.holders(block)}) == 1


def test_one_worker_gets_everything() -> None:
    [(placement, report)] = propose(costs_of(2, 3, (1.0,)))
    assert (placement.owner_LH == 0).all()
    assert report.status == "OPTIMAL"


def test_auto_offers_distinct_candidates_in_order_of_the_proxy() -> None:
    candidates = propose(costs_of(12, 6, (1.0, 2.0)), "auto")
    objectives = [report.objective for _, report in candidates]
    assert len(candidates) >= 2
    assert objectives == sorted(objectives)
    assert len({placement.owner_LH.tobytes() for placement, _ in candidates}) == len(candidates)


def test_the_most_worthy_heads_go_to_the_lead_or_in_turns() -> None:
    counts = np.tile([3, 3], (4, 1))
    worth = np.tile(np.arange(6.0), (4, 1))  # head 5 is worth most
    scores = Scores(worth, worth)
    lead = assign_heads(counts, 1, scores, "lead")
    assert lead.tolist() == [[1, 1, 1, 0, 0, 0]] * 2 + [[0, 0, 0, 1, 1, 1]] * 2  # the classifier's worker leads on top
    even = assign_heads(counts, 1, scores, "even")
    assert sorted(even[0, 4:].tolist()) == [0, 1]
    for owners in (lead, even):
        assert (counts_of(Placement(owners, 2, 1)) == counts).all()


def test_memory_moves_heads_to_where_there_is_room() -> None:
    shape = vit_shape(6, 6, 384)
    roomy = fleet((2.0, 1.0), shape=shape)
    tight = fleet((2.0, 1.0), shape=shape, free_bytes=[60_000_000, 1 << 33])
    step = StepShape(3, 2)
    before, _ = propose(Costs(shape, step, roomy), "split")[0]
    after, _ = propose(Costs(shape, step, tight), "split")[0]
    instance = Instance(Costs(shape, step, tight), ())
    assert counts_of(after)[:, 0].sum() < counts_of(before)[:, 0].sum()
    assert instance.memory_bytes(counts_of(after)[:, 0], after.classifier == 0) <= 60_000_000


@pytest.mark.parametrize("mode", ["auto", "split", "whole"])
def test_too_little_memory_names_the_worker_and_what_it_lacks(mode: str) -> None:
    costs = costs_of(6, 6, (1.0, 1.0), dim=384, free_bytes=[90_000_000, 20_000_000])
    with pytest.raises(
        InfeasibleError, match=r"worker \d needs [\d.]+ GB more \([\d.]+ needed, [\d.]+ free\)"
    ) as caught:
        propose(costs, mode)
    assert caught.value.code == "memory_infeasible"
    assert caught.value.param == "workers"


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(UserError, match="'sideways' is not a placement mode"):
        propose(costs_of(2, 3, (1.0, 1.0)), "sideways")
