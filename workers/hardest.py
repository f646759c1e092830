"""Which images a step's micro-batches hold when the planner leaves whole micro-batches out: the hardest come first.

The plan says how many micro-batches of a step are FULL, from the first on. Within a step the images are sorted by what
they lost when they were last seen, those never seen before all others; so an image that sat out comes to its turn in
the next epoch. Every worker hears every image's loss in the tallies, and sorts alike.

The images of a step are the same as without sorting, and its order is fixed when it is first asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from workers.order import AugmentKey, IndexArray, MicroBatches


class HardestFirst:
    """An order whose micro-batches are sorted; `learn` after every step, with what it asked for."""

    def __init__(self, order: MicroBatches) -> None:
        self.order = order
        self.loss_N = np.full(order.num_train, np.inf)  # an image never seen is harder than any
        self._fixed: dict[int, list[IndexArray]] = {}

    def indices(self, step: int) -> list[IndexArray]:
        """M arrays of training indices; not for several threads."""
        if step not in self._fixed:
            drawn = self.order.indices(step)
            flat = np.concatenate(drawn)
            self._fixed[step] = np.split(flat[np.argsort(-self.loss_N[flat], kind="stable")], len(drawn))
        return self._fixed[step]

    def augment_key(self, step: int, micro_batch: int) -> AugmentKey:
        return self.order.augment_key(step, micro_batch)

    def learn(self, step: int, losses_MB: npt.NDArray[np.float64], running: Sequence[int]) -> None:
        """Take in the losses of a step's micro-batches that ran; the others sat out."""
        indices = self._fixed.pop(step)
        for m in running:
            self.loss_N[indices[m]] = losses_MB[m]
