"""Which images a step's micro-batches hold when the planner leaves whole micro-batches out: the hardest come first.

The plan says how many micro-batches of a step are FULL, from the first on. Within a step the images are sorted by what
they lost when they were last seen, those never seen before all others; so an image that sat out comes to its turn in
the next epoch. Every worker hears every image's loss in the tallies, and sorts alike.

The images of a step are the same as without sorting, and its order is fixed when it is first asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

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

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: the losses, and the order of the step that is fetched ahead, for it is fixed."""
        fixed = {f"fixed.{step}": torch.from_numpy(np.stack(indices)) for step, indices in self._fixed.items()}
        return {"loss_N": torch.from_numpy(self.loss_N.copy()), **fixed}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`."""
        self.loss_N = state["loss_N"].numpy().copy()
        for name, indices_MB in state.items():
            if name != "loss_N":
                self._fixed[int(name.removeprefix("fixed."))] = list(indices_MB.numpy().copy())
