"""Chains: which sequences of teams a kind of placement may use, and a quick bound for each.

| kind | chains |
|---|---|
| split | one team of at least two workers |
| whole | teams of one worker each |
| mixed | workers agglomerated over their fastest links into a few teams; each level of that tree is one chain |
| | in small fleets also a team with slow workers in some blocks and without them in the others |

Of every kind the k fastest workers are tried for each k: the slow ones may be left out. Up to three workers all chains
are tried. The order of a chain is the one with the shortest crossings; where worth differs by block, also by speed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from scheduler.placement.instance import Chain, Instance, Link, Team

ALL_CHAINS_UP_TO = 3  # workers
NESTED_UP_TO = 4  # workers
EXACT_ORDER_UP_TO = 6  # teams; longer chains are ordered greedily
ROUNDED_DOWN = 1 - 1e-9  # keeps a bound in floating point below the number meant
KINDS = ("split", "whole", "mixed")


def chains_of(instance: Instance, kind: str) -> list[Chain]:
    """The chains of a kind, the one with the least quick bound first."""
    if instance.num_workers <= ALL_CHAINS_UP_TO:
        found = set(_all_chains(instance, kind))
    else:
        found = set(_near_chains(instance, kind))
    if kind == "mixed":
        found |= set(_nested_chains(instance))
    fits = (chain for chain in found if _fits(instance, chain))
    return sorted(fits, key=lambda chain: (quick_bound_us(instance, chain), chain))


def trainers_of(instance: Instance, team: Team) -> list[Team]:
    """Who of a team may have the FULL heads of a block."""
    if instance.static is None:
        return [team]
    order = by_speed(instance, team)
    found = {(), team, *(tuple(sorted(order[:k])) for k in range(1, len(team)))}
    if len(team) <= ALL_CHAINS_UP_TO:
        found |= {subset for k in range(len(team)) for subset in itertools.combinations(team, k)}
    elif len(team) < instance.num_workers:
        found |= {(w,) for w in team}
    return sorted(found)


def binding_links(instance: Instance, chain: Chain) -> list[Link]:
    """The links that may be the busiest under some placement of the chain; alike ones stand for each other."""
    groups = [group for team in dict.fromkeys(chain) for group in (team, *trainers_of(instance, team))]
    return instance.binding_links(groups, instance.fixed(chain).wires)


def by_speed(instance: Instance, workers: Iterable[int]) -> list[int]:
    """Fastest first."""
    busy = instance.busy_WAO
    return sorted(workers, key=lambda w: (int(busy[w, instance.num_heads, 0]), w))


def quick_bound_us(instance: Instance, chain: Chain) -> int:
    """No placement of this chain has a smaller proxy: its work is divisible, its teams balanced."""
    if chain not in instance.quick_bounds:
        instance.quick_bounds[chain] = _quick_bound_us(instance, chain)
    return instance.quick_bounds[chain]


def _quick_bound_us(instance: Instance, chain: Chain) -> int:
    fixed, workers = instance.fixed(chain), sorted({w for team in chain for w in team})
    share, more = instance.run_share, instance.more
    full_us, only_us = instance.head_us_W
    head_us = {w: full_us[w] for w in workers}
    part = min(1.0, *(only_us[w] / full_us[w] for w in workers))
    work = instance.num_full + part * (instance.num_blocks * instance.num_heads - instance.num_full)
    speed = sum(1 / us for us in head_us.values())
    load = (share * work + sum(fixed.load_W[w] / us for w, us in head_us.items())) / speed
    fastest = max(sum(1 / head_us[w] for w in team) for team in chain)
    hops = min(map(instance.exchange_path_us, chain)) * (2 if instance.static is None else 1)
    path = fixed.path_us + share * (work / fastest + instance.num_blocks * hops)
    path += min(instance.costs.classify_us(w) for w in chain[-1])
    wires = 0
    if len(chain) == 1:
        both = 2 if instance.static is None else 1
        wires = max(instance.exchange_us(chain[0]).values(), default=0) * both * instance.num_blocks
    slowest = max(more * load, more * path / instance.in_flight, more * share * wires)
    rounding = instance.num_blocks + 1
    return int((slowest + path) * ROUNDED_DOWN) + fixed.tail_us - rounding * (more + 2)


def _fits(instance: Instance, chain: Chain) -> bool:
    return len(chain) <= instance.num_blocks and all(len(team) <= instance.num_heads for team in chain)


def _is(kind: str, chain: Chain) -> bool:
    sizes = [len(team) for team in chain]
    if kind == "split":
        return len(chain) == 1 and sizes[0] > 1
    return max(sizes) == 1 if kind == "whole" else len(chain) > 1 and max(sizes) > 1


def _all_chains(instance: Instance, kind: str) -> Iterable[Chain]:
    """Every sequence of disjoint teams."""
    for count in range(1, instance.num_workers + 1):
        for order in itertools.permutations(range(instance.num_workers), count):
            for cuts in itertools.product((False, True), repeat=count - 1):
                chain = _cut(order, cuts)
                if all(list(team) == sorted(team) for team in chain) and _is(kind, chain):
                    yield chain


def _cut(order: Sequence[int], cuts: Sequence[bool]) -> Chain:
    teams = [[order[0]]]
    for worker, cut in zip(order[1:], cuts, strict=True):
        if cut:
            teams.append([])
        teams[-1].append(worker)
    return tuple(map(tuple, teams))


def _near_chains(instance: Instance, kind: str) -> Iterable[Chain]:
    order = by_speed(instance, range(instance.num_workers))
    for count in range(1, instance.num_workers + 1):
        for level in _levels(instance, order[:count]):
            if kind == "split":
                yield from ((team,) for team in level if len(team) > 1)
            elif _is(kind, level):
                yield from _orders(instance, level)


def _nested_chains(instance: Instance) -> Iterable[Chain]:
    """All workers in some blocks, the fastest ones alone in the others: a slow one is too slow for a head of each."""
    if instance.static is None and instance.num_workers <= NESTED_UP_TO:
        order = by_speed(instance, range(instance.num_workers))
        for count in range(3, instance.num_workers + 1):
            for inner in range(2, count):
                yield tuple(sorted(order[:count])), tuple(sorted(order[:inner]))


def _levels(instance: Instance, workers: Iterable[int]) -> list[Chain]:
    """Agglomerate workers over their fastest links, from single workers to one team."""
    clusters: list[Team] = sorted((w,) for w in workers)
    levels = [tuple(clusters)]
    while len(clusters) > 1:

        def farness(pair: tuple[Team, Team]) -> tuple[int, int, Team]:
            links = [(u, v) for u in pair[0] for v in pair[1]]
            slowest = max(max(instance.hop_us(u, v), instance.hop_us(v, u)) for u, v in links)
            return slowest, len(links), pair[0]

        a, b = min(itertools.combinations(clusters, 2), key=farness)
        clusters = sorted([*(c for c in clusters if c not in (a, b)), tuple(sorted(a + b))])
        levels.append(tuple(clusters))
    return levels


def _orders(instance: Instance, teams: Chain) -> Iterable[Chain]:
    shortest = _shortest(instance, teams)
    yield shortest
    if instance.static is not None:
        speeds = {team: sum(1 / max(1, int(instance.busy_WAO[w, 1, 0])) for w in team) for team in teams}
        rising = sorted(teams, key=lambda team: (speeds[team], team))
        yield shortest[::-1]
        if _way_us(instance, rising) <= _way_us(instance, shortest) * 1.1:
            yield tuple(rising)
            yield tuple(rising[::-1])


def _way_us(instance: Instance, chain: Sequence[Team]) -> int:
    return sum(instance.crossing_path_us(a, b) for a, b in itertools.pairwise(chain))


def _shortest(instance: Instance, teams: Chain) -> Chain:
    """The order with the shortest crossings: exact by subsets for few teams, else the best greedy walk."""
    way = {pair: instance.crossing_path_us(*pair) for pair in itertools.permutations(teams, 2)}
    if len(set(way.values())) == 1:
        return teams
    if len(teams) > EXACT_ORDER_UP_TO:
        walks = [_walk(way, teams, start) for start in teams]
        return min(walks, key=lambda walk: (sum(way[pair] for pair in itertools.pairwise(walk)), walk))
    ends: dict[tuple[frozenset[Team], Team], tuple[int, Chain]] = {(frozenset([t]), t): (0, (t,)) for t in teams}
    for _ in teams[1:]:
        longer: dict[tuple[frozenset[Team], Team], tuple[int, Chain]] = {}
        for (seen, last), (us, chain) in ends.items():
            for team in (t for t in teams if t not in seen):
                key, walk = (seen | {team}, team), (us + way[last, team], (*chain, team))
                longer[key] = min(longer.get(key, walk), walk)
        ends = longer
    return min(ends.values())[1]


def _walk(way: dict[tuple[Team, Team], int], teams: Chain, start: Team) -> Chain:
    chain, left = [start], [team for team in teams if team != start]
    while left:
        chain.append(min(left, key=lambda team: (way[chain[-1], team], team)))
        left.remove(chain[-1])
    return tuple(chain)
