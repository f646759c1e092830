"""Every model of timm that the engine says it can run is run: its gradients are plain timm's."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from scheduler.domain import Op, Placement, uniform_ops
from tests.workers.engine import costs_for, gathered_gradients, images_and_labels, run_step
from tests.workers.judge import masked_loss
from workers.anatomy import bound, foreign_architecture, refusal
from workers.partition import cut_of, model_shape

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
# timm's names without the tags of weights.
NAMES = [name for name in timm.list_models() if foreign_architecture(name) is None]


def small(name):
    """The model cut down in depth, width and tokens, in float64, its weights moved away from zeros and ones."""
    torch.manual_seed(0)
    args = {"depth": 2, "num_heads": 3, "embed_dim": 48, "num_classes": 4}
    with torch.device("meta"):
        patch = built(name, depth=1).patch_embed.patch_size[0]
    model = built(name, **args, img_size=2 * patch).double()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param) * 0.1)
    return model.eval()


def built(name, **args):
    return timm.create_model(name, pretrained=False, **args)


def kinds():
    """Supported names by what is peculiar to them."""
    found = defaultdict(list)
    with torch.device("meta"):
        for name in NAMES:
            if "sapiens2" in name:
                continue  # images that are not square; timm builds them in full depth only
            model = built(name, depth=1, num_classes=2)
            if refusal(model) is None:
                block = model.blocks[0]
                parts = (model, block, block.attn, block.mlp, block.mlp.act, block.norm1, getattr(model, "rope", None))
                found[*map(type, parts), bound(block), tuple(cut_of(model).slices), model.global_pool].append(name)
    return found


KINDS = kinds()
SUPPORTED = [name for names in KINDS.values() for name in names]


@pytest.mark.parametrize("name", SUPPORTED)
def test_gradients_are_plain_timms(name):
    model = small(name)
    shape, batches = model_shape(model), images_and_labels(model, 2, 1)
    loss = torch.stack([F.cross_entropy(model(images), labels) for images, labels in batches]).mean()
    check(model, uniform_ops(shape, 2, Op.FULL), batches, loss)


@pytest.mark.parametrize("name", [names[0] for names in KINDS.values()])
def test_of_every_kind_some_ops_are_the_judges(name):
    model = small(name)
    shape, batches = model_shape(model), images_and_labels(model, 3, 2)
    for seed in range(3):
        ops_LHM = np.random.default_rng(seed).integers(0, 3, (shape.num_blocks, shape.num_heads, 3))
        check(model, ops_LHM, batches, masked_loss(model, batches, ops_LHM))


def test_most_of_timm_is_supported_and_the_rest_says_why():
    """Nine in ten of the VisionTransformers without a convolutional stem, and all of EVA-02."""
    plain = [n for n in NAMES if timm.models.model_entrypoint(n).__module__.endswith((".vision_transformer", ".deit"))]
    assert len(set(plain) & set(SUPPORTED)) >= 0.9 * len(plain) > 150
    eva02 = set(timm.list_models("eva02*"))
    assert len(eva02) >= 12 and eva02 <= set(SUPPORTED)
    assert sum(map(len, KINDS.values())) == len(set(SUPPORTED))


def check(model, ops_LHM, batches, loss):
    blocks, heads, num_micro_batches = np.asarray(ops_LHM).shape
    placement = Placement.make(np.random.default_rng(blocks + heads).integers(0, 2, (blocks, heads)), 2)
    costs = costs_for(model, 2, num_micro_batches, len(batches[0][1]))
    params = dict(model.named_parameters())
    wanted = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    _, ran = run_step(model, placement, ops_LHM, batches, costs=costs)
    found = gathered_gradients(model, [shard for _, shard in ran])
    torch.testing.assert_close(torch.tensor(ran[0][0].loss, dtype=torch.float64), loss.detach(), **CLOSE)
    for (key, param), grad in zip(params.items(), wanted, strict=True):
        torch.testing.assert_close(found[key], torch.zeros_like(param) if grad is None else grad, **CLOSE, msg=key)
