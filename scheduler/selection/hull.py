"""Hull: the default solver of menus, greedy on convex hulls, with the linear program's optimum as certificate.

With a price λ on bytes the workers part, and each one's linear program is solved by sorting: of every menu only the
corners of the upper hull of (cost, worth − λ·bytes) matter; the steps from corner to corner are taken in order of
worth per cost until the budget is used up, the last one in part. λ is where the bytes just fit. By duality

    Σ over workers of that optimum + λ·max_bytes

bounds the worth of every choice, and at the best λ it *is* the optimum of the relaxation. The answer takes whole steps
only; then single groups, and pairs of groups of one worker, change their options while that gains worth.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from scheduler.domain import BoolArray, FloatArray, IntArray
from scheduler.selection.menus import Menus, Picked

FAR = 0.08  # of the bytes: what a price found from a sample may leave unused
TRIES = 5  # to correct it; then the price is sought in full
PRICES = 16  # prices of bytes tried at the most
CLOSE = 1e-4  # relative: how near the bound must come to the least that any price can give
GOOD = 5e-4  # relative gap at which polishing stops
SPARSE = 0.6  # of the groups that go on: below this the others are dropped
SAMPLE = 700  # groups that a first price is found from, where there are many more
POLISH = 12  # rounds of polishing at the most
FILLS = 6  # rounds of filling up at the most
PAIRS = 16  # best pairs looked at in a round


def pick_by_hull(menus: Menus) -> Picked:
    """A choice within the budgets, always; its bound holds for any choice."""
    menus = tightened(menus)
    relaxed, bound = price_bytes(menus)
    choice_G = _filled_up(menus, _lightened(menus, _whole_steps(menus, relaxed)), bound)
    choice_G = polish(menus, choice_G, relaxed.price, bound)
    worth = menus.totals(choice_G)[0]
    return Picked(choice_G, worth, max(bound, worth), "OPTIMAL" if bound - worth <= 1e-9 else "FEASIBLE")


def tightened(menus: Menus) -> Menus:
    """The same instance with budgets rounded down to what sums of its costs can be: multiples of their divisor."""
    divisor_G = np.gcd.reduce(menus.cost_GK, axis=1)
    divisor_W = np.ones_like(menus.budget_W)
    for worker in range(len(divisor_W)):
        divisor_W[worker] = max(1, int(np.gcd.reduce(divisor_G[menus.worker_G == worker])))
    max_bytes = menus.max_bytes
    if np.isfinite(max_bytes):
        divisor = max(1, int(np.gcd.reduce(menus.bytes_GK, axis=None)))
        max_bytes = float(int(max_bytes) // divisor * divisor)
    return replace(menus, budget_W=menus.budget_W // divisor_W * divisor_W, max_bytes=max_bytes)


@dataclass(frozen=True, eq=False)
class Relaxed:
    """The linear program at one price of bytes: the steps of all groups, and which are taken whole."""

    price: float
    value: float  # of the Lagrangian, so an upper bound
    sent: float
    group_S: IntArray
    goal_S: IntArray
    whole_S: BoolArray


def price_bytes(menus: Menus) -> tuple[Relaxed, float]:
    """(the relaxation at the least price tried at which the bytes fit, the least bound of all prices tried)."""
    groups = len(menus.worker_G)
    if not np.isfinite(menus.max_bytes):
        free = relax(menus, 0.0)
        return free, free.value
    if groups < 3 * SAMPLE:
        return _search_price(menus)
    sampled = menus.sample(-(-groups // SAMPLE))
    guess, _ = _search_price(sampled)
    found, bound = relax(menus, guess.price * (1 + FAR / 4)), np.inf
    for _ in range(TRIES):
        bound = min(bound, found.value)
        if found.sent <= menus.max_bytes and (not found.price or found.sent >= (1 - FAR) * menus.max_bytes):
            return found, bound
        off = found.sent / menus.max_bytes - 1
        found = relax(menus, found.price * (1 + off + FAR / 4) if off > 0 else found.price * (1 + off / 4))
    return _search_price(menus)


def _search_price(menus: Menus) -> tuple[Relaxed, float]:
    """The Lagrangian is convex in the price and its slope is what the bytes leave of their limit, so the tangents at a
    price that is too low and at one that is high enough meet where it can be least: that price is tried next.
    """
    low = relax(menus, 0.0)
    if low.sent <= menus.max_bytes:
        return low, low.value
    bound, high = low.value, relax(menus, _first_price(menus, low))
    while high.sent > menus.max_bytes:
        low, bound, high = high, min(bound, high.value), relax(menus, 2 * high.price)
    bound = min(bound, high.value)
    for turn in range(PRICES):
        rise, fall = menus.max_bytes - high.sent, low.sent - menus.max_bytes
        run = high.price - low.price
        share = min(1.0, max(0.0, (low.value - high.value + rise * run) / max((rise + fall) * run, 1e-30)))
        least = low.value - fall * share * run
        if bound - least <= CLOSE * bound:
            break
        if turn % 4 == 3:
            share = 0.5
        middle = relax(menus, low.price + share * run)
        bound = min(bound, middle.value)
        low, high = (middle, high) if middle.sent > menus.max_bytes else (low, middle)
    return high, bound


def relax(menus: Menus, price: float) -> Relaxed:
    """Solve the linear program of every worker with bytes at `price`."""
    cost_KG, bytes_KG, worth_KG = menus.columns
    value_KG = worth_KG - price * bytes_KG if price else worth_KG
    group_S, origin_S, goal_S, cost_S, gain_S, rate_S = _hull_steps(cost_KG, value_KG)
    worker_S = menus.worker_G[group_S]
    # Stable, since the steps of a straight stretch have one rate and count only one after the other.
    order = np.argsort(worker_S - rate_S / (1.0001 * float(rate_S.max(initial=1e-12)) + 1e-12), kind="stable")
    group_S, goal_S, worker_S = group_S[order], goal_S[order], worker_S[order]
    cost_S, gain_S = cost_S[order], gain_S[order]
    spent_W = np.bincount(worker_S, weights=cost_S, minlength=len(menus.budget_W))
    before_W = np.cumsum(spent_W) - spent_W
    over_S = np.cumsum(cost_S) - (before_W + menus.budget_W)[worker_S]
    part_S = np.clip(1 - over_S / cost_S, 0.0, 1.0)
    groups = len(menus.worker_G)
    origin_S = origin_S[order] * groups + group_S
    more_S = np.take(bytes_KG, goal_S * groups + group_S) - np.take(bytes_KG, origin_S)
    value = float(part_S @ gain_S) + (price * menus.max_bytes if price else 0.0)
    return Relaxed(price, value, float(part_S @ more_S), group_S, goal_S, part_S >= 1.0)


def polish(menus: Menus, choice_G: IntArray, price: float, bound: float) -> IntArray:
    """Change single groups, then pairs of groups, while that gains worth and keeps the budgets.

    Pairs of one worker's groups are matched by cost, with bytes at their price; pairs of any two by bytes.
    """
    worth, cost_W, sent = menus.totals(choice_G)
    choice_G = choice_G.copy()
    scopes = [np.flatnonzero(menus.worker_G == w) for w in range(len(menus.budget_W))]
    if np.isfinite(menus.max_bytes):
        scopes.append(np.arange(len(menus.worker_G)))
    idle: set[int] = set()
    for _ in range(POLISH):
        for scope, group_P in enumerate(scopes):
            if scope in idle or not len(group_P) or bound - worth <= GOOD * bound:
                continue
            moves = _Moves(menus, group_P, choice_G, menus.budget_W - cost_W, menus.max_bytes - sent)
            found = moves.best(price, by_bytes=scope == len(menus.budget_W))
            idle = idle - {len(menus.budget_W)} if found else idle | {scope}
            for group, option in found:
                choice_G[group] = option
            worth, cost_W, sent = menus.totals(choice_G) if found else (worth, cost_W, sent)
        if len(idle) == len(scopes) or bound - worth <= GOOD * bound:
            break
    return choice_G


class _Moves:
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

    def best(self, price: float, by_bytes: bool) -> list[tuple[int, int]]:
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
        return [(int(self.group[i]), int(self.option[i])) for i in found]

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


def _filled_up(menus: Menus, choice_G: IntArray, bound: float) -> IntArray:
    """Spend spare bytes and time on many groups at once: the best change of each, most worth per byte first."""
    choice_G = choice_G.copy()
    for _ in range(FILLS):
        worth, cost_W, sent = menus.totals(choice_G)
        if not np.isfinite(menus.max_bytes) or bound - worth <= GOOD * bound:
            break
        spare_W, spare_bytes = menus.budget_W - cost_W, menus.max_bytes - sent
        moves = _Moves(menus, np.arange(len(choice_G)), choice_G, spare_W, spare_bytes)
        able = np.flatnonzero((moves.gain > 1e-9) & (moves.cost <= spare_W[moves.worker]) & (moves.sent <= spare_bytes))
        rate = moves.gain[able] / np.maximum(moves.sent[able], 1)
        able = able[np.argsort(-rate, kind="stable")]
        able = able[np.sort(np.unique(moves.group[able], return_index=True)[1])]
        for worker in range(len(spare_W)):
            mine = able[moves.worker[able] == worker]
            over = mine[np.cumsum(np.maximum(moves.cost[mine], 0)) > spare_W[worker]]
            able = np.setdiff1d(able, over, assume_unique=True) if len(over) else able
        able = able[np.argsort(-moves.gain[able] / np.maximum(moves.sent[able], 1), kind="stable")]
        able = able[np.cumsum(np.maximum(moves.sent[able], 0)) <= spare_bytes]
        if not len(able):
            break
        choice_G[moves.group[able]] = moves.option[able]
    return choice_G


def _whole_steps(menus: Menus, relaxed: Relaxed) -> IntArray:
    """The choice that the whole steps make; the last step taken in each group counts."""
    choice_G = np.zeros(len(menus.worker_G), dtype=np.int64)
    taken = relaxed.whole_S
    choice_G[relaxed.group_S[taken]] = relaxed.goal_S[taken]  # of several steps of a group the last one counts
    return choice_G


def _lightened(menus: Menus, choice_G: IntArray) -> IntArray:
    """Whole steps send too much where a step left away would have saved bytes: give up the least worth for them."""
    rows = np.arange(len(choice_G))
    sent = int(menus.bytes_GK[rows, choice_G].sum())
    while sent > menus.max_bytes:
        saved_GK = menus.bytes_GK[rows, choice_G][:, None] - menus.bytes_GK
        cheaper = (saved_GK > 0) & (menus.cost_GK <= menus.cost_GK[rows, choice_G][:, None]) & np.isfinite(menus.worths)
        lost_GK = menus.worths[rows, choice_G][:, None] - menus.worths
        rate_GK = np.where(cheaper, lost_GK / np.maximum(saved_GK, 1), np.inf)
        group, option = np.unravel_index(int(np.argmin(rate_GK)), rate_GK.shape)
        sent -= int(saved_GK[group, option])
        choice_G[group] = option
    return choice_G


def _first_price(menus: Menus, free: Relaxed) -> float:
    """A price at which about as many groups sit out as the bytes ask for, dearest bytes first."""
    choice_G, rows = _whole_steps(menus, free), np.arange(len(menus.worker_G))
    sent_G, worth_G = menus.bytes_GK[rows, choice_G], menus.worths[rows, choice_G]
    sends = np.flatnonzero(sent_G)
    if not len(sends):
        return 1e-9
    rate = worth_G[sends] / sent_G[sends]
    order = np.argsort(rate)
    freed = np.cumsum(sent_G[sends][order])
    at = int(np.searchsorted(freed, free.sent - menus.max_bytes))
    return float(max(rate[order[min(at, len(order) - 1)]], 1e-12))


def _hull_steps(
    cost_KG: FloatArray, value_KG: FloatArray
) -> tuple[IntArray, IntArray, IntArray, FloatArray, FloatArray, FloatArray]:
    """(group, from, to, cost, gain, gain per cost) of the steps along every menu's upper hull, from option 0 on.

    Gain per cost never rises from a group's step to its next one, not even by rounding.

    Options are looked at from where a group stands: the steepest one that costs more and is worth more is next. Options
    lie along the first axis, so that one operation serves all groups.
    """
    options, groups = cost_KG.shape
    live, at = np.arange(groups), np.zeros(groups, dtype=np.int64)
    ceiling = np.full(groups, np.inf)
    here_cost, here_value = cost_KG[0].copy(), value_KG[0].copy()
    parts = []
    while len(live):
        best, goal = np.zeros(len(live)), np.zeros(len(live), dtype=np.int64)
        for option in range(1, options):
            more_cost = cost_KG[option] - here_cost
            slope = np.divide(value_KG[option] - here_value, more_cost, out=np.zeros(len(live)), where=more_cost > 0)
            better = slope > best
            np.copyto(best, slope, where=better)
            np.copyto(goal, option, where=better)
        goes = np.flatnonzero(best)
        to = goal[goes]
        rate = np.minimum(best[goes], ceiling[goes])
        place = to * len(live) + goes
        cost, value = np.take(cost_KG, place), np.take(value_KG, place)
        parts.append((live[goes], at[goes], to, cost - here_cost[goes], value - here_value[goes], rate))
        if len(goes) < SPARSE * len(live):  # those at their end are carried along until it pays to drop them
            live, cost_KG, value_KG = live[goes], cost_KG[:, goes], value_KG[:, goes]
            at, here_cost, here_value, ceiling = to.copy(), cost, value, rate.copy()
        else:
            at[goes], here_cost[goes], here_value[goes], ceiling[goes] = to, cost, value, rate
    group, origin, goal, more, gain, per_cost = (np.concatenate(column) for column in zip(*parts, strict=True))
    return group, origin, goal, more, gain, per_cost
