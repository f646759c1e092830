"""What a plan needs of every worker's memory, by the phases of a job; a process holds the largest of them.

    set-up     the whole model's weights, and what profiling and scoring take beside them
    rehearsal  weights and gradients of all heads, activations of an all-FULL step
    training   weights; gradients and AdamW's moments of what trains; activations of a step of the cycle
    end        rank 0 gathers the whole model beside its own weights; by then gradients and moments are gone

Activations are what the simulated step keeps at its fullest moment; the constraint of `placement` counts all that may
be in flight, so training never takes more than that lets through. The process's own base is measured by the worker;
where there is none, as of a GPU, the whole model lies elsewhere: in set-up it is there for scoring alone, at the end
not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scheduler.cost import Costs
from scheduler.domain import SUBLAYERS, BoolArray, Forecast, ModelShape, Op, OpTable, Placement
from scheduler.placement import memory_bytes_of
from scheduler.placement.instance import WEIGHT_BYTES_PER_PARAM

PROFILED_COPIES = 6  # of a block, while the optimiser is timed: weights, gradients and moments of two blocks


@dataclass(frozen=True)
class Need:
    """Bytes of one worker: of its process, and of the model by phase."""

    base: int
    set_up: int
    rehearsal: int
    training: int
    end: int

    @property
    def model(self) -> int:
        return max(self.set_up, self.rehearsal, self.training, self.end)

    @property
    def total(self) -> int:
        return self.base + self.model


def needs_of(
    placement: Placement,
    cycle: Sequence[OpTable],
    costs: Costs,
    forecast: Forecast,
    all_full: Forecast,
    *,
    scored: bool,
) -> list[Need]:
    """What each worker needs under a plan; `scored` where heads were chosen by what they are worth."""
    shape = costs.shape
    trained_LH = np.any([(ops == Op.FULL).any(axis=2) for ops in cycle], axis=0)
    states = _states(placement, costs, trained_LH)
    able_LH = np.arange(shape.num_blocks)[:, None] >= np.full_like(trained_LH, shape.num_frozen, dtype=np.int64)
    full, weights = (_states(placement, costs, able_LH & value) for value in (True, False))
    whole = WEIGHT_BYTES_PER_PARAM * num_params(shape)
    block = WEIGHT_BYTES_PER_PARAM * (sum(shape.head_params) + shape.norm_params)
    scoring = shape.num_blocks * sum(costs.kept_bytes(part, shape.num_heads) for part in SUBLAYERS) if scored else 0
    return [
        Need(
            base=profile.base_bytes,
            set_up=(whole if profile.base_bytes or scored else 0) + max(PROFILED_COPIES * block, scoring),
            # Of the four numbers per trained parameter two are there: weight and gradient.
            rehearsal=weights[w] + (full[w] - weights[w]) // 3 + all_full.peak_bytes[w],
            training=states[w] + forecast.peak_bytes[w],
            end=weights[w] + (whole if w == 0 and profile.base_bytes else 0),
        )
        for w, profile in enumerate(costs.profiles)
    ]


def num_params(shape: ModelShape) -> int:
    """Of the whole model."""
    ends = shape.embed_params + shape.classifier_params
    return shape.num_blocks * (sum(shape.head_params) + shape.norm_params) + ends


def _states(placement: Placement, costs: Costs, trained_LH: BoolArray) -> list[int]:
    """Weights, and gradients and moments of what trains: what the constraint counts, without activations."""
    bound = memory_bytes_of(placement, costs, trained_LH)
    return [need - _in_flight(placement, costs, trained_LH, w) for w, need in enumerate(bound)]


def _in_flight(placement: Placement, costs: Costs, trained_LH: BoolArray, worker: int) -> int:
    """The activations that the constraint counts."""
    counts = (trained_LH & (placement.owner_LH == worker)).sum(axis=1)
    kept = (costs.kept_bytes(part, int(n)) for n in counts if n for part in SUBLAYERS)
    return costs.max_in_flight * sum(kept)
