"""AdamW over a shard, with warm-up, cosine decay and clipping by the norm of all workers' gradients.

A parameter without gradient in a step is left alone: no decay, no momentum. So a head that was never FULL stays
bit for bit what it was, and its moments cost no memory until it first is.
"""

from __future__ import annotations

import math

import torch

from workers.contract import Optimiser
from workers.shard import Shard


class Adam:
    """Updates a shard's parameters; call it with the global gradient norm once all gradients are in place."""

    def __init__(self, shard: Shard, spec: Optimiser, total_steps: int) -> None:
        decayed: list[torch.nn.Parameter] = []
        kept: list[torch.nn.Parameter] = []
        for name, param in shard.named_parameters():
            # As timm does: vectors and what the model names (positions, class token) are not decayed.
            (kept if param.ndim <= 1 or name in shard.no_decay else decayed).append(param)
        groups = [{"params": decayed, "weight_decay": spec.weight_decay}, {"params": kept, "weight_decay": 0.0}]
        self._adam = torch.optim.AdamW(groups, lr=spec.learning_rate, betas=spec.betas, fused=True)
        self._params = [*decayed, *kept]
        self._spec, self._total_steps = spec, total_steps
        self.step = 0

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        return schedule(self.step, self._total_steps, self._spec.learning_rate, self._spec.warmup_fraction)

    def __call__(self, grad_norm: float) -> None:
        limit = self._spec.clip_norm
        if limit and grad_norm > limit:
            torch._foreach_mul_([p.grad for p in self._params if p.grad is not None], limit / (grad_norm + 1e-6))
        for group in self._adam.param_groups:
            group["lr"] = self.learning_rate
        self._adam.step()
        self.step += 1


def schedule(step: int, total_steps: int, peak: float, warmup_fraction: float) -> float:
    """Learning rate of update `step`: linear up to `peak` over the warm-up, then a half cosine towards 0."""
    warmup = max(1, round(total_steps * warmup_fraction)) if warmup_fraction else 0
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total_steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
