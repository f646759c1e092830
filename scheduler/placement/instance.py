"""The placement instance: what the rows of a placement cost, and the judge of its objective that knows no solver.

A *row* says how many heads of one block each worker has FULL and how many FORWARD (without a static part all are FULL).
The *team* of a row is who has heads in it, its *trainers* are who has FULL heads; a *chain* is the teams of a placement
in block order. Per micro-batch, in µs, with M micro-batches of which F are in flight at a time:

    load_w     Σ forward(full) + forward(only) + backward(full), sums and messages; the ends where w has them
    phase_w    largest forward + largest backward load of a member of w's team, or of teams that share members
    wire_uv    time that link u→v is taken: 2/P messages per exchange of P workers (the root rotates), and crossings
    path       Σ over sub-layers (slowest forward + slowest backward + hops of exchanges) + crossings + ends
    proxy      max((M−1−Q)·load_w + Q·phase_w + update_w·FULL heads of w, (M−1)·wire_uv, (M−1)·path / F) + path + tail

That is GPipe's (M−1)·max + Σ, so it counts the bubble of whole blocks; split blocks interleave, so their loads level
out over the blocks. But members of a team go in step: until backward passes mix with forward ones, which takes about
Q = min(M−1, 4) micro-batches, one with much forward and one with much backward work wait for each other in turn. F
micro-batches in flight can hide no more than F − 1 parts of a path spent waiting. The tail is the exchange of the
embedding's gradient.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from scheduler.cost import OPTIMISER_BYTES_PER_PARAM, Costs
from scheduler.domain import SUBLAYERS, IntArray, StaticPart

Team = tuple[int, ...]
Chain = tuple[Team, ...]
Link = tuple[int, int]
MIXED_AFTER = 4  # micro-batches; as simulated: 5 took what separate phases take, 16 hardly more than their loads
WEIGHT_BYTES_PER_PARAM = 4  # a head held FORWARD has no gradient and no moments


@dataclass(frozen=True)
class Row:
    """Heads of one block by worker: FULL and FORWARD."""

    full_W: tuple[int, ...]
    only_W: tuple[int, ...]

    @cached_property
    def team(self) -> Team:
        return tuple(w for w, n in enumerate(zip(self.full_W, self.only_W, strict=True)) if sum(n))

    @cached_property
    def trainers(self) -> Team:
        return tuple(w for w, n in enumerate(self.full_W) if n)

    @cached_property
    def num_full(self) -> int:
        return sum(self.full_W)


@dataclass(frozen=True)
class RowCost:
    """µs per micro-batch of one row: loads of each worker, way of one micro-batch; bytes of each worker."""

    forward_W: tuple[int, ...]
    backward_W: tuple[int, ...]
    path_us: int
    bytes_W: tuple[int, ...]

    @cached_property
    def load_W(self) -> tuple[int, ...]:  # noqa: N802
        return tuple(map(sum, zip(self.forward_W, self.backward_W, strict=True)))


@dataclass(frozen=True)
class Fixed:
    """What a chain costs per micro-batch whatever its rows are; the classifier apart."""

    load_W: tuple[int, ...]
    path_us: int
    wires: dict[Link, int]
    tail_us: int


@dataclass(frozen=True)
class Instance:
    """Costs as the model sees them, integers; `static` says how many heads are FULL and how often heads run."""

    costs: Costs
    static: StaticPart | None = None
    _rows: dict[Row, RowCost] = field(default_factory=dict, compare=False, repr=False)
    _wires: dict[Team, dict[Link, int]] = field(default_factory=dict, compare=False, repr=False)
    _hops: dict[Team, int] = field(default_factory=dict, compare=False, repr=False)
    _fixed: dict[Chain, Fixed] = field(default_factory=dict, compare=False, repr=False)
    quick_bounds: dict[Chain, int] = field(default_factory=dict, compare=False, repr=False)

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
    def num_full(self) -> int:
        """FULL heads over all blocks."""
        return self.num_blocks * self.num_heads if self.static is None else self.static.num_full

    @property
    def more(self) -> int:
        """Micro-batches after the first."""
        return self.costs.step.num_micro_batches - 1

    @property
    def apart(self) -> int:
        """Q: how many of them find forward and backward apart."""
        return min(self.more, MIXED_AFTER)

    @property
    def in_flight(self) -> int:
        """Micro-batches between first forward and last backward, as the compiler admits them."""
        return self.costs.max_in_flight

    @property
    def run_share(self) -> float:
        return 1.0 if self.static is None else self.static.run_share

    @cached_property
    def forward_SWN(self) -> IntArray:  # noqa: N802
        """[2, W, H+1]: µs of one forward call, by sub-layer."""
        return self._curves(self.costs.forward_us)

    @cached_property
    def backward_SWN(self) -> IntArray:  # noqa: N802
        """[2, W, H+1]: µs of one backward call with its residual update, by sub-layer."""
        sums_W = np.array([self.costs.sum_us(w) for w in range(self.num_workers)])
        curves = self._curves(self.costs.backward_us)
        curves[:, :, 1:] += sums_W[None, :, None]
        return curves

    def _curves(self, look_up: object) -> IntArray:
        workers, counts = range(self.num_workers), range(self.num_heads + 1)
        return np.array([[[look_up(w, part, n) for n in counts] for w in workers] for part in SUBLAYERS])  # type: ignore[operator]

    @cached_property
    def forward_WAO(self) -> IntArray:  # noqa: N802
        """[W, H+1, H+1]: µs of the forward calls of `a` FULL and `o` FORWARD heads of one block, with their sums."""
        forward = self.forward_SWN.sum(axis=0)
        sums_W = np.array([len(SUBLAYERS) * self.costs.sum_us(w) for w in range(self.num_workers)])
        out: IntArray = forward[:, :, None] + forward[:, None, :] + sums_W[:, None, None]
        out[:, 0, 0] = 0
        return out

    @cached_property
    def busy_WAO(self) -> IntArray:  # noqa: N802
        """[W, H+1, H+1]: µs that `a` FULL and `o` FORWARD heads of one block keep a worker busy."""
        return self.forward_WAO + self.backward_SWN.sum(axis=0)[:, :, None]

    @cached_property
    def head_us_W(self) -> tuple[list[float], list[float]]:  # noqa: N802
        """Least µs of a FULL head and of a FORWARD head by worker, in calls of the best size."""
        counts_N = np.arange(1, self.num_heads + 1)
        full_W = (self.busy_WAO[:, 1:, 0] / counts_N).min(axis=1)
        only_W = (self.busy_WAO[:, 0, 1:] / counts_N).min(axis=1)
        return np.maximum(full_W, 1e-3).tolist(), only_W.tolist()

    @cached_property
    def bytes_AO(self) -> IntArray:  # noqa: N802
        """[H+1, H+1]: what `a` FULL and `o` FORWARD heads of one block take of a worker's memory."""
        counts = range(self.num_heads + 1)
        return np.array([[block_bytes(self.costs, a, o) for o in counts] for a in counts])

    @cached_property
    def _links(self) -> tuple[list[list[int]], list[list[int]]]:
        """(One message from hand to hand, the time that it takes a link) by sender and receiver: asked very often."""
        workers, costs, size = range(self.num_workers), self.costs, self.costs.residual_bytes
        alone = [[0 if u == v else costs.transfer_us(u, v, size) for v in workers] for u in workers]
        hops = [[alone[u][v] + costs.send_us(u, size) + costs.recv_us(v, size) for v in workers] for u in workers]
        taken = [[0 if u == v else alone[u][v] - costs.transfer_us(u, v, 0) for v in workers] for u in workers]
        return hops, taken

    def hop_us(self, src: int, dst: int) -> int:
        """One message of the residual stream, alone, from hand to hand."""
        return self._links[0][src][dst]

    def taken_us(self, src: int, dst: int) -> int:
        """The time it keeps the link from the next message: its latency overlaps."""
        return self._links[1][src][dst]

    @cached_property
    def handling_WN(self) -> list[list[int]]:  # noqa: N802
        """[W, W+1]: µs of sending and taking out the messages of one exchange among N workers in each sub-layer."""
        size, counts = self.costs.residual_bytes, range(self.num_workers + 1)
        both_W = [self.costs.send_us(w, size) + self.costs.recv_us(w, size) for w in range(self.num_workers)]
        return [[len(SUBLAYERS) * 2 * (n - 1) * both // n if n else 0 for n in counts] for both in both_W]

    def exchange_us(self, team: Team) -> dict[Link, int]:
        """Link time of one exchange in each sub-layer."""
        if team not in self._wires:
            pairs = itertools.permutations(team, 2)
            self._wires[team] = {(u, v): len(SUBLAYERS) * 2 * self.taken_us(u, v) // len(team) for u, v in pairs}
        return self._wires[team]

    def exchange_path_us(self, team: Team) -> int:
        """Hops of one exchange in each sub-layer: two swap, one hop; more gather and spread, two hops."""
        if len(team) <= 1:
            return 0
        if team not in self._hops:
            slowest = max(self.hop_us(u, v) for u, v in itertools.permutations(team, 2))
            self._hops[team] = len(SUBLAYERS) * (1 if len(team) == 2 else 2) * slowest
        return self._hops[team]

    @cached_property
    def _calls_us(self) -> list[tuple[list[list[int]], list[list[int]]]]:
        """By sub-layer the curves as plain numbers, which single look-ups find faster."""
        return list(zip(self.forward_SWN.tolist(), self.backward_SWN.tolist(), strict=True))

    @cached_property
    def _sum_us(self) -> list[int]:
        return [self.costs.sum_us(w) for w in range(self.num_workers)]

    @cached_property
    def _sizes(self) -> list[list[int]]:
        sizes: list[list[int]] = self.bytes_AO.tolist()
        return sizes

    def cost(self, row: Row) -> RowCost:
        """What one block of this row costs."""
        if row not in self._rows:
            self._rows[row] = self._cost(row)
        return self._rows[row]

    def _cost(self, row: Row) -> RowCost:
        team, trainers, share = row.team, row.trainers, self.run_share
        forward_W, backward_W = [0] * self.num_workers, [0] * self.num_workers
        path = self.exchange_path_us(team) + self.exchange_path_us(trainers)
        for forward_WN, backward_WN in self._calls_us:
            calls = [forward_WN[w][row.full_W[w]] + forward_WN[w][row.only_W[w]] + self._sum_us[w] for w in team]
            backs = [backward_WN[w][row.full_W[w]] for w in trainers]
            path += max(calls) + max(backs, default=0)
            for w, us in zip(team, calls, strict=True):
                forward_W[w] += us
            for w, us in zip(trainers, backs, strict=True):
                backward_W[w] += us
        for part, members in ((forward_W, team), (backward_W, trainers)):
            for w in members:
                part[w] += self.handling_WN[w][len(members)]
        bytes_W = [self._sizes[a][o] for a, o in zip(row.full_W, row.only_W, strict=True)]
        return RowCost(
            tuple(round(us * share) for us in forward_W),
            tuple(round(us * share) for us in backward_W),
            round(path * share),
            tuple(bytes_W),
        )

    def wires_us(self, row: Row, links: Sequence[Link]) -> list[int]:
        """Time that the row's exchanges take of each of these links."""
        forward, backward = self.exchange_us(row.team), self.exchange_us(row.trainers)
        return [round((forward.get(link, 0) + backward.get(link, 0)) * self.run_share) for link in links]

    def binding_links(self, groups: Iterable[Team], crossed: Mapping[Link, int]) -> list[Link]:
        """The links of workers who exchange in `groups` that may be the busiest; `crossed` is what links carry besides.

        Another link never is where one that takes as long for a message is in all its groups, and is crossed as much.
        """
        inside: dict[Link, int] = dict.fromkeys(crossed, 0)
        for bit, group in enumerate(dict.fromkeys(groups)):
            for link in itertools.permutations(group, 2):
                inside[link] = inside.get(link, 0) | 1 << bit
        heavy = sorted(inside, key=lambda k: (-self.taken_us(*k), -crossed.get(k, 0), -inside[k].bit_count(), k))
        kept: list[Link] = []
        for link in heavy:
            wanted, load = inside[link], crossed.get(link, 0)
            if not any(inside[k] & wanted == wanted and crossed.get(k, 0) >= load for k in kept):
                kept.append(link)
        return sorted(kept)

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

    def fixed(self, chain: Chain) -> Fixed:
        """Embedding and crossings of a chain."""
        if chain not in self._fixed:
            self._fixed[chain] = self._fixed_of(chain)
        return self._fixed[chain]

    def _fixed_of(self, chain: Chain) -> Fixed:
        load_W, wires, path = [0] * self.num_workers, dict[Link, int](), 0
        size = self.costs.residual_bytes
        for w in chain[0]:
            load_W[w] += self.costs.embed_us(w)
        for before, after in itertools.pairwise(chain):
            path += self.crossing_path_us(before, after)
            for u, v in self.crossing_links(before, after):
                wires[u, v] = wires.get((u, v), 0) + self.taken_us(u, v)
                load_W[u] += self.costs.send_us(u, size)
                load_W[v] += self.costs.recv_us(v, size)
        path += max(self.costs.embed_us(w) for w in chain[0])
        return Fixed(tuple(load_W), path, wires, self._tail_us(chain[0]))

    def _tail_us(self, team: Team) -> int:
        if len(team) == 1:
            return 0
        size = self.costs.step.itemsize * self.costs.shape.embed_params
        slowest = max(self.costs.transfer_us(u, v, size) for u, v in itertools.permutations(team, 2))
        return (1 if len(team) == 2 else 2) * slowest

    def trunk_bytes(self, embeds: bool, classifies: bool) -> int:
        shape = self.costs.shape
        return OPTIMISER_BYTES_PER_PARAM * (shape.embed_params * embeds + shape.classifier_params * classifies)

    def fixed_bytes(self, embeds: bool) -> int:
        """What a worker with heads needs whatever they are: the embedding's, and a half's forward pass run again."""
        rerun = max(self.costs.rerun_bytes(part, self.num_heads) for part in SUBLAYERS)
        return self.trunk_bytes(embeds, False) + rerun

    def memory_bytes(self, rows: Sequence[Row], classifier: int) -> list[int]:
        """What each worker needs."""
        first, members = rows[0].team, {w for row in rows for w in row.team}
        trunk = [self.trunk_bytes(False, w == classifier) for w in range(self.num_workers)]
        trunk = [own + self.fixed_bytes(w in first) * (w in members) for w, own in enumerate(trunk)]
        costs = [self.cost(row).bytes_W for row in rows]
        return [own + sum(bytes_W[w] for bytes_W in costs) for w, own in enumerate(trunk)]

    def proxy_us(self, rows: Sequence[Row], classifier: int) -> int:
        """The objective of one placement; every constraint is taken as met."""
        chain = chain_of(rows)
        fixed, costs = self.fixed(chain), [self.cost(row) for row in rows]
        path = fixed.path_us + sum(cost.path_us for cost in costs) + self.costs.classify_us(classifier)
        links = self.binding_links((group for row in rows for group in (row.team, row.trainers)), fixed.wires)
        taken = map(sum, zip(*(self.wires_us(row, links) for row in rows), strict=True))
        wires = [fixed.wires.get(link, 0) + us for link, us in zip(links, taken, strict=True)]
        slowest = [-(-self.more * path // self.in_flight), self.more * max(wires, default=0)]
        phase_W = self._phase_W(rows)
        for w in range(self.num_workers):
            ends = fixed.load_W[w] + self.costs.classify_us(w) * (w == classifier)
            load = (self.more - self.apart) * sum(cost.load_W[w] for cost in costs) + self.apart * phase_W[w]
            slowest.append(load + self.more * ends + self.costs.update_us(w, sum(row.full_W[w] for row in rows)))
        return max(slowest) + path + fixed.tail_us

    def _phase_W(self, rows: Sequence[Row]) -> list[int]:  # noqa: N802
        out = [0] * self.num_workers
        for teams in linked(chain_of(rows)):
            costs = [self.cost(row) for row in rows if row.team in teams]
            members = sorted({w for team in teams for w in team})
            forward = max(sum(cost.forward_W[w] for cost in costs) for w in members)
            backward = max(sum(cost.backward_W[w] for cost in costs) for w in members)
            for w in members:
                out[w] += forward + backward
        return out


def chain_of(rows: Sequence[Row]) -> Chain:
    """The teams of consecutive blocks, each run once."""
    return tuple(team for team, _ in itertools.groupby(row.team for row in rows))


def linked(chain: Chain) -> list[list[Team]]:
    """The teams in groups: those that share members, at one remove or more, go in step."""
    groups: list[list[Team]] = []
    for team in dict.fromkeys(chain):
        near = [group for group in groups if any(set(team) & set(other) for other in group)]
        groups = [group for group in groups if group not in near] + [[team, *(t for group in near for t in group)]]
    return groups


def block_bytes(costs: Costs, num_full: int, num_only: int) -> int:
    """Memory of one worker's heads of one block.

    A FULL head has weights, gradients, AdamW's moments and the activations of what is in flight, a FORWARD head has
    weights.
    """
    if num_full + num_only == 0:
        return 0
    shape, head, updated = costs.shape, max(costs.shape.head_params), max(costs.shape.updated_head_params)
    trained = num_full * updated + (shape.updated_norm_params if num_full else 0)
    held = (num_full + num_only) * head + shape.norm_params - trained
    kept = sum(costs.kept_bytes(part, num_full) for part in SUBLAYERS) if num_full else 0
    return OPTIMISER_BYTES_PER_PARAM * trained + WEIGHT_BYTES_PER_PARAM * held + costs.max_in_flight * kept
