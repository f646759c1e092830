"""Says why: a reason and a price per head, and what binds every worker.

The reasons are read off the plan, so they hold for any solver: where a head stands by worth, where the cut between
FULL and FORWARD lies, how fast its owner is, and what share of the step each worker computes, waits and sends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from scheduler import gantt
from scheduler.cost import Costs
from scheduler.domain import SUBLAYERS, FloatArray, Op, Placement, Plan, Scores, op_rows
from scheduler.placement import memory_bytes_of

BINDINGS = ("time", "memory", "link", "path", "idle")
BUSY = 0.85  # of the step: a worker that computes so much is bound by its time
TAKEN = 0.7  # of the step: a link that carries so much binds the worker behind it
SLOW = 1.5  # times the fastest worker's time for a FULL head


@dataclass(frozen=True, eq=False)
class Explanation:
    """A plan with what it was made from."""

    plan: Plan
    costs: Costs
    scores: Scores

    def told(self, *, embed_grad: bool) -> dict[str, Any]:
        """What goes with a plan: `heads`, `devices`, and `gantt`, None where it has too many spans to be shown."""
        spans = gantt.of_plan(self.plan, self.costs, embed_grad=embed_grad)
        chart = gantt.to_dict(spans) if len(spans) <= gantt.MOST_SPANS else None
        return {"heads": self.heads(), "devices": self.workers(), "gantt": chart}

    def heads(self) -> list[list[dict[str, Any]]]:
        """[L][H]: owner, ops of the cycle's first step as a word, worth, µs in a mean step, and a sentence with why."""
        words, time_us_LH = op_rows(self.plan.cycle[0]), self.time_us()
        owner_LH, worth_LH = self.plan.placement.owner_LH, self.scores.backward_LH
        return [
            [
                {
                    "owner": int(owner_LH[b, h]),
                    "ops": words[b][h],
                    "worth": round(float(worth_LH[b, h]), 4),
                    "time_us": round(float(time_us_LH[b, h])),
                    "reason": f"{self._why_owner(b, h)}; {self._why_op(b, h)}.",
                }
                for h in range(owner_LH.shape[1])
            ]
            for b in range(owner_LH.shape[0])
        ]

    def time_us(self) -> FloatArray:
        """[L, H]: what every head costs its owner in a mean step; heads that run in one call share its time alike."""
        owner_LH, cycle = self.plan.placement.owner_LH, np.stack(self.plan.cycle)
        time_us_LH = np.zeros(owner_LH.shape)
        for worker in range(self.costs.num_workers):
            own_LH = owner_LH == worker
            for op, each_us in self._call_us(worker).items():
                runs = (cycle == op) & own_LH[None, :, :, None]
                time_us_LH += (runs * each_us[runs.sum(axis=2, keepdims=True)]).sum(axis=3).mean(axis=0)
        return time_us_LH

    def _call_us(self, worker: int) -> dict[Op, FloatArray]:
        """By op, for so many heads of a block that do it together, what one of them takes."""
        costs, counts = self.costs, range(1, self.costs.shape.num_heads + 1)
        forward = [sum(costs.forward_us(worker, part, n) for part in SUBLAYERS) / n for n in counts]
        full = [_block_us(costs, worker, n) / n for n in counts]
        return {Op.FULL: np.array([0.0, *full]), Op.FORWARD: np.array([0.0, *forward])}

    def workers(self) -> list[dict[str, Any]]:
        """Per worker: what it has, how it spends a mean step, and what binds it: one of BINDINGS, with a note."""
        return [self._worker(rank) for rank in range(self.costs.num_workers)]

    @cached_property
    def _head_us(self) -> np.ndarray:
        """[W]: a FULL head's time where all of a block's heads run together."""
        heads = self.costs.shape.num_heads
        return np.array([_block_us(self.costs, w, heads) / heads for w in range(self.costs.num_workers)])

    @cached_property
    def _ranks(self) -> np.ndarray:
        """[L, H]: 1 is the most worthy head; heads of equal worth share a rank."""
        worth_LH = self.scores.backward_LH
        rising = np.sort(worth_LH, axis=None)
        return worth_LH.size + 1 - np.searchsorted(rising, worth_LH, side="right")

    @cached_property
    def _shares(self) -> np.ndarray:
        """[op, L, H]: the share of the cycle's micro-batches in which a head does the op."""
        ops = np.stack(self.plan.cycle)
        return np.stack([(ops == op).mean(axis=(0, 3)) for op in Op])

    @cached_property
    def _all_alike(self) -> bool:
        """Whether whole micro-batches were chosen, and some left out."""
        tables = [ops[self._first :] if self._first < len(ops) else ops for ops in self.plan.cycle]
        return bool(all((ops == ops[0, 0]).all() for ops in tables) and (np.stack(tables) != Op.FULL).any())

    @property
    def _first(self) -> int:
        """The first block that trains."""
        return self.costs.shape.num_frozen

    @cached_property
    def _cut(self) -> float:
        """The least worth among as many heads as are mostly FULL, taken by worth alone."""
        num_full = int(self._mostly_full.sum())
        return float(np.sort(self.scores.backward_LH, axis=None)[::-1][max(0, num_full - 1)])

    @cached_property
    def _mostly_full(self) -> np.ndarray:
        """[L, H]"""
        return self._shares[Op.FULL] > self._shares[Op.FORWARD]

    @cached_property
    def _needs(self) -> Sequence[int]:
        return memory_bytes_of(self.plan.placement, self.costs, self._shares[Op.FULL] > 0)

    def _why_owner(self, block: int, head: int) -> str:
        placement = self.plan.placement
        owner, team = int(placement.owner_LH[block, head]), placement.holders(block)
        if self.costs.num_workers == 1:
            return "the only worker owns every head"
        if len(team) == 1:
            return f"worker {owner} owns the whole block, so nothing is exchanged inside it"
        own = len(placement.heads_of(owner, block))
        speeds = {w: 1 / self._head_us[w] for w in team}
        share = speeds[owner] / sum(speeds.values())
        why = f"worker {owner} owns {own} of the block's {placement.owner_LH.shape[1]} heads"
        return f"{why}, being {share:.0%} of its team's speed"

    def _why_op(self, block: int, head: int) -> str:
        full, forward, skip = (float(self._shares[op, block, head]) for op in (Op.FULL, Op.FORWARD, Op.SKIP))
        if block < self._first:
            return f"FORWARD in {forward:.0%} of the micro-batches, all that are not left out: the block is frozen"
        if self._all_alike:
            shares = {"FULL": full, "FORWARD": forward, "SKIP": skip}
            said = ", ".join(f"{op} in {share:.0%}" for op, share in shares.items() if share)
            return f"{said} of the micro-batches, as every head: the hardest images are trained on"
        if not full and not forward:
            return f"SKIP throughout: worth {self._stands(block, head)}"
        if full and forward:
            op = f"FULL in {full:.0%}, FORWARD in {forward:.0%} of the micro-batches: redrawn, or to make a total exact"
        else:
            op = self._why_held(block, head, full > 0)
        return f"{op}; {self._why_skip(block, head, skip)}" if skip else op

    def _why_held(self, block: int, head: int, full: bool) -> str:
        if not (self._shares[Op.FORWARD][self._first :] > 0).any():
            return f"FULL as every head that runs, worth {self._stands(block, head)}"
        worth, cut = float(self.scores.backward_LH[block, head]), self._cut
        stands, owner = f"worth {self._stands(block, head)}", int(self.plan.placement.owner_LH[block, head])
        if full and worth >= cut:
            return f"FULL: {stands}, not below the cut of {cut:.3g}"
        if full:
            return f"FULL though {stands} is below the cut of {cut:.3g}: worker {owner} has time for it"
        if worth < cut or worth <= self.scores.backward_LH[self._mostly_full].min(initial=cut):
            return f"FORWARD: {stands}, not above the cut of {cut:.3g}"
        slow = self._head_us[owner] / self._head_us.min()
        if slow >= SLOW:
            why = f"a slow device takes FORWARD, worker {owner} needs {slow:.1f} × as long"
            return f"FORWARD though {stands}: {why}"
        return f"FORWARD though {stands}: worker {owner} has its share of FULL heads, so that all finish together"

    def _why_skip(self, block: int, head: int, skip: float) -> str:
        out = f"it sits out {skip:.0%} of the micro-batches"
        if not self._sits_out_with_its_group(block, head):
            return out
        if len(self.plan.placement.holders(block)) == 1:
            return f"{out}, which pass the whole block by"
        return f"{out} with all of its worker's heads in the block, so that their messages fall away"

    def _stands(self, block: int, head: int) -> str:
        return f"{self.scores.backward_LH[block, head]:.3g} (rank {self._ranks[block, head]} of {self._ranks.size})"

    def _sits_out_with_its_group(self, block: int, head: int) -> bool:
        owner_H = self.plan.placement.owner_LH[block]
        group = owner_H == owner_H[head]
        rests = (ops[block] == Op.SKIP for ops in self.plan.cycle)
        return all(bool((rest_HM[group] == rest_HM[head]).all()) for rest_HM in rests)

    def _worker(self, rank: int) -> dict[str, Any]:
        seen, profile = self.plan.forecast, self.costs.profiles[rank]
        binding, note = next(self._bindings(rank))
        return {
            "rank": rank,
            "name": profile.device_id or profile.device,
            "node": profile.node,
            "heads": int(self.plan.placement.heads_owned[rank]),
            "busy_us": seen.busy_us[rank],
            "idle_us": seen.step_us - seen.busy_us[rank],
            "sent_bytes": sum(seen.link_bytes[rank]),
            "peak_bytes": seen.peak_bytes[rank],
            "memory_bytes": self.plan.memory_bytes[rank],
            "memory_limit_bytes": profile.base_bytes + profile.free_bytes,
            "binding": binding,
            "note": note,
        }

    def _bindings(self, rank: int) -> Iterator[tuple[str, str]]:
        """What keeps the worker from more heads, most telling first."""
        seen, step_us = self.plan.forecast, max(1, self.plan.forecast.step_us)
        if not self.plan.placement.heads_owned[rank]:
            yield "idle", self._why_idle(rank)
        busy = seen.busy_us[rank] / step_us
        if busy >= BUSY:
            yield "time", f"it computes {busy:.0%} of the step"
        more, left = self._one_more_bytes, self.costs.profiles[rank].free_bytes - self._needs[rank]
        if left < more:
            yield "memory", f"one more head needs {more / 1e9:.3g} GB, {left / 1e9:.3g} GB are left"
        taken_us, src, dst = self._busiest_link(rank)
        if taken_us >= TAKEN * step_us:
            yield "link", f"the link from worker {src} to {dst} is taken {taken_us / step_us:.0%} of the step"
        busiest = max(seen.busy_us)
        if seen.busy_us[rank] >= BUSY * busiest and busy >= 1 / 2:
            yield "time", f"it computes {busy:.0%} of the step, as much as any, and waits for the others' parts"
        yield "path", f"it computes {busy:.0%} of the step; else it waits for micro-batches on their way through others"

    def _why_idle(self, rank: int) -> str:
        if self._one_more_bytes > self.costs.profiles[rank].free_bytes:
            return "its memory holds no head"
        slow = self._head_us[rank] / self._head_us.min()
        if slow >= SLOW:
            return f"it needs {slow:.1f} × the fastest worker's time for a head: the others finish sooner without it"
        return "messages to it would cost more time than its share of the heads saves"

    @cached_property
    def _one_more_bytes(self) -> int:
        """The least that a further head takes: what one head more adds to a placement of the same workers."""
        shape, workers = self.costs.shape, self.costs.num_workers
        owner_LH = np.zeros((shape.num_blocks, shape.num_heads), dtype=np.int64)
        alone = memory_bytes_of(Placement(owner_LH, workers, 0), self.costs)
        if shape.num_heads == 1 or workers == 1:
            return int(alone[0]) // owner_LH.size
        owner_LH[-1, -1] = 1
        return int(alone[0]) - int(memory_bytes_of(Placement(owner_LH, workers, 0), self.costs)[0])

    def _busiest_link(self, rank: int) -> tuple[int, int, int]:
        """(µs taken in a step, from, to) of the worker's busiest link."""
        found = [(0, rank, rank)]
        for peer in (w for w in range(self.costs.num_workers) if w != rank):
            for src, dst in ((rank, peer), (peer, rank)):
                wire_bytes = self.plan.forecast.link_bytes[src][dst]
                taken = self.costs.transfer_us(src, dst, wire_bytes) - self.costs.transfer_us(src, dst, 0)
                found.append((taken, src, dst))
        return max(found)


def _block_us(costs: Costs, worker: int, heads: int) -> int:
    """Forward and backward of some FULL heads of one block."""
    return sum(costs.forward_us(worker, part, heads) + costs.backward_us(worker, part, heads) for part in SUBLAYERS)
