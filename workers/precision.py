"""In which numbers a job computes and sends, and what it keeps: `precision` of a spec, and how the planner hears it.

No torch: a dry run asks as well.
"""

from __future__ import annotations

from typing import Literal

from scheduler.domain import StepShape
from workers.method import Frozen


class Precision(Frozen):
    """Weights, their gradients and AdamW's moments are float32 whatever this says.

    `compute` is what the heads, the embedding and the classifier compute in, in evaluation too: "auto" is bf16 on GPUs
    that have it, else fp32. `wire` is what the residual stream and its gradient travel in. With `recompute` heads that
    train keep their input alone, and their backward pass runs their forward pass again: less memory, more compute.
    """

    compute: Literal["auto", "fp32", "bf16"] = "auto"
    wire: Literal["fp32", "bf16"] = "fp32"
    recompute: bool = False


def step_shape(num_micro_batches: int, micro_batch_size: int, precision: Precision, *, bf16: bool) -> StepShape:
    """A job's step, on workers that compute in bfloat16 or do not."""
    return StepShape(
        num_micro_batches,
        micro_batch_size,
        wire_itemsize=2 if precision.wire == "bf16" else 4,
        compute_itemsize=2 if bf16 else 4,
        recompute=precision.recompute,
    )
