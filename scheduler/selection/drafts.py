"""Drafts: cycles with held FULL heads drawn from the linear program's means, measured, and drawn again leaner."""

from __future__ import annotations

import numpy as np

from scheduler.domain import BoolArray, FloatArray, IntArray, Op, OpTable, Scores
from scheduler.errors import InfeasibleError
from scheduler.selection.bound import Means, MeansProgram
from scheduler.selection.draws import evenly, feed, shortest
from scheduler.selection.menus import Menus
from scheduler.selection.meter import Meter
from scheduler.selection.strategies import Strategy
from scheduler.selection.words import PERIOD, SelectionRequest, Unit, groups_of, worth_fraction

TOGETHER = (0.5, 1.0)  # how many blocks follow one order of micro-batches
LEANER = (1.0, 0.97, 0.93, 0.88, 0.8, 0.7, 0.55, 0.4)  # of the bytes, as the linear program is told
LEAST_FULL = (1.0, 2.0, 4.0)  # heads trained by every micro-batch in the means: more where drafts starve some
ENOUGH = 3  # drafts that fit, of growing leanness, before the search ends
FITTING = 6  # rounds of fitting the FULL heads to the bytes
MESSAGES = 4  # of one more participant of a block in backward


class Drafts:
    """The search for one request."""

    def __init__(
        self,
        request: SelectionRequest,
        strategy: Strategy,
        meter: Meter,
        scores: Scores,
        caps_W: FloatArray,
        given_LH: BoolArray | None = None,
    ) -> None:
        self.request, self.strategy, self.meter, self.caps_W = request, strategy, meter, caps_W
        self.given_LH = given_LH
        self.seen = strategy.sees(request, scores)
        self.units = request.units(meter.placement)
        self.groups = groups_of(meter.placement)
        self.limit = request.max_bytes * meter.all_full_bytes
        self.budget = meter.head_flops(request.compute or 1.0)

    def best(self) -> tuple[tuple[OpTable, ...], str] | None:
        """The draft worth most by what the strategy sees, that keeps the budgets; None where none does."""
        searches = (self._best_with(least_full) for least_full in LEAST_FULL)
        return next((found for found in searches if found is not None), None)

    def _best_with(self, least_full: float) -> tuple[tuple[OpTable, ...], str] | None:
        program = MeansProgram(self.meter, self.seen, self.units, self.budget, self.caps_W, least_full)
        found, worth, note, fitting, tried = None, -1.0, "", 0, 0
        for share in LEANER if self.request.max_bytes < 1 else LEANER[:1]:
            means = program.solve(share * self.limit)
            if means is None or means.worth <= worth or fitting >= ENOUGH:
                break
            fits = False
            for follow in TOGETHER if self.request.max_bytes < 1 else TOGETHER[:1]:
                tried += 1
                cycle = self._draft(means, follow)
                if cycle is None:
                    continue
                fits, seen = True, worth_fraction(cycle, self.seen)
                if seen > worth:
                    found, worth, note = cycle, seen, f"means at {share:g} of the bytes, {follow:g} of blocks aligned"
            fitting += fits
        return None if found is None else (found, f"{note}; {tried} drafts")

    def _draft(self, means: Means, follow: float) -> tuple[OpTable, ...] | None:
        """A cycle within the budgets whose units run as often as the means say."""
        rests_TUM = self._rests(means.runs_U, follow)
        base = [self._table(rests_UM) for rests_UM in rests_TUM]
        forward_bytes = self.meter.quick_bytes(base)
        if forward_bytes > self.limit:
            return None
        spare = (self.limit - forward_bytes) * len(base)
        allowed = spare
        best = None
        for _ in range(FITTING):
            full_LH = self._fitting(base)
            if full_LH is None:
                menus, order_G = self._menus(rests_TUM, means, allowed)
                full_LH = self._full(self.strategy.pick(menus).choice_G, order_G)
            cycle = self._filled(base, full_LH)
            if cycle is None:
                return best
            sent = (self.meter.quick_bytes(cycle) - forward_bytes) * len(base)
            if sent <= spare:
                if best is None or worth_fraction(cycle, self.seen) > worth_fraction(best, self.seen):
                    best = cycle
                if self.request.max_bytes >= 1 or sent >= 0.97 * spare or allowed > 2 * spare:
                    break
                allowed += 0.8 * (spare - sent)
            else:
                if best is not None:
                    break
                allowed -= max(1.05 * (sent - spare), 0.02 * spare)
                if allowed < 0:
                    break
        request = self.request
        if best is None or not self.meter.keeps(best, request.compute or 1.0, request.max_bytes):
            return None
        return evenly(best, self.meter.flops_of(best))

    def _rests(self, runs_U: FloatArray, follow: float) -> list[np.ndarray]:
        """[U, M] for every table: the micro-batches that units sit out.

        A worker sits out micro-batches in an order of its own, shifted against the other workers' so that they sit out
        different ones; its units take the first of them, as many as each sits out, so they overlap. Blocks that do not
        follow have an order of their own.
        """
        micro_batches, rng = self.meter.num_micro_batches, np.random.default_rng((*self.request.key, 3))
        skips_U = (1 - runs_U) * micro_batches
        tables = PERIOD if (skips_U > 1e-6).any() else 1
        steps_U = np.minimum(np.ceil(skips_U * tables - 1e-6), tables * micro_batches)
        worker_U, block_U = (np.array([getattr(u, name) for u in self.units]) for name in ("worker", "block"))
        weight = np.array([len(u.heads) for u in self.units])
        by_worker = np.bincount(worker_U, weights=weight * skips_U, minlength=self.meter.placement.num_workers)
        owned_W = np.maximum(np.bincount(worker_U, weights=weight, minlength=len(by_worker)), 1)
        shift_W = np.concatenate([[0], np.cumsum(np.ceil(by_worker / owned_W - 0.01))[:-1]]).astype(int)
        phase_U = np.arange(len(self.units)) / max(1, len(self.units))
        tables_found = []
        for table in range(tables):
            ends = [np.floor(steps_U / tables * (table + extra) + phase_U + 1e-9) for extra in (0, 1)]
            count_U = np.minimum(ends[1] - ends[0], micro_batches).astype(int)
            common = rng.permutation(micro_batches)
            own = [
                common if rng.random() < follow else rng.permutation(micro_batches) for _ in range(block_U.max() + 1)
            ]
            rests_UM = np.zeros((len(self.units), micro_batches), dtype=np.bool_)
            for index, (worker, block) in enumerate(zip(worker_U, block_U, strict=True)):
                order = np.roll(own[block], -shift_W[worker])
                if not self.request.coherent:
                    order = rng.permutation(micro_batches)
                rests_UM[index, order[: count_U[index]]] = True
            tables_found.append(rests_UM)
        return tables_found

    def _table(self, rests_UM: np.ndarray) -> OpTable:
        ops_LHM = np.full((*self.meter.placement.owner_LH.shape, rests_UM.shape[1]), int(Op.FORWARD), dtype=np.int8)
        for unit, rests_M in zip(self.units, rests_UM, strict=True):
            ops_LHM[unit.block, list(unit.heads)] = np.where(rests_M, int(Op.SKIP), int(Op.FORWARD))
        return ops_LHM

    def _menus(self, rests_TUM: list[np.ndarray], means: Means, allowed: float) -> tuple[Menus, list[list[int]]]:
        """How many FULL heads for each (worker, block): worth, FLOPs and bytes over the cycle; heads by worth."""
        meter, groups = self.meter, self.groups
        runs_LH = np.zeros(meter.placement.owner_LH.shape, dtype=np.int64)
        for index, unit in enumerate(self.units):
            runs_LH[unit.block, list(unit.heads)] = sum(int((~rests_UM[index]).sum()) for rests_UM in rests_TUM)
        widest = max(len(group.heads) for group in groups)
        worth_GK = np.full((len(groups), widest + 1), -np.inf)
        cost_GK, sent_GK = (np.zeros(worth_GK.shape, dtype=np.int64) for _ in range(2))
        gain_LH = runs_LH * self.seen.backward_LH
        order_G = []
        for index, group in enumerate(groups):
            heads = sorted(group.heads, key=lambda h, b=group.block: (-gain_LH[b, h], h))  # type: ignore[misc]
            order_G.append(heads)
            worth_GK[index, : len(heads) + 1] = [0.0, *np.cumsum(gain_LH[group.block, heads])]
            work = meter.backward_weight * runs_LH[group.block, heads] * meter.forward_LH[group.block, heads]
            cost_GK[index, 1 : len(heads) + 1] = np.cumsum(work)
            if not self._is_base(group, means):
                sent_GK[index, 1:] = MESSAGES * meter.costs.residual_bytes * runs_LH[group.block, heads].max()
        forward_W = np.bincount(
            meter.placement.owner_LH.ravel(),
            weights=(runs_LH * meter.forward_LH).ravel(),
            minlength=meter.placement.num_workers,
        )
        budget_W = np.floor(self.caps_W * len(rests_TUM) * (1 + 1e-12) - forward_W)
        trains_GK = np.minimum(np.arange(widest + 1), [[len(g.heads)] for g in groups])
        menus = Menus(
            np.array([g.worker for g in groups]),
            np.zeros_like(worth_GK),
            worth_GK,
            cost_GK,
            sent_GK,
            trains_GK,
            trains_GK,
            np.maximum(budget_W, 0).astype(np.int64),
            max(0.0, allowed) if self.request.max_bytes < 1 else np.inf,
            full_share=1.0,
        )
        return menus, order_G

    def _is_base(self, group: Unit, means: Means) -> bool:
        """Whether it is the group of its block that trains anyway: the one that the means train most."""
        trained = means.full_LH[group.block] * (1e-6 + self.seen.backward_LH[group.block])
        owners = self.meter.placement.owner_LH[group.block]
        by_worker = np.bincount(owners, weights=trained + 1e-12, minlength=self.meter.placement.num_workers)
        return int(np.argmax(by_worker)) == group.worker

    def _fitting(self, base: list[OpTable]) -> BoolArray | None:
        """The given FULL heads, if they spend the compute budget, and every worker its part of it, but for one head.

        The placement knows better than FLOPs do what a worker's calls take; of bytes it knows nothing.
        """
        meter, full_LH = self.meter, self.given_LH
        if full_LH is None or full_LH.shape != meter.placement.owner_LH.shape or self.request.max_bytes < 1:
            return None
        runs_LH = np.stack([(ops > 0).sum(axis=2) for ops in base]).mean(axis=0)
        spent_LH = runs_LH * meter.forward_LH * np.where(full_LH, 1 + meter.backward_weight, 1)
        owners = meter.placement.owner_LH.ravel()
        spent_W = np.bincount(owners, weights=spent_LH.ravel(), minlength=meter.placement.num_workers)
        one_head = meter.backward_weight * meter.num_micro_batches * int(meter.forward_LH.max())
        spends = self.budget - one_head <= spent_W.sum() <= self.budget
        return full_LH if spends and (spent_W <= self.caps_W + one_head).all() else None

    def _full(self, choice_G: IntArray, order_G: list[list[int]]) -> np.ndarray:
        full_LH = np.zeros(self.meter.placement.owner_LH.shape, dtype=np.bool_)
        for group, heads, count in zip(self.groups, order_G, choice_G.tolist(), strict=True):
            full_LH[group.block, heads[:count]] = True
        return full_LH

    def _filled(self, base: list[OpTable], full_LH: np.ndarray) -> tuple[OpTable, ...] | None:
        """The cycle with these FULL heads, and one more for part of the runs: what the budget has left."""
        cycle = [np.where(full_LH[:, :, None] & (ops > 0), int(Op.FULL), ops).astype(np.int8) for ops in base]
        left = self.budget * len(cycle) - sum(self.meter.flops(ops) - self.meter.trunk_flops for ops in cycle)
        swing = self._swing(full_LH)
        if swing is not None:
            runs = int(max(0.0, left) / (self.meter.backward_weight * int(self.meter.forward_LH[swing])) + 1e-9)
            for index, ops in enumerate(cycle):
                able = np.flatnonzero(ops[swing] == Op.FORWARD)[: runs // (len(cycle) - index)]
                ops[swing][able] = int(Op.FULL)
                runs -= len(able)
        try:
            return shortest([feed(ops, self.units) for ops in cycle])
        except InfeasibleError:
            return None

    def _swing(self, full_LH: np.ndarray) -> tuple[int, int] | None:
        """The most worthy head left where its worker trains anyway."""
        owner_LH = self.meter.placement.owner_LH
        busy = np.array([[full_LH[b][row == w].any() for w in row] for b, row in enumerate(owner_LH)])
        able = busy & ~full_LH
        if not able.any():
            able = ~full_LH
        if not able.any():
            return None
        rank = np.where(able, self.seen.backward_LH, -np.inf)
        block, head = np.unravel_index(int(np.argmax(rank)), rank.shape)
        return int(block), int(head)
