"""Order: which training images a step sees, as a pure function of (seed, epoch, position).

Every worker computes the same order by itself, and a resumed run goes on where it stopped. No state, no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

IndexArray = npt.NDArray[np.int64]
AugmentKey = tuple[int, int, int]  # (seed, epoch, position of the micro-batch in the epoch)


@dataclass(frozen=True)
class MicroBatches:
    """The order of the training images: a permutation per epoch, cut into steps of M micro-batches.

    The images of an epoch that do not fill a step sit it out; a dataset smaller than one step is repeated to fill it.
    """

    num_train: int
    micro_batch_size: int
    num_micro_batches: int
    seed: int

    def __post_init__(self) -> None:
        if min(self.num_train, self.micro_batch_size, self.num_micro_batches) < 1:
            raise ValueError(f"nothing to order: {self}")

    @property
    def steps_per_epoch(self) -> int:
        return max(1, self.num_train // (self.micro_batch_size * self.num_micro_batches))

    def indices(self, step: int) -> list[IndexArray]:
        """M arrays of `micro_batch_size` training indices; steps count from 0 over all epochs."""
        epoch, position = divmod(step, self.steps_per_epoch)
        size = self.micro_batch_size * self.num_micro_batches
        order = permutation(self.num_train, self.seed, epoch)
        of_step = np.resize(order, size) if len(order) < size else order[position * size : (position + 1) * size]
        return np.split(of_step.copy(), self.num_micro_batches)

    def augment_key(self, step: int, micro_batch: int) -> AugmentKey:
        """What decides the augmentation of one micro-batch."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return self.seed, epoch, position * self.num_micro_batches + micro_batch


@lru_cache(maxsize=2)
def permutation(num: int, seed: int, epoch: int) -> IndexArray:
    """0 … num-1, shuffled. Sorting raw bits, unlike numpy's `permutation`, is the same in every numpy version."""
    order = np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(num), kind="stable")
    order.flags.writeable = False
    return order
