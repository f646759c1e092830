"""AdamW over a shard, with warm-up, cosine decay and clipping by the norm of all workers' gradients.

A parameter without gradient in a step is left alone: no decay, no momentum. So a head that was never FULL stays
bit for bit what it was, and its moments cost no memory until it first is.
"""

from __future__ import annotations

import math

import torch

from workers.contract import Optimiser
from workers.lean import update
from workers.shard import Shard

State = dict[str, dict[str, torch.Tensor]]  # parameter's name → AdamW's exp_avg, exp_avg_sq and step


class Adam:
    """Updates a shard's parameters; call it with the global gradient norm once all gradients are in place."""

    def __init__(self, shard: Shard, spec: Optimiser, total_steps: int) -> None:
        if spec.learning_rate is None:
            raise ValueError("a learning rate is needed")
        self._spec, self._peak, self._total_steps = spec, spec.learning_rate, total_steps
        self.step = 0
        self._take(shard, {})

    def rebuild(self, shard: Shard, arrived: State) -> None:
        """Go on with what the shard holds now: state under a name stays, `arrived` is added, the rest is let go."""
        kept = {name: self.state_of(name) for name in self._params}
        self._take(shard, {**kept, **arrived})

    def state_of(self, name: str) -> dict[str, torch.Tensor]:
        """AdamW's state of a parameter; empty while it has had no gradient."""
        return dict(self._adam.state.get(self._params[name], {}))

    def forget(self) -> None:
        """Let go of all moments: training is over."""
        self._adam.state.clear()

    def _take(self, shard: Shard, state: State) -> None:
        decayed: list[torch.nn.Parameter] = []
        plain: list[torch.nn.Parameter] = []
        for name, param in shard.named_parameters():
            # As timm does: vectors and what the model names (positions, class token) are not decayed.
            (plain if param.ndim <= 1 or name in shard.no_decay else decayed).append(param)
        groups = [{"params": decayed, "weight_decay": self._spec.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self._adam = torch.optim.AdamW(groups, lr=self._peak, betas=self._spec.betas, fused=True)
        self._params = dict(shard.named_parameters())
        for name, param in self._params.items():
            if state.get(name):
                self._adam.state[param] = state[name]

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        return schedule(self.step, self._total_steps, self._peak, self._spec.warmup_fraction)

    def __call__(self, grad_norm: float) -> None:
        limit = self._spec.clip_norm
        grads = [param.grad for param in self._params.values() if param.grad is not None]
        if grads and limit and grad_norm > limit:  # a worker whose heads all sat out has none
            torch._foreach_mul_(grads, limit / (grad_norm + 1e-6))
        for group in self._adam.param_groups:
            group["lr"] = self.learning_rate
        update(self._adam)
        self.step += 1


def schedule(step: int, total_steps: int, peak: float, warmup_fraction: float) -> float:
    """Learning rate of update `step`: linear up to `peak` over the warm-up, then a half cosine towards 0."""
    warmup = max(1, round(total_steps * warmup_fraction)) if warmup_fraction else 0
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total_steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
