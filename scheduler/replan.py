"""The replan policy: budgets follow the profiles at every window; heads move only for a gain that lasts.

Every window is planned on the placement in use, under the newest profiles. Another placement is solved for only where
something has changed since one last was: a device or the job's request, or while a strike is pending. Heads migrate
when the forecast gain passes `gain` in `strikes` windows running, `cooldown` windows after the last migration at the
earliest, and if the steps that are left win more time than moving costs. Published systems that move at once thrash.

`next_plan` is a function of its arguments: what the policy remembers travels in the plan's `policy`, as JSON.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from scheduler.cost import Costs
from scheduler.domain import IntArray, Placement, Plan, Scores
from scheduler.errors import InfeasibleError
from scheduler.placement import Limits
from scheduler.plan import held_rows, make_plan
from scheduler.request import PlanRequest

TOLD = 0.03  # a device's speed has changed so much: worth telling
MOVED_BYTES_PER_PARAM = 12  # a weight and AdamW's two moments, float32


@dataclass(frozen=True)
class Rules:
    """When to look for another placement and when to take it; `fixed_us` is what moving nothing would take."""

    drift: float = 0.12
    gain: float = 0.08
    strikes: int = 2
    cooldown: int = 4
    fixed_us: int = 1_000_000


@dataclass(frozen=True)
class Memory:
    """What the policy remembers: when and for which speeds and request it last solved, strikes, the last migration."""

    speeds_us: tuple[float, ...] = ()
    asked: tuple[Any, ...] = ()
    strikes: int = 0
    moved_window: int | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any] | None) -> Memory:
        if not data:
            return cls()
        return cls(tuple(data["speeds_us"]), tuple(data["asked"]), data["strikes"], data["moved_window"])

    def to_dict(self) -> dict[str, Any]:
        return {
            "speeds_us": list(self.speeds_us),
            "asked": list(self.asked),
            "strikes": self.strikes,
            "moved_window": self.moved_window,
        }


@dataclass(frozen=True)
class Decision:
    """Whether to move, why, and the memory to go on with."""

    migrate: bool
    reason: str
    memory: Memory


def first_plan(request: PlanRequest, costs: Costs, scores: Scores, *, limits: Limits | None = None) -> Plan:
    """The plan of window 0, from scratch."""
    plan = make_plan(request, costs, scores, version=1, window=0, limits=limits)
    asked, speeds = _asked(request), speeds_of(costs)
    return _remembering(plan, Memory(speeds, asked), asked, speeds)


def next_plan(
    request: PlanRequest,
    costs: Costs,
    scores: Scores,
    current: Placement,
    *,
    window: int,
    steps_left: int,
    memory: Mapping[str, Any] | None = None,
    rules: Rules | None = None,
    limits: Limits | None = None,
) -> tuple[Plan, dict[str, Any]]:
    """The plan of a later window and what changed: migrated, moved_heads, before, after, cause, reason.

    `cause` says what the last plan did not know, `reason` why heads move or stay. `before` is this window on the
    placement in use, None where the request cannot be met on it any more. Raises InfeasibleError where it cannot be met
    on any.
    """
    rules = rules or Rules()
    asked, speeds = _asked(request), speeds_of(costs)
    remembered = Memory.from_dict(memory)
    remembered = remembered if remembered.speeds_us else replace(remembered, speeds_us=speeds, asked=asked)
    fixed: dict[str, Any] = {"version": window + 1, "window": window, "limits": limits}
    cause = cause_of((memory or {}).get("rests_on"), asked, speeds)

    def answer(plan: Plan, kept: Plan | None, remembers: Memory, reason: str) -> tuple[Plan, dict[str, Any]]:
        told = _remembering(plan, remembers, asked, speeds)
        return told, change_of(kept, current, told, cause, reason)

    try:
        kept = make_plan(request, costs, scores, placement=current, held=(memory or {}).get("held"), **fixed)
    except InfeasibleError:
        other = make_plan(request, costs, scores, current=current, **fixed)
        reason = "the request cannot be met on the placement in use any more"
        return answer(other, None, Memory(speeds, asked, 0, window), reason)
    if stays := reason_to_stay(remembered, speeds, asked, window, rules):
        return answer(kept, kept, remembered, stays)
    try:
        other = make_plan(request, costs, scores, current=current, **fixed)
    except InfeasibleError:
        return answer(kept, kept, replace(remembered, strikes=0), "no other placement fits")
    cost_us = migration_us(current, other.placement, costs, rules)
    decision = decide(
        remembered, speeds, asked, window, steps_left, kept.forecast.step_us, other.forecast.step_us, cost_us, rules
    )
    return answer(other if decision.migrate else kept, kept, decision.memory, decision.reason)


def cause_of(rests_on: Mapping[str, Any] | None, asked: tuple[Any, ...], speeds_us: tuple[float, ...]) -> str:
    """What the last plan did not know: the schedule's next phase, a device's speed, or else worths."""
    if rests_on is None:
        return "the first plan of this attempt"
    causes = []
    if tuple(rests_on["asked"]) != asked:
        causes.append(f"the schedule now asks for {_words(asked)}")
    longer = [now / before - 1 for before, now in zip(rests_on["speeds_us"], speeds_us, strict=True)]
    worker = max(range(len(longer)), key=lambda w: abs(longer[w]))
    if abs(longer[worker]) > TOLD:
        causes.append(f"worker {worker} takes {longer[worker]:+.0%} time for a head")
    return " and ".join(causes) or "heads have other worths"


def reason_to_stay(
    memory: Memory, speeds_us: tuple[float, ...], asked: tuple[Any, ...], window: int, rules: Rules
) -> str | None:
    """Why no other placement need be solved for in this window; None if one should be."""
    if memory.moved_window is not None and window - memory.moved_window <= rules.cooldown:
        return f"heads moved {window - memory.moved_window} windows ago"
    if memory.strikes or asked != memory.asked or drift(memory.speeds_us, speeds_us) > rules.drift:
        return None
    return "no device has changed its speed"


def decide(
    memory: Memory,
    speeds_us: tuple[float, ...],
    asked: tuple[Any, ...],
    window: int,
    steps_left: int,
    kept_us: int,
    other_us: int,
    cost_us: int,
    rules: Rules,
) -> Decision:
    """Stay or move, given the forecast step on the placement in use and on the best other one."""
    gain = 1 - other_us / kept_us if kept_us else 0.0
    told = f"another placement would make steps {gain:.1%} shorter"
    if gain < rules.gain:
        return Decision(False, f"{told}, less than {rules.gain:.0%}", Memory(speeds_us, asked, 0, memory.moved_window))
    if (kept_us - other_us) * steps_left <= cost_us:
        reason = f"{told}, but moving takes longer than {steps_left} steps would win back"
        return Decision(False, reason, Memory(speeds_us, asked, 0, memory.moved_window))
    strikes = memory.strikes + 1
    if strikes < rules.strikes:
        reason = f"{told}; heads move if the next window says so too"
        return Decision(False, reason, replace(memory, strikes=strikes))
    return Decision(True, told, Memory(speeds_us, asked, 0, window))


def drift(before_us: tuple[float, ...], now_us: tuple[float, ...]) -> float:
    """The largest relative change of a worker's speed."""
    if len(before_us) != len(now_us):
        return math.inf
    return max(math.exp(abs(math.log(now / before))) - 1 for before, now in zip(before_us, now_us, strict=True))


def speeds_of(costs: Costs) -> tuple[float, ...]:
    """µs that each worker takes for a FULL head, with all heads of a block together."""
    heads = costs.shape.num_heads
    return tuple(
        sum(f(worker, part, heads) for f in (costs.forward_us, costs.backward_us) for part in ("attn", "mlp")) / heads
        for worker in range(costs.num_workers)
    )


def migration_us(before: Placement, after: Placement, costs: Costs, rules: Rules) -> int:
    """How long moving takes: weights and moments over the links, each worker's one after another, and a fixed time."""
    bytes_H: IntArray = MOVED_BYTES_PER_PARAM * np.asarray(costs.shape.head_params, dtype=np.int64)
    spent_us = [0] * costs.num_workers
    for src in range(costs.num_workers):
        for dst in range(costs.num_workers):
            moved_LH = (before.owner_LH == src) & (after.owner_LH == dst)
            if src != dst and moved_LH.any():
                took_us = costs.transfer_us(src, dst, int((moved_LH * bytes_H).sum()))
                spent_us[src] += took_us
                spent_us[dst] += took_us
    return rules.fixed_us + max(spent_us)


def _asked(request: PlanRequest) -> tuple[Any, ...]:
    return (*(request.ratios or ()), request.compute, request.max_bytes)


def _words(asked: tuple[Any, ...]) -> str:
    *ratios, compute, max_bytes = asked
    if ratios:
        return " : ".join(map(str, ratios)) + " FULL : FORWARD : SKIP"
    return "all heads FULL" if compute is None else f"{compute:g} of the compute and {max_bytes:g} of the bytes"


def _remembering(plan: Plan, memory: Memory, asked: tuple[Any, ...], speeds_us: tuple[float, ...]) -> Plan:
    """The plan with what the next window needs to know: the policy's memory, which heads are held FULL, and why."""
    rests_on = {"asked": list(asked), "speeds_us": list(speeds_us)}
    return replace(plan, policy={**memory.to_dict(), "held": held_rows(plan), "rests_on": rests_on})


def change_of(before: Plan | None, current: Placement, after: Plan, cause: str, reason: str) -> dict[str, Any]:
    """What a plan changes, for people; `before` is the plan on the placement in use, `current`, if one can be made."""
    moved_heads = int((current.owner_LH != after.placement.owner_LH).sum())
    return {
        "migrated": moved_heads > 0,
        "moved_heads": moved_heads,
        "before": {"step_us": before and before.forecast.step_us, "heads": current.heads_owned.tolist()},
        "after": {"step_us": after.forecast.step_us, "heads": after.placement.heads_owned.tolist()},
        "cause": cause,
        "reason": reason,
    }
