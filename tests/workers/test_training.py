"""Several optimiser steps, real processes and the exported weights, against plain timm."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from scheduler.compiler import compile_step
from scheduler.domain import Op, Placement, uniform_ops
from scheduler.simulate import simulate
from tests.workers.engine import costs_for, images_and_labels, on_threads, tiny_vit
from tests.workers.judge import masked_loss
from tests.workers.processes import on_processes
from workers.contract import Optimiser
from workers.executor import Executor
from workers.gather import gather_state
from workers.optimiser import Adam, schedule
from workers.partition import model_shape
from workers.shard import Shard
from workers.steps import Batch, StepPrograms
from workers.transport import Gloo

SPEC = Optimiser(learning_rate=3e-3, weight_decay=0.1, warmup_fraction=0.4, clip_norm=0.05, label_smoothing=0.1)
STEPS, MICRO_BATCHES, BATCH = 3, 2, 3
OWNERS = [[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 1, 0]]


def train(rank, transport, model, owners, tables):
    """Three updates on this worker's shard; (reports, forecast bytes, the gathered state at rank 0)."""
    placement = Placement.make(owners, transport.size)
    costs = costs_for(model, transport.size, MICRO_BATCHES, BATCH)
    shard = Shard(model, placement, rank)
    executor = Executor(shard, transport, update=Adam(shard, SPEC, STEPS), label_smoothing=SPEC.label_smoothing)
    reports, forecast = [], []
    for step, ops in enumerate(tables):
        programs = compile_step(placement, ops, costs)
        steps = StepPrograms(programs, rank, costs, shard.dtype)
        batches = images_and_labels(model, MICRO_BATCHES, BATCH, seed=step)
        images, labels = ({m: pair[i] for m, pair in enumerate(batches)} for i in (0, 1))
        reports.append(executor.run(steps, Batch(images, labels)))
        forecast.append(simulate(programs, costs).link_bytes[rank])
    template = {name: t.to("meta") for name, t in model.state_dict().items()}
    state = gather_state(shard, transport, template)
    return [(r.loss, r.grad_norm, r.sent_bytes) for r in reports], forecast, state and safetensors.torch.save(state)


def train_on_gloo(rank, owners, tables):
    return train(rank, Gloo(), tiny_vit(init_values=0.3), owners, tables)


def plain_training(model, tables=None):
    """Ordinary fine-tuning with torch's own AdamW, schedule and clipping; with `tables`, of the masked model."""
    decayed = [p for n, p in model.named_parameters() if p.ndim > 1 and n not in model.no_weight_decay()]
    kept = [p for n, p in model.named_parameters() if p.ndim <= 1 or n in model.no_weight_decay()]
    groups = [{"params": decayed, "weight_decay": SPEC.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=1.0, betas=SPEC.betas)
    losses = []
    for step in range(STEPS):
        for group in optimiser.param_groups:
            group["lr"] = schedule(step, STEPS, SPEC.learning_rate, SPEC.warmup_fraction)
        batches = images_and_labels(model, MICRO_BATCHES, BATCH, seed=step)
        if tables is None:
            each = [F.cross_entropy(model(x), y, label_smoothing=SPEC.label_smoothing) for x, y in batches]
            loss = torch.stack(each).mean()
        else:
            loss = masked_loss(model, batches, tables[step], label_smoothing=SPEC.label_smoothing)
        optimiser.zero_grad()
        loss.backward()
        clip_grad_norm_(model.parameters(), SPEC.clip_norm)
        optimiser.step()
        losses.append(loss.item())
    return losses


def all_full_tables(model):
    return [uniform_ops(model_shape(model), MICRO_BATCHES, Op.FULL)] * STEPS


def assert_same_training(results, model, losses):
    reports, _, blob = results[0]
    assert [loss for loss, _, _ in reports] == pytest.approx(losses, abs=1e-9)
    state = safetensors.torch.load(blob)
    assert state.keys() == model.state_dict().keys()
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(state[name], expected, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    images, _ = images_and_labels(model, 1, 4, seed=99)[0]
    rebuilt = tiny_vit(init_values=0.3)
    rebuilt.load_state_dict(state)
    torch.testing.assert_close(rebuilt(images), model(images), rtol=0, atol=1e-8)


def test_three_all_full_updates_equal_ordinary_timm_fine_tuning():
    model = tiny_vit(init_values=0.3)
    tables = all_full_tables(model)
    results = on_threads(2, lambda rank, transport: train(rank, transport, model, OWNERS, tables))
    assert_same_training(results, model, plain_training(model))


def test_the_same_on_two_gloo_processes_with_bytes_as_simulated():
    model = tiny_vit(init_values=0.3)
    results = on_processes(2, train_on_gloo, OWNERS, all_full_tables(model))
    for reports, forecast, _ in results:
        assert [sent for _, _, sent in reports] == forecast
    assert_same_training(results, model, plain_training(model))


@pytest.mark.parametrize("seed", [0, 1])
def test_random_ops_on_two_gloo_processes_equal_the_masked_model(seed):
    # Every head is FULL somewhere in each step: torch's AdamW decays a head with zero gradient, ours leaves it alone.
    model = tiny_vit(init_values=0.3)
    rng = np.random.default_rng(seed)
    tables = [rng.integers(0, 3, (3, 4, MICRO_BATCHES)).astype(np.int8) for _ in range(STEPS)]
    for ops in tables:
        ops[..., 0] = np.where((ops == Op.FULL).any(-1), ops[..., 0], int(Op.FULL))
    results = on_processes(2, train_on_gloo, OWNERS, tables)
    for reports, forecast, _ in results:
        assert [sent for _, _, sent in reports] == forecast
    assert_same_training(results, model, plain_training(model, tables))


def test_a_head_that_is_never_full_stays_what_it_was():
    model = tiny_vit(init_values=0.3)
    ops = uniform_ops(model_shape(model), MICRO_BATCHES, Op.FULL)
    ops[1, 2] = int(Op.FORWARD)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    results = on_threads(2, lambda rank, transport: train(rank, transport, model, OWNERS, [ops] * STEPS))
    after = safetensors.torch.load(results[0][2])
    rows = slice(2 * 4, 3 * 4)  # head 2 of 4, width 4, in the q rows
    qkv = "blocks.1.attn.qkv.weight"
    assert torch.equal(after[qkv][rows], before[qkv][rows])
    assert not torch.equal(after[qkv][:4], before[qkv][:4])


def test_the_schedule_warms_up_and_ends_near_zero():
    rates = [schedule(step, 100, 1.0, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == 1.0 and rates[-1] < 1e-3
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
