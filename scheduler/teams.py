"""Teams: the instance behind placement, and the judge of its objective that knows no solver.

Heads of a block cost the same until their worths differ, so a placement is head counts n[l, w]; the *team* of a block
is the workers with n[l, w] > 0. Per micro-batch, in µs, with M micro-batches of which F are in flight at a time:

    load_w     Σ_l curve_w(n[l, w]), and the embedding and the classifier where w has them
    wire_uv    time that link u→v is taken: 2/P messages per exchange of a team of P (the root rotates), and crossings
    path       Σ_l (slowest member + hops of its exchanges) + crossings: one micro-batch alone
    proxy      max((M−1)·load_w + update_w·Σ_l n[l, w], (M−1)·wire_uv, (M−1)·path / F) + path

That is GPipe's (M−1)·max + Σ, so it counts the bubble of whole blocks; split blocks interleave, so their loads level
out over the blocks; and F micro-batches in flight can hide no more than F − 1 parts of a path spent waiting.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from scheduler.cost import OPTIMISER_BYTES_PER_PARAM, Costs
from scheduler.domain import SUBLAYERS, IntArray

Team = tuple[int, ...]
Link = tuple[int, int]
Pattern = tuple[int, ...]  # heads of each member of a team, in one block
ALL_TEAMS_UP_TO = 4  # workers; above this only teams that follow the links or the speeds
MAX_PATTERNS = 80  # of one team
EXCHANGES = 2 * len(SUBLAYERS)  # of one block in one micro-batch: forward and backward of both sub-layers


@dataclass(frozen=True)
class Instance:
    """What the solver sees, as integers."""

    costs: Costs
    teams: tuple[Team, ...]

    @property
    def num_blocks(self) -> int:
        return self.costs.shape.num_blocks

    @property
    def num_heads(self) -> int:
        return self.costs.shape.num_heads

    @property
    def num_workers(self) -> int:
        return self.costs.num_workers

    @property
    def in_flight(self) -> int:
        """Micro-batches between first forward and last backward, as the compiler admits them."""
        return self.costs.max_in_flight

    @cached_property
    def curve_us(self) -> IntArray:
        """[W, H+1]: forward and backward of k heads in one block, with its four residual updates."""
        return np.array([[self._block_us(w, k) for k in range(self.num_heads + 1)] for w in range(self.num_workers)])

    def _block_us(self, worker: int, heads: int) -> int:
        if heads == 0:
            return 0
        costs = self.costs
        both = (costs.forward_us(worker, part, heads) + costs.backward_us(worker, part, heads) for part in SUBLAYERS)
        return sum(both) + EXCHANGES * costs.sum_us(worker)

    def hop_us(self, src: int, dst: int) -> int:
        """One message of the residual stream, alone."""
        return self.costs.transfer_us(src, dst, self.costs.residual_bytes)

    def taken_us(self, src: int, dst: int) -> int:
        """The time it keeps the link from the next message: its latency overlaps."""
        return self.hop_us(src, dst) - self.costs.transfer_us(src, dst, 0)

    def exchange_us(self, team: Team) -> dict[Link, int]:
        """Link time of one block's exchanges in one micro-batch."""
        pairs = itertools.permutations(team, 2)
        return {(u, v): EXCHANGES * 2 * self.taken_us(u, v) // len(team) for u, v in pairs}

    def exchange_path_us(self, team: Team) -> int:
        """Two swap, one hop per exchange; more gather and spread, two hops."""
        if len(team) == 1:
            return 0
        slowest = max(self.hop_us(u, v) for u, v in itertools.permutations(team, 2))
        return EXCHANGES * (1 if len(team) == 2 else 2) * slowest

    def crossing_links(self, before: Team, after: Team) -> list[Link]:
        """Messages of one boundary between blocks: x comes up to who lacks it, its gradient goes back down."""
        links = []
        for down, up in ((before, after), (after, before)):
            for worker in (w for w in up if w not in down):
                links.append((min(down, key=lambda v, to=worker: (self.hop_us(v, to), v)), worker))  # type: ignore[misc]
        return links

    def crossing_path_us(self, before: Team, after: Team) -> int:
        """Of the messages up, and of those down, the slowest counts."""
        links = self.crossing_links(before, after)
        up = [self.hop_us(u, v) for u, v in links if v in after]
        down = [self.hop_us(u, v) for u, v in links if v not in after]
        return max(up, default=0) + max(down, default=0)

    def patterns(self, team: Team) -> list[Pattern]:
        """Ways to share a block's heads in a team; when there are many, those near shares by speed or by memory."""
        size, heads = len(team), self.num_heads
        if math.comb(heads - 1, size - 1) <= MAX_PATTERNS:
            return _compositions(heads, [range(1, heads + 1)] * size)
        speeds = [heads / max(1, int(self.curve_us[w, heads])) for w in team]
        rooms = [float(max(1, self.costs.profiles[w].free_bytes)) for w in team]
        return sorted(set(self._near(speeds)) | set(self._near(rooms)))

    def _near(self, weights: Sequence[float]) -> list[Pattern]:
        """Patterns whose counts are the shares rounded down or up, and one further where that leaves few enough."""
        heads, found = self.num_heads, list[Pattern]()
        shares = [max(1.0, heads * weight / sum(weights)) for weight in weights]
        for reach in (0, 1):
            ranges = [range(max(1, math.floor(s) - reach), min(heads, math.ceil(s) + reach) + 1) for s in shares]
            wider = _compositions(heads, ranges)
            if found and len(wider) > MAX_PATTERNS:
                break
            found = wider
        return found

    def spelled(self, team: Team, pattern: Pattern) -> Pattern:
        """A team's pattern as counts of all workers."""
        counts = dict(zip(team, pattern, strict=True))
        return tuple(counts.get(w, 0) for w in range(self.num_workers))

    def block_bytes(self, heads: int) -> int:
        """What `heads` heads of one block take: weights, gradients, AdamW, activations of what is in flight."""
        if heads == 0:
            return 0
        shape = self.costs.shape
        params = heads * max(shape.head_params) + shape.norm_params
        kept = sum(self.costs.kept_bytes(part, heads) for part in SUBLAYERS)
        return OPTIMISER_BYTES_PER_PARAM * params + self.in_flight * kept

    def embed_bytes(self) -> int:
        return OPTIMISER_BYTES_PER_PARAM * self.costs.shape.embed_params

    def classifier_bytes(self) -> int:
        return OPTIMISER_BYTES_PER_PARAM * self.costs.shape.classifier_params

    def memory_bytes(self, counts_L: Sequence[int] | IntArray, classifies: bool) -> int:
        """What one worker needs for its counts per block."""
        trunk = self.embed_bytes() * bool(counts_L[0]) + self.classifier_bytes() * classifies
        return sum(self.block_bytes(int(k)) for k in counts_L) + trunk

    def proxy_us(self, counts_LW: IntArray, classifier: int) -> int:
        """The objective of one placement; every constraint but memory is taken as met."""
        teams = [tuple(int(w) for w in np.flatnonzero(row)) for row in counts_LW]
        path = self._path_us(counts_LW, teams, classifier)
        more = self.costs.step.num_micro_batches - 1
        totals = counts_LW.sum(axis=0)
        slowest = [-(-more * path // self.in_flight), more * max(self._wires_us(teams).values(), default=0)]
        for w in range(self.num_workers):
            load = int(self.curve_us[w, counts_LW[:, w]].sum())
            load += self.costs.embed_us(w) * (w in teams[0]) + self.costs.classify_us(w) * (w == classifier)
            slowest.append(more * load + self.costs.update_us(w, int(totals[w])))
        return max(slowest) + path

    def _path_us(self, counts_LW: IntArray, teams: Sequence[Team], classifier: int) -> int:
        path = max(self.costs.embed_us(w) for w in teams[0]) + self.costs.classify_us(classifier)
        for counts, team in zip(counts_LW, teams, strict=True):
            path += max(int(self.curve_us[w, counts[w]]) for w in team) + self.exchange_path_us(team)
        return path + sum(self.crossing_path_us(a, b) for a, b in itertools.pairwise(teams))

    def _wires_us(self, teams: Sequence[Team]) -> dict[Link, int]:
        taken: dict[Link, int] = {}
        for team in teams:
            for link, us in self.exchange_us(team).items():
                taken[link] = taken.get(link, 0) + us
        for before, after in itertools.pairwise(teams):
            for link in self.crossing_links(before, after):
                taken[link] = taken.get(link, 0) + self.taken_us(*link)
        return taken


def teams_of(costs: Costs, kind: str) -> tuple[Team, ...]:
    """The teams that a kind of placement ("split", "whole", "mixed") may use, sorted."""
    workers = range(costs.num_workers)
    singles = {(w,) for w in workers}
    if kind == "whole" or len(workers) == 1:
        return tuple(sorted(singles))
    if len(workers) <= ALL_TEAMS_UP_TO:
        larger = {team for size in workers for team in itertools.combinations(workers, size + 1)}
    else:
        larger = _near_teams(costs) | _fast_teams(costs)
    larger = {team for team in larger if 2 <= len(team) <= costs.shape.num_heads}
    return tuple(sorted(larger if kind == "split" and larger else larger | singles))


def _near_teams(costs: Costs) -> set[Team]:
    """Agglomerate workers over their fastest links: every cluster on the way is a team."""
    size = costs.residual_bytes
    clusters: list[Team] = [(w,) for w in range(costs.num_workers)]
    found: set[Team] = set()
    while len(clusters) > 1:

        def farness(pair: tuple[Team, Team]) -> tuple[int, int, Team]:
            links = [(u, v) for u in pair[0] for v in pair[1]]
            slowest = max(max(costs.transfer_us(u, v, size), costs.transfer_us(v, u, size)) for u, v in links)
            return slowest, len(links), pair[0]

        a, b = min(itertools.combinations(clusters, 2), key=farness)
        clusters = [c for c in clusters if c not in (a, b)] + [tuple(sorted(a + b))]
        found.add(clusters[-1])
    return found


def _fast_teams(costs: Costs) -> set[Team]:
    """The k fastest workers, for every k: the slow ones may be left out."""
    heads = costs.shape.num_heads
    order = sorted(range(costs.num_workers), key=lambda w: (costs.forward_us(w, "mlp", heads), w))
    return {tuple(sorted(order[:k])) for k in range(2, costs.num_workers + 1)}


def _compositions(total: int, ranges: Sequence[range]) -> list[Pattern]:
    """All ways to write `total` as a sum with one term from each range."""
    if len(ranges) == 1:
        return [(total,)] if total in ranges[0] else []
    least = sum(r.start for r in ranges[1:])
    return [
        (first, *rest)
        for first in ranges[0]
        if total - first >= least
        for rest in _compositions(total - first, ranges[1:])
    ]
