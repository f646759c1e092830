"""Hull: the default solver of menus, by prices of time and bytes, with the linear program's optimum as certificate.

Let a unit of a worker's time cost λ and a byte μ. Then every group takes the option that is worth most after its costs,
a corner of its menu's upper hull, and by duality any prices at all give a bound on the worth of every choice:

    Σ over groups of max over options (worth − λ·cost − μ·bytes)  +  Σ over workers of λ·budget  +  μ·max_bytes

At the best prices it is the optimum of the linear program. A price is sought between two ends, of which one keeps the
budget and the other exceeds it. The mix of both that just uses it up is a solution of the linear program, so worth no
more than its optimum; what the far end gains per unit of budget is the price tried next. Where bound and mix meet, both
are the optimum. Every price of bytes tried has such a search within it, for the λ of all workers at once.

    Everett 1963                        prices for several budgets; an option per group is all there is to compute
    Kelley 1960, Handler & Zang 1980    the next price from two ends: the cutting plane method in one dimension

The answer is as much of the mix as whole groups can be; then groups near to a tie change their options (polish.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from scheduler.domain import BoolArray, FloatArray, IntArray
from scheduler.selection.menus import Menus, Picked, Prices
from scheduler.selection.polish import polished, repaired, towards

CLOSE = 1e-4  # relative: how near the bound must come to the mix
CLOSER = 2e-5  # the same at one price of bytes
TRIES = 40  # of prices at the most
TRUST = (1.05, 1.2, 1.8)  # how far from a guess, as a factor, the prices tried after it may lie
SAMPLE = 700  # groups that first prices are found from, where there are at least three times as many
TINY = 1e-9  # worth that makes no difference
GOOD = 5e-4  # relative gap at which polishing stops


def pick_by_hull(menus: Menus) -> Picked:
    """A choice within the budgets, always; its bound holds for any choice."""
    menus = tightened(menus)
    mixes, bound = price_bytes(menus)
    prices, by_time = mixes[0].prices, replace(menus, max_bytes=np.inf)
    wholes = [towards(by_time, mix.within_G, mix.over_G, mix.prices) for mix in mixes]
    choice_G = repaired(menus, wholes[0])
    for goal_G in wholes[1:]:
        choice_G = towards(menus, choice_G, goal_G, prices)
    choice_G = polished(menus, choice_G, prices, enough=(1 - GOOD) * bound)
    worth = menus.totals(choice_G)[0]
    return Picked(choice_G, worth, max(bound, worth), "OPTIMAL" if bound - worth <= TINY else "FEASIBLE")


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
class Mix:
    """The linear program of every worker at one price of bytes: a mix of two choices that just uses their time up."""

    prices: Prices
    bound: float
    worth: float
    sent: float
    within_G: IntArray  # the choice within all budgets of time
    over_G: IntArray  # the choice over them; the same where time is plenty


def price_bytes(menus: Menus) -> tuple[tuple[Mix, ...], float]:
    """(the last mix whose bytes fit and the last whose do not, if there are; the least bound of all prices tried)."""
    guess, stride = Prices(np.zeros(len(menus.budget_W)), 0.0), len(menus.worker_G) // SAMPLE
    if not np.isfinite(menus.max_bytes):
        free = price_time(menus, guess)
        return (free,), free.bound
    if stride > 2:
        guess = min(price_bytes(menus.sample(stride))[0], key=lambda mix: mix.bound).prices
    ends, bound, prices = Ends(np.array(menus.max_bytes)), np.inf, guess
    within = over = None
    for turn in range(TRIES):
        mix = price_time(menus, prices)
        bound = min(bound, mix.bound)
        if ends.take(np.array(mix.worth), np.array(mix.sent)):
            within = mix
        else:
            over = mix
        if bound - ends.mixed() <= CLOSE * bound + TINY:
            break
        prices = Prices(mix.prices.time_W, float(ends.next_price(np.array(guess.bytes), turn)))
    return tuple(mix for mix in (within, over) if mix), bound


def price_time(menus: Menus, prices: Prices) -> Mix:
    """Seek the prices of time from those given on, while bytes keep theirs."""
    worth_GK, cost_GK, bytes_GK = menus.floats
    value_GK = worth_GK - prices.bytes * bytes_GK if prices.bytes else worth_GK
    worker_G, num_workers = menus.worker_G, len(menus.budget_W)
    first_G = np.arange(len(worker_G)) * value_GK.shape[1]

    def per_worker(array_GK: FloatArray, choice_G: IntArray) -> FloatArray:
        sums_W: FloatArray = np.bincount(worker_G, array_GK.take(first_G + choice_G), num_workers).astype(np.float64)
        return sums_W

    ends, bound_W, time_W = Ends(menus.budget_W), np.full(num_workers, np.inf), prices.time_W
    within_G = over_G = np.zeros(len(worker_G), dtype=np.int64)
    for turn in range(TRIES):
        choice_G = (value_GK - time_W[worker_G][:, None] * cost_GK).argmax(axis=1)
        value_W, cost_W = per_worker(value_GK, choice_G), per_worker(cost_GK, choice_G)
        bound_W = np.minimum(bound_W, value_W + time_W * (menus.budget_W - cost_W))
        fits_G = ends.take(value_W, cost_W)[worker_G]
        within_G, over_G = np.where(fits_G, choice_G, within_G), np.where(fits_G, over_G, choice_G)
        next_W = ends.next_price(prices.time_W, turn)
        if (bound_W - ends.mixed()).sum() <= CLOSER * bound_W.sum() + TINY:
            break
        time_W = next_W
    scarce_W = np.isfinite(ends.over[1])
    time_W, over_G = np.where(scarce_W, next_W, time_W), np.where(scarce_W[worker_G], over_G, within_G)
    sent_W, more_W = per_worker(bytes_GK, within_G), per_worker(bytes_GK, over_G)
    sent = float((sent_W + ends.share() * (more_W - sent_W)).sum())
    worth = float(ends.mixed().sum()) + prices.bytes * sent
    bound = float(bound_W.sum()) + (prices.bytes * menus.max_bytes if prices.bytes else 0.0)
    return Mix(Prices(time_W, prices.bytes), bound, worth, sent, within_G, over_G)


class Ends:
    """For each of some limits the last solution within it and the last one over it, as (value, what it uses).

    Before one is found these are nothing at all, and something endless whose share of any mix is 0, and its price too.
    """

    def __init__(self, limit: FloatArray | IntArray) -> None:
        self.limit, zero = limit, np.zeros(limit.shape)
        self.within, self.over, self.price = (zero, zero), (zero, zero + np.inf), zero

    def take(self, value: FloatArray, use: FloatArray) -> BoolArray:
        """Whether this solution is within each limit; it becomes the end on its side."""
        fits: BoolArray = use <= self.limit
        self.within = np.where(fits, value, self.within[0]), np.where(fits, use, self.within[1])
        self.over = np.where(fits, self.over[0], value), np.where(fits, self.over[1], use)
        self.price = (self.over[0] - self.within[0]) / (self.over[1] - self.within[1])
        return fits

    def mixed(self) -> FloatArray:
        """The value of the mix of both ends that just uses the limit up."""
        result: FloatArray = self.within[0] + (self.limit - self.within[1]) * self.price
        return result

    def share(self) -> FloatArray:
        """Of the end over the limit in that mix."""
        result: FloatArray = (self.limit - self.within[1]) / (self.over[1] - self.within[1])
        return result

    def next_price(self, guess: FloatArray, turn: int) -> FloatArray:
        """What the far end gains per use; in the first turns not far from the guess, if there is one."""
        if turn >= len(TRUST):
            return self.price
        return np.clip(self.price, guess / TRUST[turn], np.where(guess > 0, guess * TRUST[turn], np.inf))
