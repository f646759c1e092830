"""Tables: budgets without held heads (a knapsack for each step's micro-batches), or with all held (one table)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from scheduler.domain import FloatArray, IntArray, OpTable, Scores
from scheduler.errors import InfeasibleError
from scheduler.selection.draws import feed
from scheduler.selection.menus import Menus, best_ops, scattered_menus
from scheduler.selection.meter import Meter
from scheduler.selection.strategies import Strategy
from scheduler.selection.turns import MUST, Turns
from scheduler.selection.words import FORWARD_WEIGHT, PERIOD, SelectionRequest, groups_of

NEAR = 0.98  # of the bytes: used up
MESSAGES = 4  # of one more participant of a block, each way
FITTING = 10  # rounds of fitting the knapsack's bytes to the measured ones


class Tables:
    """The search for one request."""

    def __init__(
        self, request: SelectionRequest, strategy: Strategy, meter: Meter, scores: Scores, caps_W: FloatArray
    ) -> None:
        self.request, self.strategy, self.meter, self.caps_W = request, strategy, meter, caps_W
        self.scores = strategy.sees(request, scores)
        self.units = request.units(meter.placement)
        self.groups = groups_of(meter.placement)
        self.columns = 1 if request.hold == "all" else meter.num_micro_batches  # micro-batches chosen for apart

    def best(self) -> tuple[tuple[OpTable, ...], str] | None:
        """Tables that keep the budgets one by one and so in every part of the cycle; None where one cannot."""
        known = self.scores.backward_TLHM is not None
        tables = 1 if self.columns == 1 else len(self.scores.backward_TLHM) if known else PERIOD  # type: ignore[arg-type]
        turns = Turns(self.request, self.meter.placement, self.scores, self.units)
        carried_W, cycle = np.zeros_like(self.caps_W), []
        limit = self.request.max_bytes * self.meter.all_full_bytes
        for table in range(tables):
            backward_LHM = self.scores.backward_LH[:, :, None]
            if self.columns > 1:
                backward_LHM = turns.backward(table, self.columns)
                backward_LHM = backward_LHM + turns.due(table, backward_LHM)
            backward_LHM = backward_LHM + self._feeding(backward_LHM)
            carried_W = carried_W + self.caps_W
            ops_LHM = self._table(backward_LHM, carried_W, limit)
            if ops_LHM is None:
                return None
            turns.note(ops_LHM)
            carried_W = np.maximum(0.0, carried_W - self._spent(ops_LHM))
            cycle.append(ops_LHM)
        return tuple(cycle), f"{tables} tables" + (" by worth of their micro-batches" if known else "")

    def _feeding(self, backward_LHM: FloatArray) -> FloatArray:
        """A worth beyond all others, for every micro-batch, of the unit that is worth most to it: none may starve."""
        means_UM = np.array([backward_LHM[u.block, list(u.heads)].mean(axis=0) for u in self.units])
        feeding_LHM = np.zeros_like(backward_LHM)
        for m, index in enumerate(np.argmax(means_UM, axis=0).tolist()):
            unit = self.units[index]
            feeding_LHM[unit.block, list(unit.heads), m] = MUST * float(backward_LHM.max())
        return feeding_LHM

    def _table(self, backward_LHM: FloatArray, budget_W: FloatArray, limit: float) -> OpTable | None:
        """The knapsack's answer, with other bytes allowed until the measured ones just fit."""
        budgeted = self.request.max_bytes < 1
        full = self._menus(backward_LHM, budget_W, np.inf)
        low, high, allowed = 0.0, float(full.bytes_GK.max(axis=1).sum()), limit
        best, worth = None, -np.inf
        for _ in range(FITTING if budgeted else 1):
            menus = replace(full, max_bytes=allowed) if budgeted else full
            picked = self.strategy.pick(menus)
            ops_LHM = self._fed(picked.choice_G, menus, backward_LHM)
            sent = self.meter.bytes(ops_LHM) if ops_LHM is not None and budgeted else 0
            if ops_LHM is not None and sent <= limit:
                if picked.worth > worth:
                    best, worth = ops_LHM, picked.worth
                low = allowed
                if sent >= NEAR * limit:
                    break
            elif ops_LHM is not None:
                high = min(allowed, high)
            else:
                break
            if high - low <= self.meter.costs.residual_bytes:
                break
            allowed = (low + high) / 2
        return best

    def _fed(self, choice_G: IntArray, menus: Menus, backward_LHM: FloatArray) -> OpTable | None:
        """The op table of a choice, if every micro-batch can have a FULL head."""
        columns = self.columns
        ops_LHM = np.zeros((*self.meter.placement.owner_LH.shape, columns), dtype=np.int8)
        for index, group in enumerate(self.groups):
            heads = list(group.heads)
            for m in range(columns):
                row = index * columns + m
                runs, trains = (int(of[row, choice_G[row]]) for of in (menus.runs_GK, menus.trains_GK))
                if runs:
                    forward_N = FORWARD_WEIGHT * self.scores.forward_LH[group.block, heads]
                    ops_LHM[group.block, heads, m] = best_ops(
                        forward_N, backward_LHM[group.block, heads, m], runs, trains
                    )
        if columns == 1:
            ops_LHM = np.repeat(ops_LHM, self.meter.num_micro_batches, axis=2)
        try:
            return feed(ops_LHM, self.units)
        except InfeasibleError:
            return None

    def _menus(self, backward_LHM: FloatArray, budget_W: FloatArray, max_bytes: float) -> Menus:
        """Groups × micro-batches; the participant of a block whose turn it is sends nothing by itself."""
        meter, columns = self.meter, self.columns
        repeat = meter.num_micro_batches // columns
        keys = [(group, m) for group in self.groups for m in range(columns)]
        widest = max(len(group.heads) for group in self.groups)
        forward_GN, backward_GN = (np.full((len(keys), widest), -np.inf) for _ in range(2))
        cost_GN1 = np.zeros((len(keys), widest + 1), dtype=np.int64)
        sent_G2 = np.zeros((len(keys), 2), dtype=np.int64)
        for index, (group, m) in enumerate(keys):
            count, heads = len(group.heads), list(group.heads)
            forward_GN[index, :count] = FORWARD_WEIGHT * self.scores.forward_LH[group.block, heads] * repeat
            backward_GN[index, :count] = backward_LHM[group.block, heads, m] * repeat
            cost_GN1[index] = np.arange(widest + 1) * int(meter.forward_LH[group.block, heads].max()) * repeat
            team = meter.placement.holders(group.block)
            if group.worker != team[m % len(team)]:
                sent_G2[index] = MESSAGES * meter.costs.residual_bytes * repeat
        menus = scattered_menus(
            np.array([group.worker for group, _ in keys]),
            forward_GN,
            backward_GN,
            cost_GN1,
            meter.backward_weight * cost_GN1,
            sent_G2,
            np.floor(budget_W * (1 + 1e-12)).astype(np.int64),
            max_bytes,
        )
        if self.request.coherent:
            heads_G = np.array([[len(group.heads)] for group, _ in keys])
            together = (menus.runs_GK == 0) | (menus.runs_GK == heads_G)
            if columns > 1:
                together &= (menus.trains_GK == 0) | (menus.trains_GK == heads_G)
            menus.backward_GK[~together] = -np.inf
        return menus

    def _spent(self, ops_LHM: OpTable) -> FloatArray:
        """[W] FLOPs of heads."""
        weights = np.array([0, 1, 1 + self.meter.backward_weight])
        work_LH: FloatArray = 1.0 * weights[ops_LHM].sum(axis=2) * self.meter.forward_LH
        placement = self.meter.placement
        spent_W = np.bincount(placement.owner_LH.ravel(), weights=work_LH.ravel(), minlength=placement.num_workers)
        return spent_W.astype(np.float64)
