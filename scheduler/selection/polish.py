"""Polish: from prices, and choices that are best at them, to one choice that is good and keeps every budget.

`repaired` gives bytes up until they fit, `towards` goes from one choice to another as far as the budgets allow, and
`polished` changes single groups, and pairs of groups, while that gains worth.
"""

from __future__ import annotations

import numpy as np

from scheduler.domain import FloatArray, IntArray
from scheduler.selection.menus import Menus, Prices

ROUNDS = 12  # of polishing at the most
NEAR = 1000  # groups that may change in polishing, where there are more
PAIRS = 16  # best pairs looked at in a round


def repaired(menus: Menus, choice_G: IntArray) -> IntArray:
    """Give up bytes where that costs the least worth, and no time, until they fit."""
    choice_G, rows = choice_G.copy(), np.arange(len(choice_G))
    while (excess := menus.totals(choice_G)[2] - menus.max_bytes) > 0:
        gain_GK, cost_GK, sent_GK = (array - array[rows, choice_G][:, None] for array in menus.floats)
        able_GK = (sent_GK < 0) & (cost_GK <= 0) & np.isfinite(gain_GK)
        loss_GK = np.divide(gain_GK, sent_GK, out=np.full_like(gain_GK, np.inf), where=able_GK)
        option_G = loss_GK.argmin(axis=1)
        loss_G = loss_GK[rows, option_G]
        order = np.argsort(loss_G, kind="stable")[: np.count_nonzero(np.isfinite(loss_G))]
        saved = np.cumsum(-sent_GK[rows, option_G][order])
        given = order[: 1 + int(np.searchsorted(saved, excess))]
        choice_G[given] = option_G[given]
    return choice_G


def towards(menus: Menus, choice_G: IntArray, goal_G: IntArray, prices: Prices) -> IntArray:
    """Go from one choice to another, group by group, to the place within the budgets that is worth most.

    The start is within them. All workers go at one pace, each one's best changes at the prices first.
    """
    rows = np.flatnonzero(choice_G != goal_G)
    gain_P, cost_P, sent_P = (array[rows, goal_G[rows]] - array[rows, choice_G[rows]] for array in menus.floats)
    profit_P = gain_P - prices.time_W[menus.worker_G[rows]] * cost_P - prices.bytes * sent_P
    best = np.argsort(-profit_P, kind="stable")
    rows, gain_P, cost_P, sent_P = rows[best], gain_P[best], cost_P[best], sent_P[best]
    _, cost_W, sent = menus.totals(choice_G)
    moment_P = _moments(cost_P, menus.worker_G[rows], menus.budget_W - cost_W)
    order = np.argsort(moment_P, kind="stable")[: np.count_nonzero(moment_P <= 1)]
    fits = np.cumsum(sent_P[order]) <= menus.max_bytes - sent
    worth = np.concatenate([[0.0], np.where(fits, np.cumsum(gain_P[order]), -np.inf)])
    taken = rows[order[: int(worth.argmax())]]
    result = choice_G.copy()
    result[taken] = goal_G[taken]
    return result


def _moments(cost_P: FloatArray, worker_P: IntArray, spare_W: IntArray) -> FloatArray:
    """When each change is due, from 0 to 1 as far as the worker's time allows, later beyond that.

    At moment t the changes due need at most the part t of what all that need time do, and save at least the part t of
    what all that save time do. So at no moment is more time needed than there is, or than at the goal.
    """
    needs_P, cost_P = cost_P > 0, np.abs(cost_P)
    owner_P = 2 * worker_P + needs_P
    order = np.argsort(owner_P, kind="stable")
    total, owner = np.cumsum(cost_P[order]), owner_P[order]
    running_P = np.empty_like(total)
    running_P[order] = total - np.concatenate([[0.0], total])[np.searchsorted(owner, owner)]
    all_V = np.bincount(owner_P, weights=cost_P, minlength=2 * len(spare_W))
    slower_W = np.maximum(1.0, (all_V[1::2] - all_V[::2]) / np.maximum(spare_W, 1e-30))
    passed_P = np.where(needs_P, running_P, running_P - cost_P)
    result: FloatArray = passed_P / np.maximum(all_V, 1e-30)[owner_P] * slower_W[worker_P]
    return result


def polished(menus: Menus, choice_G: IntArray, prices: Prices, enough: float) -> IntArray:
    """Change single groups, and pairs of groups, while that gains worth and keeps the budgets, until it is enough.

    Pairs of one worker's groups are matched by cost, with bytes at their price; pairs of any two by bytes.
    """
    worth, cost_W, sent = menus.totals(choice_G)
    if worth >= enough:
        return choice_G
    choice_G, spare_W, spare_bytes = choice_G.copy(), menus.budget_W - cost_W, menus.max_bytes - sent
    scopes = _nearest(menus, prices)
    if np.isfinite(menus.max_bytes):
        scopes.append(np.concatenate(scopes))
    idle: set[int] = set()
    for _ in range(ROUNDS):
        for scope, group_P in enumerate(scopes):
            if scope in idle or not len(group_P) or worth >= enough:
                continue
            moves = Moves(menus, group_P, choice_G, spare_W, spare_bytes)
            found = moves.best(prices.bytes, by_bytes=scope == len(spare_W))
            idle = idle - {len(spare_W)} if found else idle | {scope}
            for move in found:
                choice_G[moves.group[move]] = moves.option[move]
                worth, spare_bytes = worth + moves.gain[move], spare_bytes - moves.sent[move]
                spare_W[moves.worker[move]] -= moves.cost[move]
        if len(idle) == len(scopes) or worth >= enough:
            break
    return choice_G


def _nearest(menus: Menus, prices: Prices) -> list[IntArray]:
    """Every worker's groups; of many only those whose best two options differ least at the prices."""
    scopes = [np.flatnonzero(menus.worker_G == worker) for worker in range(len(menus.budget_W))]
    rows, each = np.arange(len(menus.worker_G)), max(1, NEAR // len(scopes))
    if len(rows) <= NEAR:
        return scopes
    worth_GK, cost_GK, bytes_GK = menus.floats
    value_GK = worth_GK - prices.time_W[menus.worker_G][:, None] * cost_GK - prices.bytes * bytes_GK
    best = (rows, value_GK.argmax(axis=1))
    margin_G = value_GK[best]
    value_GK[best] = -np.inf
    margin_G -= value_GK[rows, value_GK.argmax(axis=1)]
    return [np.sort(mine[np.argpartition(margin_G[mine], each)[:each]]) if len(mine) > each else mine
            for mine in scopes]  # fmt: skip


class Moves:
    """Every change of some groups from their present options, with what is spare of the budgets."""

    def __init__(
        self, menus: Menus, group_P: IntArray, choice_G: IntArray, spare_W: IntArray, spare_bytes: float
    ) -> None:
        worth_PK, chosen = menus.worths[group_P], choice_G[group_P]
        at = (np.arange(len(group_P)), chosen)
        gain = (worth_PK - worth_PK[at][:, None]).ravel()
        usable = np.isfinite(gain)
        usable[np.arange(len(group_P)) * worth_PK.shape[1] + chosen] = False
        flat = np.flatnonzero(usable)
        cost_PK, sent_PK = menus.cost_GK[group_P], menus.bytes_GK[group_P]
        self.cost = (cost_PK - cost_PK[at][:, None]).ravel()[flat]
        self.sent = (sent_PK - sent_PK[at][:, None]).ravel()[flat]
        self.gain = gain[flat]
        self.group, self.option = group_P[flat // worth_PK.shape[1]], flat % worth_PK.shape[1]
        self.worker = menus.worker_G[self.group]
        self.spare_W, self.spare_bytes = spare_W, spare_bytes

    def best(self, price: float, by_bytes: bool) -> list[int]:
        """The change, or pair of changes of two groups, that gains most within what is spare; empty if none gains."""
        fits = self.cost <= self.spare_W[self.worker]
        single = np.where(fits & (self.sent <= self.spare_bytes), self.gain, 0.0)
        best = int(np.argmax(single)) if len(single) else 0
        found, gained = ([best], float(single[best])) if len(single) and single[best] > 1e-9 else ([], 0.0)
        if by_bytes:
            pairs = self._pairs(np.flatnonzero(fits), self.sent, self.spare_bytes, self.gain)
        else:
            spare = float(self.spare_W[self.worker[0]]) if len(single) else 0.0
            pairs = self._pairs(np.arange(len(single)), self.cost, spare, self.gain - price * self.sent)
        for one, other in pairs:
            gain = float(self.gain[one] + self.gain[other])
            if gain > gained + 1e-9 and self._together(one, other):
                found, gained = [one, other], gain
        return found

    def _pairs(self, rows: IntArray, use: IntArray, spare: float, gain: FloatArray) -> list[tuple[int, int]]:
        """The pairs that gain most, each change with the best one that leaves room for it."""
        if not len(rows):
            return []
        rows = rows[np.argsort(use[rows], kind="stable")]
        use, gain = use[rows], gain[rows]
        top = np.maximum.accumulate(gain)
        where = np.maximum.accumulate(np.where(gain >= top, np.arange(len(top)), 0))
        partner = np.searchsorted(use, spare - use, side="right") - 1
        total = np.where(partner >= 0, gain + top[np.maximum(partner, 0)], -np.inf)
        count = min(PAIRS, len(total))
        chosen = np.argpartition(-total, count - 1)[:count]
        return [(int(rows[i]), int(rows[where[max(0, partner[i])]])) for i in chosen if partner[i] >= 0]

    def _together(self, one: int, other: int) -> bool:
        """Whether both changes at once keep the budgets."""
        if self.group[one] == self.group[other] or self.sent[one] + self.sent[other] > self.spare_bytes:
            return False
        if self.worker[one] == self.worker[other]:
            return bool(self.cost[one] + self.cost[other] <= self.spare_W[self.worker[one]])
        return all(bool(self.cost[i] <= self.spare_W[self.worker[i]]) for i in (one, other))
