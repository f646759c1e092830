"""Why is redrawing FORWARD ruinous, and holding it still harmless? Control experiments on one process.

    python -m tests.bench.controls [--steps 300] [--seeds 0 1 2] [--out controls]

A FORWARD head does two things to the gradient: its weights get none, and none passes through it to what lies below.
Here the two are apart, on the bundled model and digits, with 40 % of every block's heads FULL:

cut          both, as FORWARD is
weights cut  the gradient passes through every head; weights of FULL heads alone train (costs two thirds, not one)
path cut     the weights of every head train; the gradient passes through FULL heads alone
unbiased     as cut, but what passes through a FULL head is divided by 0.4: right in the mean over draws

each with heads drawn anew for every micro-batch, every step, every 50 steps, or once. Before training, the gradient of
each way is compared with the full one over many draws: the cosine of single micro-batches' gradients with it, over the
weights that train, and of their mean. Columns are means over the seeds.
"""

from __future__ import annotations

import argparse
import math
import statistics

import numpy as np
import torch
import torch.nn.functional as F

from tests.bench.report import publish
from workers.contract import JobSpec
from workers.data import open_dataset
from workers.model import build_model, model_input
from workers.optimiser import schedule
from workers.order import MicroBatches

SHARE = 0.4
WARM_UP = 0.1  # of the steps
MICRO_BATCHES, BATCH = 5, 8
EVALUATED = 250  # images at a time
DRAWS = 60  # for the gradients' cosines
WAYS = {  # how a head's weights and what passes through it are scaled: (FULL, FORWARD) each
    "full fine-tuning": ((1, 1), (1, 1)),
    "cut": ((1, 0), (1, 0)),
    "weights cut": ((1, 0), (1, 1)),
    "path cut": ((1, 1), (1, 0)),
    "unbiased": ((1, 0), (1 / SHARE, 0)),
}
REDRAWN = {"micro-batch": 0, "step": 1, "50 steps": 50, "once": 10**9}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", default="controls")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for way in WAYS:
        for redrawn in REDRAWN if way != "full fine-tuning" else ("once",):
            found = [train(args, seed, way, redrawn) for seed in args.seeds]
            single, mean = cosines(way) if redrawn == "micro-batch" else (math.nan, math.nan)
            rows.append(
                {
                    "way": way,
                    "redrawn": redrawn,
                    "accuracy": statistics.fmean(found),
                    "std": statistics.stdev(found) if len(found) > 1 else 0.0,
                    "cosine of one": single,
                    "cosine of the mean": mean,
                }
            )
            print(f"{way}, {redrawn}: {rows[-1]['accuracy']:.1f} ± {rows[-1]['std']:.1f}", flush=True)
    publish(args.out, rows, [], f"{args.steps} steps of {MICRO_BATCHES} × {BATCH} images, {len(args.seeds)} seeds")


def setting(seed):
    spec = JobSpec(micro_batches=MICRO_BATCHES, micro_batch_size=BATCH, seed=seed)
    data = open_dataset(spec, model_input(build_model(spec, num_classes=1, load=False)))
    model = build_model(spec, len(data.classes))
    return model, data, MicroBatches(data.num_train, BATCH, MICRO_BATCHES, seed)


def train(args, seed, way, redrawn):
    """Test accuracy in percent."""
    model, data, order = setting(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05, fused=True)
    rates = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: schedule(step, args.steps, 1.0, WARM_UP))
    rng, every = np.random.default_rng(seed), REDRAWN[redrawn]
    full_LH = draw(rng, model)
    for step in range(args.steps):
        if every and step and step % every == 0:
            full_LH = draw(rng, model)
        for indices in order.indices(step):
            if not every:
                full_LH = draw(rng, model)
            images, labels = data.train_batch(indices)
            (F.cross_entropy(forward(model, images, full_LH, way), labels) / MICRO_BATCHES).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        rates.step()
        optimiser.zero_grad()
    return 100 * accuracy(model, data)


@torch.no_grad()
def accuracy(model, data):
    right = 0
    for begin in range(0, data.num_test, EVALUATED):
        images, labels = data.test_batch(np.arange(begin, min(begin + EVALUATED, data.num_test)))
        right += int((model(images).argmax(1) == labels).sum())
    return right / data.num_test


def cosines(way):
    """(Mean cosine of one draw's gradient with the full one, cosine of the draws' mean), over block weights."""
    model, data, order = setting(0)
    images, labels = data.train_batch(np.concatenate(order.indices(0)))
    rng = np.random.default_rng(0)

    def gradient(full_LH, way):
        model.zero_grad()
        F.cross_entropy(forward(model, images, full_LH, way), labels).backward()
        return torch.cat([p.grad.flatten() for n, p in model.named_parameters() if is_of_heads(n)])

    everything = gradient(draw(rng, model), "full fine-tuning")
    singles, total = [], torch.zeros_like(everything)
    for _ in range(DRAWS):
        found = gradient(draw(rng, model), way)
        trained = found != 0
        singles.append(float(F.cosine_similarity(found[trained], everything[trained], dim=0)))
        total += found
    return statistics.fmean(singles), float(F.cosine_similarity(total, everything, dim=0))


def is_of_heads(name):
    return any(part in name for part in ("qkv", "proj.weight", "fc1", "fc2.weight")) and "blocks" in name


def draw(rng, model):
    """[L, H]: 40 % of every block's heads, in whole numbers that come out even over the blocks."""
    blocks, heads = len(model.blocks), model.blocks[0].attn.num_heads
    ends = np.floor(SHARE * heads * np.arange(blocks + 1) + rng.random())
    full_LH = np.zeros((blocks, heads), dtype=bool)
    for block, count in enumerate(np.diff(ends).astype(int)):
        full_LH[block, rng.permutation(heads)[:count]] = True
    return full_LH


def forward(model, images, full_LH, way):
    """Logits; gradients as the way has it."""
    weights, path = (torch.tensor(np.where(full_LH, full, only), dtype=torch.float32) for full, only in WAYS[way])
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    for block, w_H, p_H in zip(model.blocks, weights, path, strict=True):
        x = x + block.ls1(attention(block.attn, block.norm1(x), w_H, p_H))
        x = x + block.ls2(mlp(block, block.norm2(x), w_H, p_H))
    return model.forward_head(model.norm(x))


def attention(attn, y, w_H, p_H):
    b, n, _ = y.shape
    qkv = Rows.apply(
        y, attn.qkv.weight, attn.qkv.bias, *(v.repeat_interleave(attn.head_dim).repeat(3) for v in (w_H, p_H))
    )
    q, k, v = qkv.reshape(b, n, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return Columns.apply(out, attn.proj.weight, w_H.repeat_interleave(attn.head_dim)) + attn.proj.bias


def mlp(block, y, w_H, p_H):
    width = block.mlp.fc1.out_features // len(w_H)
    hidden = Rows.apply(y, block.mlp.fc1.weight, block.mlp.fc1.bias, *(v.repeat_interleave(width) for v in (w_H, p_H)))
    return Columns.apply(block.mlp.act(hidden), block.mlp.fc2.weight, w_H.repeat_interleave(width)) + block.mlp.fc2.bias


class Rows(torch.autograd.Function):
    """y Wᵀ + b, whose gradients to W and b are scaled row by row, and to y by other factors."""

    @staticmethod
    def forward(ctx, y, weight, bias, of_weight, of_input):
        ctx.save_for_backward(y, weight, of_weight, of_input)
        return F.linear(y, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        y, weight, of_weight, of_input = ctx.saved_tensors
        scaled = grad * of_weight
        return (grad * of_input) @ weight, scaled.flatten(0, 1).T @ y.flatten(0, 1), scaled.sum((0, 1)), None, None


class Columns(torch.autograd.Function):
    """z Wᵀ, whose gradient to W is scaled column by column."""

    @staticmethod
    def forward(ctx, z, weight, of_weight):
        ctx.save_for_backward(z, weight, of_weight)
        return F.linear(z, weight)

    @staticmethod
    def backward(ctx, grad):
        z, weight, of_weight = ctx.saved_tensors
        return grad @ weight, grad.flatten(0, 1).T @ (z * of_weight).flatten(0, 1), None


if __name__ == "__main__":
    main()
