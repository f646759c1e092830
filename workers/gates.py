"""Slopes of the heads' gates out of the backward passes of training, so that worths stay fresh.

A gate c = 1 multiplies a head's attention output and its slice of the MLP, as in `scoring`. A backward pass computes
the gradient of both anyway, just before the output projection; ∂loss_i/∂c is their inner product with the outputs, for
image i, over its tokens and the head's width. So FULL heads are measured as they train, others are not.

That inner product costs a pass over the activations: 1–3 % of a step. It is taken on one step in `EVERY`, which one is
drawn: a fixed stride would fall in step with a plan's cycle and see the same op table for ever.

Shapes: L blocks, H heads, M micro-batches, B images, N tokens, k heads run together, F their widths, S recorded images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scheduler.domain import ModelShape, StepShape
from scheduler.scores import worth_of

EVERY = 8
MOST = 64  # recorded steps of a window: more tell nothing new, and single images are kept until its end

Watch = Callable[[Tensor], None]


@dataclass(frozen=True, eq=False)
class Recorded:
    """What one worker's FULL heads were worth in a window; `scheduler.scores.merge` takes all workers' sums and counts.

    `sums_LH` of (∂loss_i/∂gate)², or of its size for taylor, over the `counts_LH` images for which a head was FULL;
    zeros for heads of other workers. `slopes_SLH` of the images of `steps`, in the order of the steps and their
    micro-batches, NaN where a head was not FULL or not this worker's; none unless single images are kept.
    """

    sums_LH: npt.NDArray[np.float64]
    counts_LH: npt.NDArray[np.int64]
    steps: tuple[int, ...]
    slopes_SLH: npt.NDArray[np.float32]


class Gates:
    """Records on chosen steps; an executor asks `due`, has its FULL calls watched, and closes the step.

    `window` is how many steps come between two calls of `take`. With `by_sample` the slopes of single images are kept.
    """

    def __init__(
        self, shape: ModelShape, step: StepShape, kind: str, *, window: int = 1, by_sample: bool = False
    ) -> None:
        self.shape, self.step, self.kind, self.by_sample = shape, step, kind, by_sample
        self.every = max(EVERY, -(-window // MOST))
        self._pieces: dict[tuple[int, int, tuple[int, ...]], Tensor] = {}  # (micro-batch, block, heads) → B, k
        self._forget()

    def due(self, step: int) -> bool:
        """Whether to record this step, counted over the whole training; the same on every worker."""
        number, at = divmod(step, self.every)
        return at == int(np.random.Philox(key=[self.every, number]).random_raw()) % self.every

    def watch(self, block: int, part: str, micro_batch: int, heads: tuple[int, ...]) -> Watch:
        """A function to be given the outputs of a FULL call, before the projection: B, N, F, heads side by side."""
        widths = [self.shape.head_dim if part == "attn" else self.shape.mlp_dims[head] for head in heads]
        key = (micro_batch, block, heads)

        def watch(out_BNF: Tensor) -> None:
            values_BNF = out_BNF.detach()  # the tensor itself would hold its own hook, so never be freed

            def slope(grad_BNF: Tensor) -> None:
                # Sums over tokens and widths cancel much: half precision would not do for them.
                wide = torch.promote_types(grad_BNF.dtype, torch.float32)
                slopes_Bk = _by_head((values_BNF * grad_BNF).sum(1, dtype=wide), widths)
                self._pieces[key] = slopes_Bk if key not in self._pieces else self._pieces[key] + slopes_Bk

            out_BNF.register_hook(slope)

        return watch

    def close(self, step: int, num_running: int) -> None:
        """Take in what was watched during a step that so many micro-batches did not sit out."""
        num, batch = self.step.num_micro_batches, self.step.micro_batch_size
        slopes_MBLH = np.full((num, batch, self.shape.num_blocks, self.shape.num_heads), np.nan)
        if self._pieces:
            # The loss is the mean over the images that ran; with sums over micro-batches of equal size that undoes it.
            flat_Bk = torch.cat(list(self._pieces.values()), 1).double().cpu().numpy() * (num_running * batch)
            begin = 0
            for micro_batch, block, heads in self._pieces:
                slopes_MBLH[micro_batch][:, block, heads] = flat_Bk[:, begin : begin + len(heads)]
                begin += len(heads)
            self._pieces.clear()
        slopes_SLH = slopes_MBLH.reshape(num * batch, *slopes_MBLH.shape[2:])
        worth_SLH = worth_of(slopes_SLH, self.kind)
        known = np.isfinite(worth_SLH)
        self._sums_LH += worth_SLH.sum(0, where=known)
        self._counts_LH += known.sum(0)
        if self.by_sample:
            self._steps.append(step)
            self._slopes.append(slopes_SLH.astype(np.float32))

    def take(self) -> Recorded:
        """What was recorded since the last call."""
        grid = (self.shape.num_blocks, self.shape.num_heads)
        slopes_SLH = np.concatenate(self._slopes) if self._slopes else np.empty((0, *grid), dtype=np.float32)
        recorded = Recorded(self._sums_LH, self._counts_LH, tuple(self._steps), slopes_SLH)
        self._forget()
        return recorded

    def _forget(self) -> None:
        grid = (self.shape.num_blocks, self.shape.num_heads)
        self._sums_LH, self._counts_LH = np.zeros(grid), np.zeros(grid, dtype=np.int64)
        self._steps: list[int] = []
        self._slopes: list[npt.NDArray[np.float32]] = []


def _by_head(products_BF: Tensor, widths: Sequence[int]) -> Tensor:
    """Sums over each head's own columns: B, k."""
    if len(set(widths)) == 1:
        return products_BF.unflatten(1, (len(widths), -1)).sum(2)
    return torch.stack([products.sum(1) for products in products_BF.split(list(widths), 1)], 1)
