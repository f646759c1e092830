"""Which torch types a job's `precision` means on a device and on the wire."""

from __future__ import annotations

import torch

from scheduler.domain import StepShape
from scheduler.errors import UserError
from workers.precision import Precision


def compute_type(precision: Precision, device: torch.device) -> torch.dtype | None:
    """What autocast is to compute in; None for the weights' own type.

    Raises UserError "bf16_unsupported" where bfloat16 is asked for and the GPU does not have it. Processors all do it,
    though those without instructions for it slowly.
    """
    if precision.compute == "fp32" or (precision.compute == "auto" and device.type != "cuda"):
        return None
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        if precision.compute == "auto":
            return None
        raise UserError(
            f"The GPU {torch.cuda.get_device_name(device)} has no bfloat16.",
            code="bf16_unsupported",
            param="precision.compute",
            remedy="Set precision.compute to 'fp32' or 'auto', or run on GPUs from CUDA's capability 8.0 on.",
        )
    return torch.bfloat16


def wire_type(step: StepShape, own: torch.dtype) -> torch.dtype:
    """What the residual stream travels in, between workers that hold it in `own`."""
    return torch.bfloat16 if step.wire_itemsize == torch.bfloat16.itemsize else own
