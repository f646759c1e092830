"""Fisher sums against a gate at a time, image by image; profiles are usable."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from scheduler.domain import StepShape
from tests.workers.engine import images_and_labels, on_threads, tiny_vit
from tests.workers.judge import attn_heads, mlp_heads
from workers.partition import model_shape
from workers.profiling import keep_freed_memory, measure_links, profile_device
from workers.scoring import fisher_sums, weight_magnitudes


def loss_with_gates(model, image, label, gates_LH):
    x = model._pos_embed(model.patch_embed(image))
    for block, gates_H in zip(model.blocks, gates_LH, strict=True):
        for heads_of, norm, scale in ((attn_heads, block.norm1, block.ls1), (mlp_heads, block.norm2, block.ls2)):
            outs, bias = heads_of(block, norm(x))
            total = sum(gate * out for gate, out in zip(gates_H, outs, strict=True))
            x = x + scale(total if bias is None else total + bias)
    return F.cross_entropy(model.forward_head(model.norm(x)), label)


def test_fisher_is_the_sum_of_squared_slopes_of_a_gate_per_image():
    model = tiny_vit(init_values=0.5, mlp_ratio=1.64)
    batches = images_and_labels(model, 2, 3)
    total, count = fisher_sums(model, batches)
    expected = torch.zeros_like(total)
    for images, labels in batches:
        for image, label in zip(images, labels, strict=True):
            gates = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
            loss = loss_with_gates(model, image[None], label[None], gates)
            expected += torch.autograd.grad(loss, gates)[0].square()
    assert count == 6
    torch.testing.assert_close(total, expected, rtol=1e-9, atol=1e-12)


def test_scoring_leaves_the_model_as_it_was():
    model = tiny_vit()
    model.pos_embed.requires_grad_(False)
    batch = images_and_labels(model, 1, 2)
    before = model(batch[0][0])
    fisher_sums(model, batch)
    assert torch.equal(model(batch[0][0]), before)
    assert not model.pos_embed.requires_grad and model.cls_token.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_magnitude_grows_with_a_heads_weights_alone():
    model = tiny_vit()
    before = weight_magnitudes(model)
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[2 * 8 : 3 * 8] *= 10  # head 2 of 4 has rows 16 to 23 of 32
    grown = weight_magnitudes(model) / before
    assert grown[1, 2] > 2
    grown[1, 2] = 1
    torch.testing.assert_close(grown, torch.ones_like(grown))


def test_a_profile_has_curves_that_rise_and_links_to_every_peer():
    model = tiny_vit()
    shape = model_shape(model)
    profiles = on_threads(3, lambda rank, transport: profile_device(model, StepShape(2, 4), transport, sharers=3))
    for rank, profile in enumerate(profiles):
        for curve in (
            profile.attn_forward_us,
            profile.attn_backward_us,
            profile.mlp_forward_us,
            profile.mlp_backward_us,
        ):
            assert len(curve) == shape.num_heads + 1 and curve[0] == 0 and list(curve) == sorted(curve) and curve[1] > 0
        assert [link is None for link in profile.links] == [peer == rank for peer in range(3)]
        assert min(profile.embed_us, profile.classify_us, profile.sum_us, profile.update_us, profile.free_bytes) > 0


def test_a_worker_alone_has_no_links():
    assert on_threads(1, lambda rank, transport: measure_links(transport)) == [(None,)]


def test_freed_memory_can_be_kept_here():
    assert keep_freed_memory()
