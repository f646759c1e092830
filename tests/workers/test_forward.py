"""Evaluation equals the plain model; mean outputs equal the judge's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from scheduler.domain import Placement
from tests.workers.engine import costs_for, images_and_labels, on_threads, tiny_vit
from tests.workers.judge import heads_of
from workers.data import Batch
from workers.executor import Executor
from workers.forward import MICRO_BATCHES, MOST_IMAGES, ForwardPasses
from workers.shard import Shard

OWNERS = [[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 1, 0]]


class Images:
    """A test split in memory."""

    def __init__(self, model, count):
        ((self.images, self.labels),) = images_and_labels(model, 1, count)
        self.num_test = count

    def test_batch(self, indices):
        return Batch(self.images[indices], self.labels[indices])


def passes_of(rank, transport, model):
    placement = Placement.make(OWNERS, transport.size)
    costs = costs_for(model, transport.size, 2, 2)
    return ForwardPasses(Executor(Shard(model, placement, rank), transport), placement, costs)


@pytest.mark.parametrize("count", [1, 7, MOST_IMAGES, MICRO_BATCHES * MOST_IMAGES + 3])
def test_accuracy_and_loss_equal_the_plain_models_on_every_worker(count):
    model = tiny_vit()
    data = Images(model, count)
    results = on_threads(2, lambda rank, transport: passes_of(rank, transport, model).evaluate(data))
    with torch.no_grad():
        logits = model(data.images)
    accuracy = (logits.argmax(1) == data.labels).double().mean().item()
    loss = F.cross_entropy(logits, data.labels).item()
    for found in results:
        assert found == (pytest.approx(accuracy), pytest.approx(loss, rel=1e-5))


def test_mean_outputs_equal_the_judges():
    model = tiny_vit()
    images = images_and_labels(model, 1, 5)[0][0]
    results = on_threads(2, lambda rank, transport: passes_of(rank, transport, model).measure_means(images))
    with torch.no_grad():
        x = model._pos_embed(model.patch_embed(images))
        for index, block in enumerate(model.blocks):
            for part, norm in (("attn", block.norm1), ("mlp", block.norm2)):
                outs, bias = heads_of(getattr(block, part), part, 4, norm(x))
                expected = torch.stack([out.mean((0, 1)) for out in outs])
                for means in results:
                    torch.testing.assert_close(means[index, part], expected, rtol=0, atol=1e-10)
                x = x + sum(outs) + bias
    assert torch.isfinite(x).all()
