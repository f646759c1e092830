"""Narrower numbers and forward passes run again: what is sent, what is kept, and what gradients become of it."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.compiler import compile_step
from scheduler.cost import Costs
from scheduler.domain import Op, Placement, StepShape, step_flops, uniform_ops
from scheduler.errors import UserError
from scheduler.placement.memory import memory_bytes_of
from scheduler.selection.traffic import Traffic
from scheduler.simulate import simulate
from scheduler.transfers import step_bytes
from tests.workers.engine import costs_for, gathered_gradients, images_and_labels, on_threads, run_step, saved, tiny_vit
from tests.workers.judge import masked_loss
from tests.workers.test_engine import cases
from tests.workers.test_families import KINDS, small
from workers.casting import compute_type, wire_type
from workers.contract import JobSpec, Optimiser
from workers.executor import Executor
from workers.forward import ForwardPasses
from workers.gates import EVERY, Gates
from workers.lora import attach
from workers.method import Lora
from workers.optimiser import Adam
from workers.partition import model_shape
from workers.precision import Precision, step_shape
from workers.profiling import _Stopwatch
from workers.shard import BlockShard, Shard
from workers.steps import Batch, StepPrograms

NARROW = {"wire_itemsize": 2}
AGAIN = {"recompute": True}
STEPS = 3


def trained(model, placement, tables, batches, costs, *, autocast=None, steps=STEPS, **options):
    """Shards and reports of every step, after some with AdamW."""

    def work(rank, transport):
        shard = Shard(model, placement, rank)
        update = Adam(shard, Optimiser(learning_rate=1e-2, warmup_fraction=0.0), steps + 1)
        executor, reports = Executor(shard, transport, update=update, autocast=autocast), []
        for step in range(steps):
            programs = compile_step(placement, tables[step % len(tables)], costs, **options)
            images, labels = ({m: pair[i] for m, pair in enumerate(batches)} for i in (0, 1))
            reports.append(executor.run(StepPrograms(programs, rank, costs, shard.dtype), Batch(images, labels)))
        return shard, reports

    return zip(*on_threads(placement.num_workers, work), strict=True)


def assert_replicas_alike(shards):
    """Everybody who holds a trunk parameter holds the same bits of it."""
    seen = {}
    for shard in shards:
        for unit in shard.units():
            for name, param in shard.unit(unit):
                assert torch.equal(seen.setdefault(name, param), param), name
    return seen


def relative(found, expected):
    """‖found − expected‖ / ‖expected‖ over all gradients."""
    names = [name for name in expected if found[name] is not None]
    apart = sum((found[name] - expected[name]).double().square().sum() for name in names)
    return float((apart / sum(expected[name].double().square().sum() for name in names)).sqrt())


@settings(max_examples=40, deadline=None)
@given(case=cases(), embed_grad=st.booleans(), skip_fill=st.sampled_from(["zero", "rescale"]), again=st.booleans())
def test_over_a_narrow_wire_replicas_stay_bit_equal_and_bytes_are_those_forecast(case, embed_grad, skip_fill, again):
    model, placement, ops = case
    batches, options = images_and_labels(model, ops.shape[2], 2), {"embed_grad": embed_grad, "skip_fill": skip_fill}
    costs = costs_for(model, placement.num_workers, ops.shape[2], 2, **NARROW, recompute=again)
    tables = [ops, np.roll(ops, 1, axis=1)]
    shards, reports = trained(model, placement, tables, batches, costs, **options)
    assert_replicas_alike(shards)
    for step, of_step in enumerate(zip(*reports, strict=True)):
        assert len({(report.loss, report.grad_norm) for report in of_step}) == 1
        table = tables[step % 2]
        forecast = simulate(compile_step(placement, table, costs, **options), costs)
        exact = step_bytes(placement, table, costs.shape, costs.step, embed_grad)
        assert tuple(report.sent_bytes for report in of_step) == forecast.link_bytes == tuple(map(tuple, exact))
        assert Traffic(placement, costs.shape, costs.step, embed_grad).step_bytes(table) == exact.sum()


@settings(max_examples=40, deadline=None)
@given(case=cases(), embed_grad=st.booleans())
def test_over_a_narrow_wire_gradients_are_the_masked_timm_models_but_for_rounding(case, embed_grad):
    model, placement, ops = case
    batches = images_and_labels(model, ops.shape[2], 2)
    costs = costs_for(model, placement.num_workers, ops.shape[2], 2, **NARROW)
    _, results = run_step(model, placement, ops, batches, costs=costs, embed_grad=embed_grad)
    model.zero_grad()
    loss = masked_loss(model, batches, ops, embed_grad=embed_grad)
    loss.backward()
    expected = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    assert results[0][0].loss == pytest.approx(loss.item(), rel=0.05, abs=0.05)
    if any(grad.any() for grad in expected.values()):
        assert relative(gathered_gradients(model, [shard for _, shard in results]), expected) < 0.05


@settings(max_examples=30, deadline=None)
@given(case=cases())
def test_half_of_the_stream_s_bytes_are_sent(case):
    model, placement, ops = case
    wide = costs_for(model, placement.num_workers, ops.shape[2], 2, itemsize=4)
    narrow = costs_for(model, placement.num_workers, ops.shape[2], 2, itemsize=4, **NARROW)
    none = costs_for(model, placement.num_workers, ops.shape[2], 2, itemsize=4, wire_itemsize=0)
    full, half, rest = (step_bytes(placement, ops, c.shape, c.step).sum() for c in (wide, narrow, none))
    assert full - rest == 2 * (half - rest)  # what is left are trunk gradients and tallies


@settings(max_examples=40, deadline=None)
@given(case=cases(), embed_grad=st.booleans())
def test_all_who_read_a_value_read_the_same_bits_of_it(case, embed_grad):
    """A root that sends x goes on with what it sends, and so do others that hold x and send nothing."""
    model, placement, ops = case
    batches, seen = images_and_labels(model, ops.shape[2], 2), {}
    costs = costs_for(model, placement.num_workers, ops.shape[2], 2, **NARROW)
    programs = compile_step(placement, ops, costs, embed_grad=embed_grad)

    class Listening(Executor):
        def _rounded(self, cargo, i):
            values = super()._rounded(cargo, i)
            seen.setdefault((cargo, i.block, i.part, i.mb), []).append(values.clone())
            return values

    def work(rank, transport):
        steps = StepPrograms(programs, rank, costs, torch.float64)
        images, labels = ({m: pair[i] for m, pair in enumerate(batches)} for i in (0, 1))
        Listening(Shard(model, placement, rank), transport).run(steps, Batch(images, labels))
        return steps.travelling

    travelling, *_ = on_threads(placement.num_workers, work)
    for key, (first, *others) in seen.items():
        assert all(torch.equal(first, other) for other in others), key
        assert key not in travelling or torch.equal(first, first.bfloat16().double())


@settings(max_examples=40, deadline=None)
@given(case=cases(), embed_grad=st.booleans(), skip_fill=st.sampled_from(["zero", "rescale"]))
def test_running_the_forward_pass_again_gives_the_same_bits(case, embed_grad, skip_fill):
    model, placement, ops = case
    assert_same_bits(model, placement, ops, embed_grad=embed_grad, skip_fill=skip_fill)


@pytest.mark.parametrize("name", [names[0] for names in KINDS.values()])
def test_it_does_for_every_kind_of_model(name):
    model = small(name)
    shape = model_shape(model)
    grid = (shape.num_blocks, shape.num_heads)
    rng = np.random.default_rng(3)
    assert_same_bits(model, Placement.make(rng.integers(0, 2, grid), 2), rng.integers(0, 3, (*grid, 2)).astype(np.int8))


@pytest.mark.parametrize("targets", [("qkv", "proj", "fc1", "fc2"), ("fc1",)])
def test_it_does_for_adapters(targets):
    model = tiny_vit()
    attach(model, Lora(rank=2, targets=targets), seed=0)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith("lora_b"):
                param.normal_(generator=torch.Generator().manual_seed(1))
    ops = np.random.default_rng(2).integers(0, 3, (3, 4, 2)).astype(np.int8)
    assert_same_bits(model, Placement.make([[0, 1, 1, 0]] * 3, 2), ops, embed_grad=False)


def assert_same_bits(model, placement, ops, **options):
    batches = images_and_labels(model, ops.shape[2], 2)
    losses, grads = [], []
    for words in ({}, AGAIN):
        costs = costs_for(model, placement.num_workers, ops.shape[2], 2, **words)
        _, results = run_step(model, placement, ops, batches, costs=costs, **options)
        losses.append(results[0][0].loss)
        grads.append(gathered_gradients(model, [shard for _, shard in results]))
        assert sum(report.flops for report, _ in results) == step_flops(costs.shape, costs.step, ops)
    assert losses[0] == losses[1]
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


def test_gates_record_the_same_slopes_from_a_pass_that_is_run_again():
    model, placement = tiny_vit(), Placement.make([[0, 1, 1, 0]] * 3, 2)
    batches, ops = images_and_labels(model, 2, 3), np.random.default_rng(1).integers(0, 3, (3, 4, 2)).astype(np.int8)
    due = next(filter(Gates(model_shape(model), StepShape(1, 1), "fisher").due, range(EVERY)))

    def recorded(words):
        costs = costs_for(model, 2, 2, 3, **words)
        programs = compile_step(placement, ops, costs)

        def work(rank, transport):
            executor = Executor(Shard(model, placement, rank), transport)
            executor.gates = Gates(costs.shape, costs.step, "fisher")
            images, labels = ({m: pair[i] for m, pair in enumerate(batches)} for i in (0, 1))
            executor.run(StepPrograms(programs, rank, costs, torch.float64), Batch(images, labels), step=due)
            return executor.gates.take()

        return on_threads(2, work)

    for plain, again in zip(recorded({}), recorded(AGAIN), strict=True):
        assert plain.counts_LH.any() and (plain.counts_LH == again.counts_LH).all()
        assert (plain.sums_LH == again.sums_LH).all()


def kept_bytes(model, words):
    """Bytes that autograd holds between forward and backward of one half with all heads FULL, weights aside."""
    costs = costs_for(model, 1, 1, 8, itemsize=4, **words)
    placement = Placement.make(np.zeros((3, 4), dtype=int), 1)
    programs = compile_step(placement, uniform_ops(costs.shape, 1, Op.FULL), costs)
    [(images, labels)], held = images_and_labels(model, 1, 8), {}

    class Weighing(Executor):
        def _classify(self, i):
            held.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self._saved()})
            super()._classify(i)

        def _saved(self):
            for leaf, out in self._state.kept.values():
                yield leaf
                yield from () if out is None else saved(out.grad_fn)

    executor = Weighing(Shard(model, placement, 0), on_threads(1, lambda _, transport: transport)[0])
    executor.run(StepPrograms(programs, 0, costs, torch.float32), Batch({0: images}, {0: labels}))
    weights = sum(p.numel() * 4 for p in model.blocks.parameters())
    return sum(held.values()), simulate(programs, costs).peak_bytes[0], weights


def test_less_is_kept_and_less_is_forecast_to_be():
    model = tiny_vit().float()
    plain, told, weights = kept_bytes(model, {})
    again, told_again, _ = kept_bytes(model, AGAIN)
    inputs = 6 * 8 * 10 * 16 * 4  # halves, images, tokens, width, bytes
    assert again == inputs and plain > 3 * inputs + weights / 2
    assert told_again < 0.6 * told  # with one half's pass as it is run again


def test_flops_count_the_pass_that_is_run_again_and_fractions_are_of_the_same():
    shape = model_shape(tiny_vit())
    step = StepShape(5, 2)
    again = replace(step, recompute=True)
    full, only = (uniform_ops(shape, 5, op) for op in (Op.FULL, Op.FORWARD))
    trunk = 5 * shape.trunk_flops(2)
    forward = step_flops(shape, step, only) - trunk
    assert step_flops(shape, step, full) - trunk == 3 * forward
    assert step_flops(shape, again, full) - trunk == 4 * forward
    assert step_flops(shape, again, only) == step_flops(shape, step, only)


def test_bf16_computes_near_fp32_and_keeps_weights_and_gradients_wide():
    model = tiny_vit().float()
    placement, ops = Placement.make([[0, 1, 1, 0]] * 3, 2), uniform_ops(model_shape(model), 2, Op.FULL)
    batches, found = images_and_labels(model, 2, 8), []
    for autocast, words in ((None, {}), (torch.bfloat16, {**NARROW, **AGAIN, "compute_itemsize": 2})):
        costs = costs_for(model, 2, 2, 8, itemsize=4, **words)
        shards, reports = trained(copy.deepcopy(model), placement, [ops], batches, costs, autocast=autocast)
        assert_replicas_alike(shards)
        assert {p.dtype for shard in shards for _, p in shard.named_parameters()} == {torch.float32}
        found.append([report.loss for report in reports[0]])
    np.testing.assert_allclose(found[1], found[0], rtol=0.05)
    assert found[0] != found[1]


def test_matrices_are_cast_once_for_all_calls_of_a_step_and_collect_wide_gradients():
    model = tiny_vit().float()
    block = Shard(model, Placement.make(np.zeros((3, 4), dtype=int), 1), 0).blocks[0]
    narrow = block.trainable("mlp", (0, 2), torch.bfloat16)
    assert narrow is block.trainable("mlp", (0, 2), torch.bfloat16)
    assert {name: weight.dtype for name, weight in narrow.items()} == {
        "fc1_w": torch.bfloat16,
        "fc1_b": torch.float32,
        "fc2_w": torch.bfloat16,
    }
    for _ in range(2):  # two micro-batches, each with a backward pass of its own
        torch.autograd.backward(narrow["fc1_w"].sum() * 0.001)
    block.collect()
    grad = block.params[0]["fc1_w"].grad
    assert grad.dtype == torch.float32 and torch.allclose(grad, torch.full_like(grad, 0.002), rtol=0.01)
    assert block.trainable("mlp", (0, 2), torch.bfloat16) is not narrow


def test_evaluation_is_done_in_the_same_numbers():
    model = tiny_vit().float()
    placement, images = Placement.make([[0, 1, 1, 0]] * 3, 2), images_and_labels(model, 1, 4)[0][0]

    def evaluated(autocast, **words):
        costs = costs_for(model, 2, 1, 2, itemsize=4, **words)

        def work(rank, transport):
            executor = Executor(Shard(model, placement, rank), transport, autocast=autocast)
            passes = ForwardPasses(executor, placement, costs)
            return passes._run(passes._programs(1, 4), lambda _: images), sum(transport.sent_bytes)

        found, sent = zip(*on_threads(2, work), strict=True)
        return next(logits[0] for logits in found if logits), sum(sent)

    plain, all_bytes = evaluated(None)
    for autocast, words, part in ((torch.bfloat16, {}, 1.0), (None, NARROW, 0.5)):
        logits, sent = evaluated(autocast, **words)
        assert sent == part * all_bytes > 0 and not torch.equal(plain, logits)
        torch.testing.assert_close(plain, logits, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_profile_s_backward_runs_the_forward_again(monkeypatch, recompute):
    model, ran = tiny_vit().float(), []
    shard = Shard(model, Placement.make(np.zeros((3, 4), dtype=int), 1), 0)
    run, backward = BlockShard.run, torch.autograd.backward
    monkeypatch.setattr(BlockShard, "run", lambda *args: (ran.append("fwd"), run(*args))[1])
    monkeypatch.setattr(torch.autograd, "backward", lambda *args: (ran.append("bwd"), backward(*args))[1])
    _Stopwatch(shard, StepShape(1, 2, recompute=recompute), None).curves("mlp")
    assert ran.count("bwd") and ran.count("fwd") == (1 + recompute) * ran.count("bwd")


def test_what_computes_in_which_type():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert compute_type(Precision(), cpu) is compute_type(Precision(compute="fp32"), gpu) is None
    assert compute_type(Precision(compute="bf16"), cpu) is torch.bfloat16
    assert wire_type(StepShape(1, 1, 2), torch.float32) is torch.bfloat16
    assert wire_type(StepShape(1, 1), torch.float64) is torch.float64


@pytest.mark.parametrize("able", [True, False])
def test_a_gpu_without_bfloat16_is_refused_only_where_it_was_asked_for(monkeypatch, able):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: able and not including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    gpu = torch.device("cuda")
    assert compute_type(Precision(), gpu) is (torch.bfloat16 if able else None)
    if able:
        assert compute_type(Precision(compute="bf16"), gpu) is torch.bfloat16
    else:
        with pytest.raises(UserError, match="T4 has no bfloat16") as caught:
            compute_type(Precision(compute="bf16"), gpu)
        assert caught.value.param == "precision.compute" and "fp32" in caught.value.remedy


def test_the_step_that_the_planner_hears_of():
    spec = JobSpec.model_validate({"precision": {"wire": "bf16", "recompute": True}, "micro_batches": 4})
    step = step_shape(spec.micro_batches, 8, spec.precision, bf16=True)
    assert step == StepShape(4, 8, wire_itemsize=2, itemsize=4, compute_itemsize=2, recompute=True)
    assert step_shape(5, 16, JobSpec().precision, bf16=False) == StepShape(5, 16)


def test_placement_counts_what_is_kept():
    model = tiny_vit()
    placement, costs = Placement.make([[0, 1, 1, 0]] * 3, 2), costs_for(model, 2, 4, 64, itemsize=4)
    words = ({}, {"compute_itemsize": 2}, AGAIN, NARROW)
    needs = [
        max(memory_bytes_of(placement, Costs(costs.shape, replace(costs.step, **each), costs.profiles)))
        for each in words
    ]
    assert needs[0] == needs[3] > needs[1] > needs[2]
