"""The controls' masked model computes what the engine's judge does, where they speak of the same thing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scheduler.domain import Op
from tests.bench.masked import Factors, features_of
from tests.workers.engine import images_and_labels, tiny_vit
from tests.workers.judge import masked_forward


def gradients(model, logits_B, labels_B):
    model.zero_grad()
    F.cross_entropy(logits_B, labels_B).backward()
    return {name: param.grad.clone() for name, param in model.named_parameters()}


@pytest.mark.parametrize("other", [Op.FORWARD, Op.SKIP])
def test_full_forward_and_skip_heads_are_the_judge_s(other):
    model = tiny_vit(init_values=0.5)
    [(images, labels)] = images_and_labels(model, 1, 3)
    # A block without a FULL head is a constant for the judge, bias included, which masks of heads alone cannot say.
    full_LH = np.array([[1, 0, 1, 0], [0, 0, 1, 1], [1, 0, 0, 0]])
    run_LH = np.ones_like(full_LH) if other == Op.FORWARD else full_LH
    factors = Factors.of(run_LH, full_LH, full_LH, "cpu")
    ops_LH = np.where(full_LH, int(Op.FULL), int(other)).astype(np.int8)
    expected, logits = masked_forward(model, images, ops_LH), model.forward_head(features_of(model, images, factors))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
    found, wanted = gradients(model, logits, labels), gradients(model, expected, labels)
    for name, grad in found.items():
        torch.testing.assert_close(grad, wanted[name], rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("weights", "path"), [(0, 1), (1, 0)])
def test_either_cut_alone_leaves_the_other_gradient(weights, path):
    model = tiny_vit()
    [(images, labels)] = images_and_labels(model, 1, 3)
    ones_LH, zeros_LH = np.ones((3, 4)), np.zeros((3, 4))
    factors = Factors.of(ones_LH, ones_LH if weights else zeros_LH, ones_LH if path else zeros_LH, "cpu")
    found = gradients(model, model.forward_head(features_of(model, images, factors)), labels)
    plain = gradients(model, model(images), labels)
    last = "blocks.2.mlp.fc2.weight"
    torch.testing.assert_close(found[last], plain[last] * weights, rtol=0, atol=1e-9)
    embed = "patch_embed.proj.weight"
    if path:
        torch.testing.assert_close(found[embed], plain[embed], rtol=0, atol=1e-9)
    else:
        assert (found[embed] - plain[embed]).abs().max() > 1e-6


def test_all_factors_one_is_plain_timm():
    model = tiny_vit()
    [(images, _)] = images_and_labels(model, 1, 3)
    ones_LH = np.ones((3, 4))
    masked = model.forward_head(features_of(model, images, Factors.of(ones_LH, ones_LH, ones_LH, "cpu")))
    torch.testing.assert_close(masked, model(images), rtol=0, atol=1e-12)
