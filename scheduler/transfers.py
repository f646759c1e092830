"""First pass of the compiler: which worker computes and which message travels, one micro-batch at a time.

The residual is lazy: x is brought only to the workers that run a head of the next sub-layer that runs at all. There
the partial sums are

    one worker        not exchanged
    two, both go on   swapped: one message each way, one hop
    otherwise         gathered at one of them (the root), which sends x on to whoever runs next

so a sub-layer with P participants costs 2·(P−1) messages at the most. Backward mirrors this with the workers that run
FULL heads. The root is one with FULL heads where there is one, since it keeps the sum that γ's gradient needs; it
rotates with the micro-batch, so that no worker carries all the traffic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scheduler.cost import residual_bytes, tally_bytes, trunk_bytes
from scheduler.domain import SUBLAYERS, IntArray, ModelShape, Op, OpTable, Placement, StepShape
from scheduler.program import EMBED_UNIT, Instruction

Sequences = list[list[Instruction]]  # one list per worker


@dataclass(frozen=True)
class Sublayer:
    """One sub-layer of one micro-batch: who runs which heads there. `full[w]`, `only[w]` are head indices."""

    block: int
    part: str
    full: dict[int, tuple[int, ...]]
    only: dict[int, tuple[int, ...]]
    skipped: tuple[int, ...]

    @property
    def runners(self) -> list[int]:
        return sorted(self.full.keys() | self.only.keys())

    @property
    def trainers(self) -> list[int]:
        return sorted(self.full)


def lower(
    placement: Placement,
    ops_LH: OpTable,
    mb: int,
    *,
    embed_grad: bool = True,
    train: bool = True,
    skip_fill: str = "zero",
) -> Sequences:
    """Instructions of micro-batch `mb` for every worker, in an order that each worker can follow.

    With `train=False` every head that is not SKIP runs FORWARD and no gradient flows: an evaluation. In training a
    micro-batch that every head skips sits out: no instruction at all.
    """
    if train and not ops_LH.any():
        return [[] for _ in range(placement.num_workers)]
    if not train:
        ops_LH = np.minimum(ops_LH, int(Op.FORWARD)).astype(np.int8)
    return _Lowering(placement, ops_LH, mb, embed_grad and train, train, skip_fill).run()


def step_end(placement: Placement, ops_LHM: OpTable, *, embed_grad: bool = True, trunk_grad: bool = True) -> Sequences:
    """The tail of a step for every worker: sum shared trunk gradients, exchange tallies, update.

    Without `trunk_grad` nothing of the blocks' trunks trains.
    """
    out: Sequences = [[] for _ in range(placement.num_workers)]
    touched = touched_units(placement, ops_LHM, embed_grad=embed_grad, trunk_grad=trunk_grad)
    groups: dict[tuple[int, ...], list[int]] = {}
    for unit, holders in touched.items():
        if len(holders) > 1:
            groups.setdefault(holders, []).append(unit)
    for index, (holders, units) in enumerate(sorted(groups.items())):
        _sum_grads(out, holders, tuple(units), holders[index % len(holders)])
    for src in range(placement.num_workers):
        peers = [w for w in range(placement.num_workers) if w != src]
        out[src] += [Instruction("send", "tally", peer=w) for w in peers]
        out[src] += [Instruction("recv", "tally", peer=w) for w in peers]
        out[src].append(Instruction("step"))
    return out


def touched_units(
    placement: Placement, ops_LHM: OpTable, *, embed_grad: bool = True, trunk_grad: bool = True
) -> dict[int, tuple[int, ...]]:
    """Trunk units that get a gradient in this step, with the workers that hold them."""
    units = {EMBED_UNIT: tuple(sorted(placement.embedders))} if embed_grad and ops_LHM.any() else {}
    for block in np.flatnonzero((ops_LHM == Op.FULL).any(axis=(1, 2)) & trunk_grad):
        units[int(block)] = placement.holders(int(block))
    return units


def step_bytes(
    placement: Placement, ops_LHM: OpTable, shape: ModelShape, step: StepShape, embed_grad: bool = True
) -> IntArray:
    """Bytes that one step puts on each link: out[src, dst], exact."""
    sequences = [lower(placement, ops_LHM[:, :, m], m, embed_grad=embed_grad) for m in range(ops_LHM.shape[2])]
    sequences.append(step_end(placement, ops_LHM, embed_grad=embed_grad, trunk_grad=shape.updated_norm_params > 0))
    out = np.zeros((placement.num_workers, placement.num_workers), dtype=np.int64)
    for per_worker in sequences:
        for src, instructions in enumerate(per_worker):
            for instruction in instructions:
                if instruction.kind == "send":
                    out[src, instruction.peer] += message_bytes(instruction, shape, step)
    return out


def message_bytes(instruction: Instruction, shape: ModelShape, step: StepShape) -> int:
    """Size of the message that a send or recv is about."""
    if instruction.cargo == "tally":
        return tally_bytes(step)
    if instruction.units:
        return trunk_bytes(shape, step, instruction.units)
    return residual_bytes(shape, step)


@dataclass
class _Lowering:
    """State of the walk: who holds x (then g) right now."""

    placement: Placement
    ops_LH: OpTable
    mb: int
    embed_grad: bool
    train: bool
    skip_fill: str
    out: Sequences = field(init=False)
    holders: list[int] = field(default_factory=list)
    leads: dict[tuple[int, str], int] = field(default_factory=dict)  # sub-layer → who keeps its sum

    def __post_init__(self) -> None:
        self.out = [[] for _ in range(self.placement.num_workers)]

    def run(self) -> Sequences:
        sublayers = self._sublayers()
        classifier = [self.placement.classifier]
        first = sublayers[0].runners if sublayers else classifier
        trained = [s for s in sublayers if s.full]
        embedders = self._embedders(first)
        unembedder = self._unembedder(embedders, trained)
        for worker in embedders:
            self._emit(worker, Instruction("embed", mb=self.mb, keep=worker == unembedder))
        self.holders = embedders
        floor = trained[0] if trained and not self.embed_grad else None
        for index, sublayer in enumerate(sublayers):
            after = sublayers[index + 1].runners if index + 1 < len(sublayers) else classifier
            self._forward(sublayer, after, floor is sublayer)
        self._bring("x", -1, "classify", classifier)
        goes_down = self.train and (bool(trained) or self.embed_grad)
        self._emit(
            classifier[0], Instruction("classify", mb=self.mb, grad=self.train, floor=self.train and not goes_down)
        )
        if goes_down:
            self._backward_all(list(reversed(trained)), unembedder)
        return self.out

    def _sublayers(self) -> list[Sublayer]:
        found = []
        for block in np.flatnonzero(self.ops_LH.any(axis=1)):
            ops_H, owners_H = self.ops_LH[block], self.placement.owner_LH[block]
            full, only = _by_owner(ops_H == Op.FULL, owners_H), _by_owner(ops_H == Op.FORWARD, owners_H)
            skipped = tuple(int(h) for h in np.flatnonzero(ops_H == Op.SKIP))
            found += [Sublayer(int(block), part, full, only, skipped) for part in SUBLAYERS]
        return found

    def _embedders(self, first: Sequence[int]) -> list[int]:
        able = self.placement.embedders
        both = [w for w in first if w in able]
        return both or [_pick(sorted(able), self.mb)]

    def _unembedder(self, embedders: list[int], trained: list[Sublayer]) -> int | None:
        if not self.embed_grad:
            return None
        near = [w for w in embedders if trained and w in trained[0].full]
        return _pick(near or embedders, self.mb)

    def _forward(self, sublayer: Sublayer, after: Sequence[int], floor: bool) -> None:
        runners = sublayer.runners
        self._bring("x", sublayer.block, sublayer.part, runners)
        place: dict[str, Any] = {"block": sublayer.block, "part": sublayer.part, "mb": self.mb}
        for worker in runners:
            full, only = sublayer.full.get(worker, ()), sublayer.only.get(worker, ())
            flags: dict[str, Any] = {"floor": floor and bool(full), "bias": worker == runners[0]}
            self._emit(
                worker, Instruction("fwd", full=full, only=only, running=self._running(sublayer), **flags, **place)
            )
        root = self._root(runners, sublayer.trainers, after)
        self.leads[sublayer.block, sublayer.part] = root
        self._gather("part", sublayer, runners, after, root)
        of = tuple(runners)
        fill = sublayer.skipped if self.skip_fill == "mean" else ()
        for worker in self.holders:
            lead = worker == root and bool(sublayer.full)
            self._emit(
                worker, Instruction("sum", "x", of=of, fill=fill, running=self._running(sublayer), lead=lead, **place)
            )

    def _backward_all(self, trained: list[Sublayer], unembedder: int | None) -> None:
        self.holders = [self.placement.classifier]
        for index, sublayer in enumerate(trained):
            below = trained[index + 1].trainers if index + 1 < len(trained) else [unembedder]
            floor = index + 1 == len(trained) and unembedder is None
            self._backward(sublayer, [w for w in below if w is not None], floor)
        if unembedder is not None:
            self._bring("g", -1, "embed", [unembedder])
            self._emit(unembedder, Instruction("unembed", mb=self.mb))

    def _backward(self, sublayer: Sublayer, below: Sequence[int], floor: bool) -> None:
        trainers = sublayer.trainers
        self._bring("g", sublayer.block, sublayer.part, trainers)
        place: dict[str, Any] = {"block": sublayer.block, "part": sublayer.part, "mb": self.mb}
        lead = self.leads[sublayer.block, sublayer.part]
        for worker in trainers:
            full = sublayer.full[worker]
            flags: dict[str, Any] = {"lead": worker == lead, "floor": floor, "running": self._running(sublayer)}
            self._emit(worker, Instruction("bwd", full=full, **flags, **place))
        if floor:
            return
        self._gather("gpart", sublayer, trainers, below, self._root(trainers, trainers, below))
        for worker in self.holders:
            self._emit(worker, Instruction("sum", "g", of=tuple(trainers), **place))

    def _running(self, sublayer: Sublayer) -> int:
        """How many heads of the block run, where they are scaled up for those that do not."""
        if self.skip_fill != "rescale" or not sublayer.skipped:
            return 0
        return len(self.placement.owner_LH[sublayer.block]) - len(sublayer.skipped)

    def _root(self, runners: Sequence[int], trainers: Sequence[int], after: Sequence[int]) -> int:
        going_on = set(after)
        best = [w for w in trainers if w in going_on] or list(trainers) or [w for w in runners if w in going_on]
        return _pick(best or list(runners), self.mb)

    def _gather(self, cargo: str, sublayer: Sublayer, runners: list[int], after: Sequence[int], root: int) -> None:
        """Exchange partial sums; afterwards `holders` are the workers that can add them up."""
        swap = len(runners) == 2 and set(runners) <= set(after)
        self.holders = list(runners) if swap else [root]
        pairs = [(a, b) for b in self.holders for a in runners if a != b]
        self._send(cargo, sublayer.block, sublayer.part, pairs)

    def _bring(self, cargo: str, block: int, part: str, wanted: Sequence[int]) -> None:
        """Send x or g to the workers that want it and do not hold it."""
        here = [w for w in self.holders if w in wanted]
        root = _pick(here or self.holders, self.mb)
        self._send(cargo, block, part, [(root, w) for w in wanted if w not in self.holders])
        self.holders = list(wanted)

    def _send(self, cargo: str, block: int, part: str, pairs: list[tuple[int, int]]) -> None:
        mb, out = self.mb, self.out
        for src, dst in pairs:
            out[src].append(Instruction("send", cargo, block, part, mb, dst))
        for src, dst in pairs:
            out[dst].append(Instruction("recv", cargo, block, part, mb, src))

    def _emit(self, worker: int, instruction: Instruction) -> None:
        self.out[worker].append(instruction)


def _sum_grads(out: Sequences, holders: tuple[int, ...], units: tuple[int, ...], root: int) -> None:
    summers = list(holders) if len(holders) == 2 else [root]
    pairs = [(a, b) for b in summers for a in holders if a != b]
    for src, dst in pairs:
        out[src].append(Instruction("send", "gradpart", peer=dst, units=units))
    for src, dst in pairs:
        out[dst].append(Instruction("recv", "gradpart", peer=src, units=units))
    for worker in summers:
        out[worker].append(Instruction("sum", "grads", of=holders, units=units))
    for worker in (w for w in holders if w not in summers):
        out[root].append(Instruction("send", "grads", peer=worker, units=units))
        out[worker].append(Instruction("recv", "grads", peer=root, units=units))


def _by_owner(chosen_H: np.ndarray, owners_H: IntArray) -> dict[int, tuple[int, ...]]:
    heads: dict[int, list[int]] = {}
    for head in np.flatnonzero(chosen_H):
        heads.setdefault(int(owners_H[head]), []).append(int(head))
    return {worker: tuple(found) for worker, found in sorted(heads.items())}


def _pick(workers: Sequence[int], mb: int) -> int:
    return workers[mb % len(workers)]
