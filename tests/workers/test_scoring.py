"""Scores against plain autograd on the timm model, image by image; profiles are usable."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from scheduler.domain import StepShape
from scheduler.scores import KINDS, merge
from tests.workers.engine import images_and_labels, on_threads, tiny_vit
from tests.workers.judge import heads_of
from workers.partition import model_shape
from workers.profiling import keep_freed_memory, measure_links, profile_device
from workers.scoring import gate_slopes, score, weight_sizes

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def loss_with_gates(model, image, label, gates_LH):
    x = model._pos_embed(model.patch_embed(image))
    for block, gates_H in zip(model.blocks, gates_LH, strict=True):
        for part, norm, scale in (("attn", block.norm1, block.ls1), ("mlp", block.norm2, block.ls2)):
            outs, bias = heads_of(getattr(block, part), part, 4, norm(x))
            total = sum(gate * out for gate, out in zip(gates_H, outs, strict=True))
            x = x + scale(total if bias is None else total + bias)
    return F.cross_entropy(model.forward_head(model.norm(x)), label)


def slopes_one_by_one(model, batches):
    """∂loss/∂gate of every image by a loop over images: [images, L, H]."""
    slopes = []
    for images, labels in batches:
        for image, label in zip(images, labels, strict=True):
            gates = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
            loss = loss_with_gates(model, image[None], label[None], gates)
            slopes.append(torch.autograd.grad(loss, gates)[0])
    return torch.stack(slopes)


@pytest.mark.parametrize(("kind", "measure"), [("fisher", torch.square), ("taylor", torch.abs)])
def test_fisher_and_taylor_are_sums_over_images_of_a_gates_slope(kind, measure):
    model = tiny_vit(init_values=0.5, mlp_ratio=1.64)
    batches = images_and_labels(model, 2, 3)
    kept = []
    backward, forward, samples = score(model, batches, kind, keep=kept.append)
    expected = slopes_one_by_one(model, batches)
    assert samples == 6
    torch.testing.assert_close(torch.cat(kept), expected, **EXACT)
    torch.testing.assert_close(backward, measure(expected).sum(0), **EXACT)
    torch.testing.assert_close(forward, backward if kind == "taylor" else 6 * weight_sizes(model), **EXACT)


def test_slopes_are_finite_differences_of_the_loss():
    model = tiny_vit()
    [(images, labels)] = images_and_labels(model, 1, 1)
    [slopes_BLH] = gate_slopes(model, [(images, labels)])
    for block, head in ((0, 1), (2, 3)):
        losses = []
        for step in (1e-5, -1e-5):
            gates = torch.ones(3, 4, dtype=torch.float64)
            gates[block, head] += step
            losses.append(loss_with_gates(model, images, labels, gates).item())
        assert slopes_BLH[0, block, head].item() == pytest.approx((losses[0] - losses[1]) / 2e-5, abs=1e-8)


def test_slopes_follow_the_smoothed_loss():
    model = tiny_vit()
    [(images, labels)] = images_and_labels(model, 1, 2)
    found = torch.cat(list(gate_slopes(model, [(images, labels)], label_smoothing=0.3)))
    uniform = [
        torch.stack([next(gate_slopes(model, [(images[i : i + 1], torch.tensor([k]))]))[0] for k in range(5)]).mean(0)
        for i in range(2)
    ]
    plain = torch.cat(list(gate_slopes(model, [(images, labels)])))
    torch.testing.assert_close(found, 0.7 * plain + 0.3 * torch.stack(uniform), **EXACT)


def test_gradient_is_the_norm_of_the_gradient_of_a_heads_weights():
    model = tiny_vit(mlp_ratio=1.64)
    shape, batches = model_shape(model), images_and_labels(model, 2, 3)
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for images, labels in batches:
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        for index, block in enumerate(model.blocks):
            first = 0
            for head, width in enumerate(shape.mlp_dims):
                rows, mlp = slice(4 * head, 4 * head + 4), slice(first, first + width)
                first += width
                qkv, qkv_bias = block.attn.qkv.weight.grad.chunk(3), block.attn.qkv.bias.grad.chunk(3)
                parts = [t[rows] for t in (*qkv, *qkv_bias)] + [block.attn.proj.weight.grad[:, rows]]
                parts += [block.mlp.fc1.weight.grad[mlp], block.mlp.fc1.bias.grad[mlp]]
                parts += [block.mlp.fc2.weight.grad[:, mlp]]
                expected[index, head] += torch.cat([part.flatten() for part in parts]).norm()
    backward, forward, samples = score(model, batches, "gradient")
    assert samples == 2
    torch.testing.assert_close(backward, expected, **EXACT)
    torch.testing.assert_close(forward, 2 * weight_sizes(model), **EXACT)


def test_activation_is_the_norm_of_what_a_head_adds_to_the_residual():
    model = tiny_vit(init_values=0.5, mlp_ratio=1.64)
    batches = images_and_labels(model, 2, 3)
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for images, _ in batches:
        x = model._pos_embed(model.patch_embed(images))
        for index, block in enumerate(model.blocks):
            for part, norm, scale in (("attn", block.norm1, block.ls1), ("mlp", block.norm2, block.ls2)):
                outs, bias = heads_of(getattr(block, part), part, 4, norm(x))
                expected[index] += torch.stack([(scale.gamma * out).norm(dim=2).mean(1).sum() for out in outs])
                x = x + scale(sum(outs) + bias)
    backward, forward, samples = score(model, batches, "activation")
    assert samples == 6
    torch.testing.assert_close(backward, expected.detach(), **EXACT)
    assert torch.equal(forward, backward)


@pytest.mark.parametrize("kind", ["weight", "random"])
def test_scores_that_look_at_no_image_read_none(kind):
    backward, forward, samples = score(tiny_vit(), unreadable(), kind)
    assert samples == 1 and torch.equal(forward, backward) and (backward > 0).all()


def unreadable():
    raise AssertionError("an image was read")
    yield


@pytest.mark.parametrize("kind", KINDS)
def test_scoring_leaves_the_model_as_it_was(kind):
    model = tiny_vit()
    model.pos_embed.requires_grad_(False)
    batch = images_and_labels(model, 1, 2)
    before = model(batch[0][0])
    score(model, batch, kind)
    assert torch.equal(model(batch[0][0]), before)
    assert not model.pos_embed.requires_grad and model.cls_token.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_is_as_it_was_after_an_image_that_fails():
    model = tiny_vit()
    with pytest.raises(AssertionError, match="an image was read"):
        score(model, unreadable(), "fisher")
    with pytest.raises(AssertionError, match="an image was read"):
        score(model, unreadable(), "activation")
    assert all(p.requires_grad for p in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_workers_that_share_the_images_merge_into_those_of_one(kind):
    model = tiny_vit()
    batches = images_and_labels(model, 3, 2)
    workers = [score(model, batches[:2], kind), score(model, batches[2:], kind), score(model, batches, kind)]
    for which in (0, 1):
        apart, whole = (
            merge((scored[which].tolist(), scored[2]) for scored in of) for of in (workers[:2], workers[2:])
        )
        assert apart == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize("kind", ["fisher", "taylor", "gradient", "activation"])
def test_a_worker_without_images_adds_nothing(kind):
    backward, forward, samples = score(tiny_vit(), [], kind)
    assert samples == 0 and not backward.any() and not forward.any()


def test_an_unknown_score_is_refused():
    with pytest.raises(ValueError, match="'magnitude' is not a score"):
        score(tiny_vit(), [], "magnitude")


def test_size_grows_with_a_heads_weights_alone():
    model = tiny_vit()
    before = weight_sizes(model)
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[2 * 8 : 3 * 8] *= 10  # head 2 of 4 has rows 16 to 23 of 32
    grown = weight_sizes(model) / before
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
