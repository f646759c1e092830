"""What heads are worth in a job: scored on the whole model before training, refreshed out of its backward passes.

    score ──► announcement            gates ── record on some steps ──► merged over the workers ──► report of the window

All workers keep the same running worth, so that their reports are equal. Jobs that choose for every micro-batch
(`hold: none`) keep a table of single images beside it, where the score is made of their slopes.

Axes: L blocks, H heads, B images, T steps, M micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scheduler.domain import ModelShape, StepShape
from scheduler.scores import BY_SAMPLE, merge, refresh
from workers.anatomy import Model
from workers.contract import JobSpec
from workers.data import Dataset
from workers.gates import Gates, Recorded
from workers.gather import gather_json
from workers.order import MicroBatches
from workers.scoring import score
from workers.transport import Transport
from workers.worths import GroupWorths

SCORED_IMAGES = 256
SCORED_BY_SAMPLE = 4096  # where single images are chosen for, each one that is known counts
COMING_STEPS = 100  # steps of a window whose micro-batches are told apart: no cycle of op tables is longer


class LiveWorth:
    """The running worth of every head; `score`, `learn` and `coming` are collective."""

    def __init__(
        self, spec: JobSpec, shape: ModelShape, step: StepShape, transport: Transport, device: torch.device
    ) -> None:
        self.spec, self.transport, self.device = spec, transport, device
        words = spec.method.words
        self.kind = words["score"]
        self.by_sample = spec.method.chooses_heads and words["hold"] == "none" and self.kind in BY_SAMPLE
        self.grid = (shape.num_blocks, shape.num_heads)
        recorded = self.kind in BY_SAMPLE and spec.method.chooses_heads
        self.gates = Gates(shape, step, self.kind, window=spec.window, by_sample=self.by_sample) if recorded else None
        self._images: GroupWorths | None = None
        self._recorded: Recorded | None = None
        self._worth_LH: npt.NDArray[np.float64] = np.ones(self.grid)
        self._forward_LH: npt.NDArray[np.float64] = np.ones(self.grid)

    def score(self, model: Model, data: Dataset, run_dir: Path) -> dict[str, Any]:
        """Score this worker's share of the images: the first ones of an order of their own. What to announce.

        Where no head is chosen, all are worth the same, and no image is read.
        """
        if not self.spec.method.chooses_heads:
            ones = np.ones(self.grid).tolist()
            return {"backward": ones, "forward": ones, "samples": 1}
        size, rank, workers = self.spec.micro_batch_size, self.transport.rank, self.transport.size
        order = MicroBatches(data.num_train, size, 1, self.spec.seed + 1)
        images = min(data.num_train, SCORED_BY_SAMPLE if self.by_sample else SCORED_IMAGES)
        batches = [range(worker, math.ceil(images / size), workers) for worker in range(workers)]
        kept: list[npt.NDArray[np.float64]] = []
        backward_LH, forward_LH, samples = score(
            model.to(self.device),
            (data.train_batch(order.indices(batch)[0]) for batch in batches[rank]),
            self.kind,
            label_smoothing=self.spec.optimiser.label_smoothing,
            keep=(lambda slopes_BLH: kept.append(slopes_BLH.numpy())) if self.by_sample else None,
        )
        if self.by_sample:
            self._images = GroupWorths(self.transport, data.num_train, self.grid, self.kind, run_dir, self.device)
            self._images.learn_scored(order, batches, kept)
        mine = {"backward": backward_LH.tolist(), "forward": forward_LH.tolist(), "samples": samples}
        scored = gather_json(self.transport, mine, self.device)
        self._worth_LH = merge((of["backward"], of["samples"]) for of in scored)
        self._forward_LH = merge((of["forward"], of["samples"]) for of in scored)
        return mine

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of the worths; single images' at rank 0."""
        table = {} if self._images is None or self._images.table is None else self._images.table.state()
        means = {"backward": torch.from_numpy(self._worth_LH), "forward": torch.from_numpy(self._forward_LH)}
        return {**means, **{f"images.{name}": tensor for name, tensor in table.items()}}

    def restore(self, state: Mapping[str, Tensor], num_train: int, run_dir: Path) -> dict[str, Any]:
        """Go on from `state`, in the place of `score`; what to announce: of every worker the same."""
        self._worth_LH, self._forward_LH = state["backward"].numpy().copy(), state["forward"].numpy().copy()
        if self.by_sample:
            self._images = GroupWorths(self.transport, num_train, self.grid, self.kind, run_dir, self.device)
            if self._images.table is not None:
                self._images.table.restore(
                    {name.removeprefix("images."): t for name, t in state.items() if name.startswith("images.")}
                )
        return {"backward": self._worth_LH.tolist(), "forward": self._forward_LH.tolist(), "samples": 1}

    def take(self) -> Any:
        """What this worker's gates recorded in a window, to be gathered; None where nothing records."""
        self._recorded = None if self.gates is None else self.gates.take()
        if self._recorded is None:
            return None
        return [self._recorded.sums_LH.tolist(), self._recorded.counts_LH.tolist()]

    def learn(self, taken: Sequence[Any], order: MicroBatches) -> None:
        """Refresh the worth by what all workers took."""
        if self._recorded is None:
            return
        self._worth_LH = refresh(self._worth_LH, merge(taken))
        if self._images is not None:
            self._images.learn_recorded(order, self._recorded)

    def report(self, order: MicroBatches, begin: int, end: int) -> dict[str, Any]:
        """For the plan of the steps from `begin` up to `end`."""
        coming = None
        if self._images is not None and begin < end:
            coming = self._images.coming(order, begin, min(end - begin, COMING_STEPS)).round(4).tolist()
        worth = {"backward": self._worth_LH.tolist()} if self.gates is not None else None
        return {"worth": worth, "worth_TLHM": coming}
