"""Meter: what selections spend of all-FULL's compute and bytes on one placement, by the exact judges."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from scheduler.cost import Costs
from scheduler.domain import FloatArray, Op, OpTable, Placement, step_flops, uniform_ops
from scheduler.selection.traffic import Traffic
from scheduler.transfers import step_bytes


class Meter:
    """FLOPs and bytes of steps; all-FULL's once, and the quick byte counter."""

    def __init__(self, placement: Placement, costs: Costs, embed_grad: bool) -> None:
        self.placement, self.costs, self.embed_grad = placement, costs, embed_grad
        self.num_micro_batches = costs.step.num_micro_batches
        self.backward_weight = costs.backward_weight  # of a head's forward FLOPs
        self.traffic = Traffic(placement, costs.shape, costs.step, embed_grad)
        full = uniform_ops(costs.shape, self.num_micro_batches, Op.FULL)
        self.all_full_flops, self.all_full_bytes = self.flops(full), self.bytes(full)
        forward = [costs.shape.head_forward_flops(h, costs.step.micro_batch_size) for h in range(costs.shape.num_heads)]
        self.forward_LH = np.tile(np.array(forward, dtype=np.int64), (costs.shape.num_blocks, 1))

    @cached_property
    def trunk_flops(self) -> int:
        return self.num_micro_batches * self.costs.shape.trunk_flops(self.costs.step.micro_batch_size)

    def head_flops(self, compute: float) -> float:
        """What a compute budget leaves for the heads of a step, after the trunk."""
        return compute * self.all_full_flops - self.trunk_flops

    def flops(self, ops_LHM: OpTable) -> int:
        return step_flops(self.costs.shape, self.costs.step, ops_LHM)

    def bytes(self, ops_LHM: OpTable) -> int:
        costs = self.costs
        return int(step_bytes(self.placement, ops_LHM, costs.shape, costs.step, self.embed_grad).sum())

    def quick_bytes(self, cycle: Sequence[OpTable]) -> float:
        """Mean bytes of a step."""
        return sum(map(self.traffic.step_bytes, cycle)) / len(cycle)

    def flops_of(self, cycle: Sequence[OpTable]) -> FloatArray:
        return np.array([self.flops(ops) for ops in cycle], dtype=np.float64)

    def keeps(self, cycle: Sequence[OpTable], compute: float, max_bytes: float) -> bool:
        """Whether the mean step keeps both budgets, by `step_flops` and `step_bytes`."""
        if self.flops_of(cycle).mean() > compute * self.all_full_flops * (1 + 1e-12):
            return False
        return sum(map(self.bytes, cycle)) <= max_bytes * self.all_full_bytes * len(cycle)
