"""Runs step programs on threads or alone, for tests: small float64 models, random placements and op tables."""

from __future__ import annotations

import threading

import numpy as np
import timm
import torch

from scheduler.compiler import compile_step
from scheduler.cost import Costs
from scheduler.domain import DeviceProfile, LinkProfile, Placement, StepShape
from workers.executor import Executor
from workers.partition import model_shape
from workers.shard import Shard, join
from workers.steps import Batch, StepPrograms
from workers.transport import InProcess, Mailboxes

ITEMSIZES = ("wire_itemsize", "itemsize", "compute_itemsize")


def tiny_vit(**args):
    """A float64 ViT of 3 blocks × 4 heads, 10 tokens."""
    torch.manual_seed(0)
    kwargs = {
        "img_size": 12,
        "patch_size": 4,
        "in_chans": 1,
        "embed_dim": 16,
        "depth": 3,
        "num_heads": 4,
        "mlp_ratio": 2.0,
    }
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **{**kwargs, **args}).double().eval()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param) * 0.2)
    return model


def flat_profiles(shape, num_workers, seed=0):
    """Profiles whose times are random: they order a program, but must not change what it computes."""
    rng = np.random.default_rng(seed)

    def curve():
        return (0, *np.sort(rng.integers(1, 1000, shape.num_heads)).tolist())

    return tuple(
        DeviceProfile(
            rank=w, node="n", device="cpu",
            attn_forward_us=curve(), attn_backward_us=curve(), mlp_forward_us=curve(), mlp_backward_us=curve(),
            embed_us=50, classify_us=50, sum_us=5, update_us=1, free_bytes=1 << 30,
            links=tuple(None if v == w else LinkProfile(int(rng.integers(1, 500)), 10**8) for v in range(num_workers)),
        )
        for w in range(num_workers)
    )  # fmt: skip


def costs_for(model, num_workers, num_micro_batches, batch, itemsize=8, seed=0, **words):
    """All numbers are of `itemsize` bytes unless `words` of the step say otherwise."""
    shape = model_shape(model)
    step = StepShape(num_micro_batches, batch, **{**dict.fromkeys(ITEMSIZES, itemsize), **words})
    return Costs(shape, step, flat_profiles(shape, num_workers, seed))


def images_and_labels(model, num_micro_batches, batch, seed=0):
    gen = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    size = model.patch_embed.img_size
    return [
        (
            torch.randn(batch, model.in_chans, *size, generator=gen, dtype=dtype),
            torch.randint(0, model.num_classes, (batch,), generator=gen),
        )
        for _ in range(num_micro_batches)
    ]


def on_threads(num_workers, work):
    """Run work(rank, transport) on one thread per worker; re-raises the first failure."""
    mailboxes, results, errors = Mailboxes(num_workers, timeout_s=30), [None] * num_workers, []

    def body(rank):
        try:
            results[rank] = work(rank, InProcess(rank, mailboxes))
        except BaseException as error:
            errors.append(error)
            mailboxes.abort()

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(num_workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def run_step(model, placement: Placement, ops_LHM, batches, *, costs, means=None, traces=None, **compile_options):
    """One step without update on in-process workers: (reports, shards), gradients left in the shards.

    With `traces`, one per worker, these hear of it, and of an update that does nothing.
    """
    programs = compile_step(placement, ops_LHM, costs, **compile_options)

    def work(rank, transport):
        shard = Shard(model, placement, rank)
        executor = Executor(shard, transport)
        executor.means = means or {}
        steps = StepPrograms(programs, rank, costs, shard.dtype)
        batch = Batch(
            {m: batches[m][0] for m in steps.own.image_micro_batches},
            {m: batches[m][1] for m in steps.own.label_micro_batches},
        )
        if traces is None:
            return executor.run(steps, batch), shard
        executor.update = lambda grad_norm: None
        return executor.run(steps, batch, trace=traces[rank]), shard

    return programs, on_threads(placement.num_workers, work)


def gathered_gradients(model, shards):
    """The workers' gradients put together under timm's names; None where no worker has one."""
    grads = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for shard in shards:
        named = dict(shard.named_parameters())
        found = {name: named[name].grad for name in shard.spoken_for() if named[name].grad is not None}
        join(found, grads, shard.cut)
    return grads


def saved(node, seen=None):
    """The tensors that a graph keeps."""
    seen = set() if seen is None else seen
    if node is None or node in seen:
        return
    seen.add(node)
    for name in dir(node):
        if name.startswith("_saved_") and isinstance(value := getattr(node, name), torch.Tensor):
            yield value
    for other, _ in node.next_functions:
        yield from saved(other, seen)
