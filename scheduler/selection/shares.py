"""Shares: how much each worker does, so that all finish together under the live costs.

Per step a worker that runs its n heads in M − s micro-batches and trains f of them takes

    (M − s) · (run_us · n + train_us · f) + trunk_us

where run_us and train_us are µs per head, read off its curves at the head counts that it owns. Shares are found by
filling up to a common level τ: first FULL heads, since they cost most, then what is left uneven by SKIPs. Totals stay
as asked: a worker at half the speed gets fewer FULL heads, the others more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from scheduler.cost import Costs
from scheduler.domain import SUBLAYERS, BoolArray, FloatArray, Placement

EVEN = 0.03  # workers that differ by less share by heads owned: no more than measurements do from day to day
ROUNDS = 40  # halvings of the common level: to 1e-12 of it
SETTLED = 4  # rounds of FULL heads and SKIPs in turn


@dataclass(frozen=True, eq=False)
class Pace:
    """What work takes on every worker: µs per head run, per head trained, and of the trunk per micro-batch."""

    owned_W: FloatArray
    run_us_W: FloatArray
    train_us_W: FloatArray
    trunk_us_W: FloatArray

    def step_us(self, runs_W: FloatArray, fulls_W: FloatArray, num_micro_batches: int) -> FloatArray:
        """[W] µs of a step in which each worker runs all its heads in `runs_W` micro-batches, `fulls_W` heads FULL."""
        work_W = self.run_us_W * self.owned_W + self.train_us_W * fulls_W
        result: FloatArray = runs_W * work_W + num_micro_batches * self.trunk_us_W
        return result


@dataclass(frozen=True, eq=False)
class Shares:
    """Mean FULL heads and mean micro-batches sat out per step, of each worker; both may be broken numbers."""

    fulls_W: FloatArray
    skips_W: FloatArray


def pace_of(placement: Placement, costs: Costs) -> Pace:
    """Read off the curves at the head counts owned, block by block."""
    workers = range(placement.num_workers)
    owned_LW = np.stack([(placement.owner_LH == w).sum(axis=1) for w in workers], axis=1)
    owned_W = owned_LW.sum(axis=0).astype(np.float64)
    run_W, train_W, trunk_W = (np.zeros(placement.num_workers) for _ in range(3))
    for w in workers:
        counts = [int(n) for n in owned_LW[:, w] if n]
        run_W[w] = sum(costs.forward_us(w, part, n) for n in counts for part in SUBLAYERS)
        train_W[w] = sum(costs.backward_us(w, part, n) for n in counts for part in SUBLAYERS)
        run_W[w] += len(SUBLAYERS) * len(counts) * costs.sum_us(w)
        trunk_W[w] = costs.embed_us(w) * (w in placement.embedders) + costs.classify_us(w) * (w == placement.classifier)
    heads_W = np.maximum(owned_W, 1)
    return Pace(owned_W, np.maximum(run_W / heads_W, 1e-9), np.maximum(train_W / heads_W, 1e-9), trunk_W)


def equal_shares(placement: Placement, ratios: tuple[int, int, int]) -> Shares:
    """By heads owned, whatever they cost."""
    full, forward, skip = ratios
    owned_W = placement.heads_owned
    return Shares(owned_W * full / (full + forward), np.full(placement.num_workers, float(skip)))


def timed_shares(placement: Placement, costs: Costs, ratios: tuple[int, int, int]) -> Shares:
    """Shares with which all workers finish together, or as nearly as can be, when FULL and SKIP keep their totals."""
    full, forward, skip = ratios
    pace, total = pace_of(placement, costs), float(placement.owner_LH.size)
    micro_batches = full + forward + skip
    least, most = np.zeros(placement.num_workers), np.where(pace.owned_W > 0, micro_batches - 1.0, 0.0)
    skips_W = np.where(pace.owned_W > 0, float(skip), 0.0)
    fulls_W = pace.owned_W * full / (full + forward)
    plain_us_W = pace.step_us(micro_batches - skips_W, fulls_W, micro_batches)[pace.owned_W > 0]
    if plain_us_W.max() <= (1 + EVEN) * plain_us_W.min():
        return Shares(fulls_W, skips_W)
    for _ in range(SETTLED):
        runs_W = micro_batches - skips_W

        def fulls_at(level: float, runs_W: FloatArray = runs_W) -> FloatArray:
            spare_W = level - pace.step_us(runs_W, np.zeros_like(runs_W), micro_batches)
            return np.clip(spare_W / (runs_W * pace.train_us_W), 0, pace.owned_W)

        fulls_W = _filled(fulls_at, runs_W, full * total)
        if not skip or micro_batches < 2:
            break

        def runs_at(level: float, fulls_W: FloatArray = fulls_W) -> FloatArray:
            work_W = pace.run_us_W * pace.owned_W + pace.train_us_W * fulls_W
            spare_W = level - micro_batches * pace.trunk_us_W
            return np.clip(spare_W / np.maximum(work_W, 1e-9), micro_batches - most, micro_batches - least)

        skips_W = micro_batches - _filled(runs_at, pace.owned_W, (full + forward) * total)
    return Shares(fulls_W, skips_W)


def flop_shares(placement: Placement, costs: Costs, budget: float, head_flops: FloatArray) -> FloatArray:
    """[W] FLOPs of heads per step for each worker: `budget` in all, shared out so that all finish together.

    `head_flops` is the forward pass of every head, [L, H].
    """
    pace, micro_batches = pace_of(placement, costs), costs.step.num_micro_batches
    forward_W = np.bincount(placement.owner_LH.ravel(), weights=head_flops.ravel(), minlength=placement.num_workers)
    all_full_us_W = micro_batches * pace.owned_W * (pace.run_us_W + pace.train_us_W)
    most_W = (1.0 + costs.backward_weight) * micro_batches * forward_W
    rate_W = most_W / np.maximum(all_full_us_W, 1e-9)

    def flops_at(level: float) -> FloatArray:
        return np.clip(rate_W * (level - micro_batches * pace.trunk_us_W), 0, most_W)

    return _filled(flops_at, np.ones_like(rate_W), budget)


def together(placement: Placement, costs: Costs, full_LH: BoolArray, shares: Shares, micro_batches: int) -> float:
    """How much longer the slowest worker takes with these FULL heads than with the shares: 0.05 is 5 %."""
    pace = pace_of(placement, costs)
    fulls_W = np.bincount(placement.owner_LH[full_LH], minlength=placement.num_workers).astype(np.float64)
    runs_W = micro_batches - shares.skips_W
    wanted, seen = (pace.step_us(runs_W, f_W, micro_batches).max() for f_W in (shares.fulls_W, fulls_W))
    return float(seen / wanted - 1)


def whole(shares_W: FloatArray, total: int, most_W: FloatArray) -> list[tuple[int, int]]:
    """Least and most of each worker: its share rounded down and up, so that `total` is within reach."""
    least_W = np.floor(shares_W + 1e-6).astype(int)
    limit_W = np.minimum(np.ceil(shares_W - 1e-6), most_W).astype(int)
    limit_W = np.maximum(limit_W, least_W)
    while limit_W.sum() < total and (limit_W < most_W).any():
        limit_W = np.minimum(limit_W + 1, most_W).astype(int)
    while least_W.sum() > total:
        least_W = np.maximum(least_W - 1, 0)
    return list(zip(least_W.tolist(), limit_W.tolist(), strict=True))


def _filled(amount_at: Callable[[float], FloatArray], weight_W: FloatArray, total: float) -> FloatArray:
    """amount_at(level) for the level at which Σ weight · amount is `total`, or the nearest that can be reached."""
    low, high = 0.0, 1.0
    while (weight_W * amount_at(high)).sum() < total and high < 1e18:
        high *= 4
    for _ in range(ROUNDS + int(np.log2(high))):
        middle = (low + high) / 2
        low, high = (middle, high) if (weight_W * amount_at(middle)).sum() < total else (low, middle)
    return amount_at(high)
