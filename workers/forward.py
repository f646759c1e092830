"""Passes without gradient over the shards: test accuracy, and the mean outputs of heads.

Like training they are step programs; all heads run FORWARD, so that nothing is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scheduler.compiler import compile_evaluation
from scheduler.cost import Costs, stream_bytes
from scheduler.domain import SUBLAYERS, Op, Placement, uniform_ops
from workers.data import Dataset
from workers.executor import Executor
from workers.steps import Batch, StepPrograms
from workers.transport import all_sum

MICRO_BATCHES = 4
MOST_IMAGES = 64  # of a micro-batch
STREAM_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}  # of its residual stream: evaluation must not need more than training

Logits = dict[int, Tensor]


class ForwardPasses:
    """Forward passes of one worker's executor; every method is collective over the group."""

    def __init__(self, executor: Executor, placement: Placement, costs: Costs) -> None:
        self.executor, self.placement, self.costs = executor, placement, costs

    def evaluate(self, data: Dataset) -> tuple[float, float]:
        """(accuracy, mean loss) on the test images, all heads on; the same on every worker."""
        size = self._images_at_once(data.num_test)
        steps = self._programs(MICRO_BATCHES, size)
        sums = torch.zeros(2, dtype=torch.float64)
        for begin in range(0, data.num_test, MICRO_BATCHES * size):
            chunks = _chunks(begin, data.num_test, size)
            logits = self._run(steps, lambda m, chunks=chunks: data.test_batch(chunks[m]).images_BCHW)  # type: ignore[misc]
            for indices, logits_BC in _real(logits, begin, data.num_test, size):
                labels_B = data.test_batch(indices).labels_B
                sums[0] += (logits_BC.argmax(1) == labels_B).sum()
                sums[1] += F.cross_entropy(logits_BC, labels_B, reduction="sum")
        accuracy, loss = (
            all_sum(self.executor.transport, sums.to(self.executor.shard.device)) / data.num_test
        ).tolist()
        return accuracy, loss

    def measure_means(self, images_BCHW: Tensor) -> dict[tuple[int, str], Tensor]:
        """Mean output of every head over images and tokens: [block, part] → H × D, as skip_fill "mean" adds it."""
        executor, shape = self.executor, self.costs.shape
        empty = torch.zeros(shape.num_heads, shape.dim, dtype=executor.shard.dtype, device=executor.shard.device)
        keys = [(block, part) for block in range(shape.num_blocks) for part in SUBLAYERS]
        executor.means = {key: empty.clone() for key in keys}
        executor.measures_means = True
        self._run(self._programs(1, len(images_BCHW)), lambda _: images_BCHW)
        executor.measures_means = False
        # Each head was filled in by its owner alone, so that the sum is the union.
        means = all_sum(executor.transport, torch.stack([executor.means[key] for key in keys]))
        return dict(zip(keys, means, strict=True))

    def _images_at_once(self, num_test: int) -> int:
        """How many images a micro-batch has: no more than there are, than a step's or than `STREAM_BYTES` hold."""
        shape, step = self.costs.shape, self.costs.step
        room = STREAM_BYTES[self.executor.shard.device.type] // stream_bytes(shape, replace(step, micro_batch_size=1))
        return min(MOST_IMAGES, max(room, step.micro_batch_size), -(-num_test // MICRO_BATCHES))

    def _programs(self, num_micro_batches: int, batch: int) -> StepPrograms:
        step = replace(self.costs.step, num_micro_batches=num_micro_batches, micro_batch_size=batch)
        costs = Costs(self.costs.shape, step, self.costs.profiles)
        ops_LHM = uniform_ops(costs.shape, num_micro_batches, Op.FORWARD)
        programs = compile_evaluation(self.placement, ops_LHM, costs)
        return StepPrograms(programs, self.executor.rank, costs, self.executor.shard.dtype)

    def _run(self, steps: StepPrograms, images: Callable[[int], Tensor]) -> Logits:
        """Logits by micro-batch, on the CPU in float32; none on workers without the classifier."""
        found: Logits = {}
        device = self.executor.shard.device
        self.executor.logits = found.__setitem__
        self.executor.run(steps, Batch({m: images(m).to(device) for m in steps.own.image_micro_batches}, {}))
        self.executor.logits = None
        return {m: logits_BC.float().cpu() for m, logits_BC in sorted(found.items())}


def _chunks(begin: int, num_test: int, size: int) -> list[np.ndarray]:
    """Test indices of each micro-batch; the last image is repeated to fill them, as shapes are agreed beforehand."""
    wanted = np.arange(begin, begin + MICRO_BATCHES * size)
    return np.split(wanted.clip(max=num_test - 1), MICRO_BATCHES)


def _real(logits: Logits, begin: int, num_test: int, size: int) -> Iterator[tuple[np.ndarray, Tensor]]:
    """(test indices, logits) without the repeats."""
    for m, logits_BC in logits.items():
        first = begin + m * size
        indices = np.arange(first, min(first + size, num_test))
        if len(indices):
            yield indices, logits_BC[: len(indices)]
