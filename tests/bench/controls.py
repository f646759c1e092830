"""What makes leaving work out cost accuracy? Control experiments on a plain timm model, quick enough for many of them.

    python -m tests.bench.controls [--steps 300] [--rates 5e-4 …] [--seeds 0 1 2] [--ways PATTERN …] [--out controls]
        [--model d2ft_digits] [--weights FILE] [--img-size 98] [--dataset folder:///…] [--micro-batch-size 8]
        [--device cuda] [--at-once 1] [--save FILE] [--classes 0:5]

Nothing here is saved in time: heads are masked (`masked`), and compute is counted, FULL 3, FORWARD 1, SKIP 0. Every way
is trained at every rate, and its best rate by mean accuracy is what its row shows. A step has five micro-batches.

A FORWARD head does two things to the gradient: its weights get none, and none passes through it to what lies below.
"cut" is both, as FORWARD is; with "weights cut" the gradient passes through every head; with "path cut" the weights of
every head train. Heads are drawn anew for every micro-batch, every step, every 50 steps, or once; or the most worthy
are held. Other ways choose whole micro-batches (3 of 5 alone is ordinary training with smaller batches), or train each
micro-batch down to another depth ("staggered").

`--classes` takes some of the classes; `--save` keeps the model, without classifier, that the first run ended with.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from tests.bench.masked import Factors, features_of
from tests.bench.report import matching, mean_and_std, publish
from workers.contract import JobSpec
from workers.data import open_dataset
from workers.hardest import HardestFirst
from workers.model import build_model, model_input
from workers.optimiser import schedule
from workers.order import MicroBatches
from workers.scoring import score

MICRO_BATCHES = 5
SCORED_IMAGES = 256
EVALUATED = 250  # images at a time


@dataclass(frozen=True)
class Part:
    """Some of a step's micro-batches and how heads treat them; `factors` None is FULL everywhere."""

    micro_batches: tuple[int, ...]
    factors: Factors | None = None
    classifier_only: bool = False


@dataclass(frozen=True)
class Way:
    """`parts` of a step, its compute as a fraction, and whether the hardest images are looked for first."""

    parts: Callable[[Run, int], list[Part]]
    compute: float
    share: float = 1.0  # of the steps
    hardest: str = ""  # how a step's images are sorted into micro-batches: "now", "soft" or "known"; "" as they come


class Run:
    """One training run: model, data, and what its way draws from."""

    def __init__(self, args, seed):
        self.args, self.seed, self.device = args, seed, torch.device(args.device)
        data = torch.load(args.data, weights_only=True, mmap=True)
        self.train, self.test = ((data[f"{of}_images"], data[f"{of}_labels"]) for of in ("train", "test"))
        spec = spec_of(args, seed)
        self.model = build_model(spec, int(self.train[1].max()) + 1).to(self.device)
        self.order = MicroBatches(len(self.train[1]), args.micro_batch_size, MICRO_BATCHES, seed)
        self.rng = np.random.default_rng(seed)
        self.grid = len(self.model.blocks), self.model.blocks[0].attn.num_heads
        self.kept = {}  # what a way remembers

    def batch(self, indices, of="train"):
        images, labels = getattr(self, of)
        rows = torch.as_tensor(indices)
        return images[rows].to(self.device).float(), labels[rows].to(self.device)

    def factors(self, run, weights, path):
        return Factors.of(run, weights, path, self.device)

    def casting(self):
        return torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda")

    def worth(self, kind):
        """[L, H] by the product's own scoring, before training."""
        order = MicroBatches(len(self.train[1]), 16, 1, self.seed + 1)
        batches = (self.batch(order.indices(b)[0]) for b in range(SCORED_IMAGES // 16))
        return score(self.model, batches, kind)[0].numpy()

    def drawn(self, share):
        """[L, H]: a share of every block's heads, by chance, in whole numbers that come out even over the blocks."""
        blocks, heads = self.grid
        ends = np.floor(share * heads * np.arange(blocks + 1) + self.rng.random())
        chosen_LH = np.zeros(self.grid, dtype=bool)
        for block, count in enumerate(np.diff(ends).astype(int)):
            chosen_LH[block, self.rng.permutation(heads)[:count]] = True
        return chosen_LH


ALL = tuple(range(MICRO_BATCHES))
CUTS = {"cut": (0, 0), "weights cut": (0, 1), "path cut": (1, 0)}  # what FORWARD leaves of weights' and path's gradient


def everything(run, step):
    return [Part(ALL)]


def redrawn(every, share, cut="cut", skip=False):
    """A share of heads by chance FULL, the others FORWARD or SKIP; anew for every micro-batch (0) or `every` steps."""

    def parts(run, step):
        def now():
            chosen_LH = run.drawn(share)
            weights, path = (np.where(chosen_LH, 1, left) for left in CUTS[cut])
            return run.factors(chosen_LH if skip else np.ones(run.grid), weights, path)

        if every == 0:
            return [Part((m,), now()) for m in ALL]
        if step % every == 0:
            run.kept["factors"] = now()
        return [Part(ALL, run.kept["factors"])]

    return parts


def held(kind, share, skip=False):
    """The share of all heads that is most worthy FULL throughout, the others FORWARD or SKIP."""

    def parts(run, step):
        if not step:
            worth = run.worth(kind).ravel()
            chosen_LH = np.zeros(worth.size, dtype=bool)
            chosen_LH[np.argsort(-worth)[: round(share * worth.size)]] = True
            chosen_LH = chosen_LH.reshape(run.grid)
            run.kept["factors"] = run.factors(chosen_LH if skip else np.ones(run.grid), chosen_LH, chosen_LH)
        return [Part(ALL, run.kept["factors"])]

    return parts


def micro_batches(full, rest_forward):
    """The first micro-batches FULL in all blocks; the rest left out, or FORWARD, so that the classifier sees them."""

    def parts(run, step):
        rest = [Part(ALL[full:], classifier_only=True)] if rest_forward else []
        return [Part(ALL[:full]), *rest]

    return parts


def staggered(*shares, turn=True):
    """Micro-batch m is FULL in the last `shares[m]` of the blocks, FORWARD below: all above what trains is FULL."""

    def parts(run, step):
        blocks, heads = run.grid
        out = []
        for m, share in enumerate(np.roll(shares, step if turn else 0)):
            full_LH = np.repeat((np.arange(blocks) >= blocks - round(share * blocks))[:, None], heads, axis=1)
            out.append(Part((m,), run.factors(np.ones(run.grid), full_LH, full_LH)))
        return out

    return parts


def then(first, until, second):
    """One way until a share of the steps is done, and then another."""

    def parts(run, step):
        begin = round(until * run.args.steps)
        return first(run, step) if step < begin else second(run, step - begin)

    return parts


def growing(run, step):
    """Smaller batches at the beginning, larger ones towards the end."""
    return micro_batches(1 + min(4, 5 * step // run.args.steps), False)(run, step)


WAYS = {
    "full fine-tuning": Way(everything, 1.0),
    **{f"stopped at {round(100 * s)} %": Way(everything, s, share=s) for s in (0.8, 0.6, 0.47, 0.4)},
    "3 of 5 micro-batches alone": Way(micro_batches(3, False), 0.6),
    "2 of 5 micro-batches alone": Way(micro_batches(2, False), 0.4),
    "2F3O, whole micro-batches": Way(micro_batches(2, True), 0.6),
    "1F4O, whole micro-batches": Way(micro_batches(1, True), 0.4667),
    # What picks by the present loss has run every image forward before.
    "hardest 1 of 5, others teach the classifier": Way(micro_batches(1, True), 0.5333, hardest="now"),
    "hardest 2 of 5, others teach the classifier": Way(micro_batches(2, True), 0.7333, hardest="now"),
    "hardest 1 of 5 alone": Way(micro_batches(1, False), 0.5333, hardest="now"),
    "hardest 2 of 5 alone": Way(micro_batches(2, False), 0.7333, hardest="now"),
    "hardest 1 of 5 alone, softly": Way(micro_batches(1, False), 0.5333, hardest="soft"),
    "hardest 2 of 5 alone, softly": Way(micro_batches(2, False), 0.7333, hardest="soft"),
    "hardest 3 of 5 alone, as last known": Way(micro_batches(3, False), 0.6, hardest="known"),
    "2F3O staggered 1 .25 .25 .25 .25, hardest": Way(
        staggered(1.0, 0.25, 0.25, 0.25, 0.25, turn=False), 0.9333, hardest="now"
    ),
    "2F3O staggered .8 .6 .4 .2 0": Way(staggered(0.8, 0.6, 0.4, 0.2, 0.0), 0.6),
    "2F3O staggered 1 .5 .3 .2 0": Way(staggered(1.0, 0.5, 0.3, 0.2, 0.0), 0.6),
    "2F3O staggered 1 .25 .25 .25 .25": Way(staggered(1.0, 0.25, 0.25, 0.25, 0.25), 0.6),
    "last 40 % of the blocks": Way(staggered(*[0.4] * 5), 0.6),
    **{
        f"2F3O, {cut}, {name}": Way(redrawn(every, 0.4, cut), 0.6)
        for cut in CUTS
        for name, every in {"per micro-batch": 0, "per step": 1, "per 50 steps": 50, "once": 10**9}.items()
    },
    **{f"2F3O held, {kind}": Way(held(kind, 0.4), 0.6) for kind in ("fisher", "gradient", "taylor", "activation")},
    "1F4O held, fisher": Way(held("fisher", 0.2), 0.4667),
    "3F2S, per micro-batch": Way(redrawn(0, 0.6, skip=True), 0.6),
    "3F2S, per step": Way(redrawn(1, 0.6, skip=True), 0.6),
    "3F2S held, taylor": Way(held("taylor", 0.6, skip=True), 0.6),
    "2F3O held, fisher, then all for 1/10": Way(then(held("fisher", 0.34), 0.9, everything), 0.6),
    "all for 1/4, then 1F4O held, fisher": Way(then(everything, 0.25, held("fisher", 0.2)), 0.6),
    "1F4O held, fisher, then all for 1/4": Way(then(held("fisher", 0.2), 0.75, everything), 0.6),
    "1 of 5 alone, then all for 1/2": Way(then(micro_batches(1, False), 0.5, everything), 0.6),
    "1 of 5 alone, then 2, 3, 4, 5 of 5": Way(growing, 0.6),
}


def train(args, name, seed, rate):
    """Test accuracy in percent."""
    way, run = WAYS[name], Run(args, seed)
    torch.set_num_threads(1)
    order = HardestFirst(run.order) if way.hardest == "known" else run.order
    steps = max(1, round(way.share * args.steps))
    optimiser = torch.optim.AdamW(run.model.parameters(), lr=rate, weight_decay=0.05, fused=True)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = schedule(step, steps, rate, 0.1)
        indices = order.indices(step)
        if way.hardest in ("now", "soft"):
            indices = hardest_first(run, np.concatenate(indices), way.hardest)
        losses = {}
        for part in way.parts(run, step):
            losses |= zip(part.micro_batches, backward(run, part, indices), strict=True)
        if way.hardest == "known":
            order.learn(step, losses, losses)
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    if args.save:
        backbone = {k: v for k, v in run.model.state_dict().items() if not k.startswith("head.")}
        save_file({k: v.half().contiguous().cpu() for k, v in backbone.items()}, args.save)
    return 100 * accuracy(run)


def backward(run, part, indices):
    """Gradients of a part's images; their losses, a row for each micro-batch."""
    images, labels = run.batch(np.concatenate([indices[m] for m in part.micro_batches]))
    weight = len(part.micro_batches) / MICRO_BATCHES
    with run.casting():
        with torch.set_grad_enabled(not part.classifier_only):
            features = features_of(run.model, images, part.factors)
        logits = run.model.forward_head(features)
    losses_B = F.cross_entropy(logits.float(), labels, reduction="none")
    (weight * losses_B.mean()).backward()
    return losses_B.detach().cpu().numpy().reshape(len(part.micro_batches), -1)


@torch.no_grad()
def hardest_first(run, indices, how):
    """A step's images in order of their loss under the present weights, or ("soft") by chance in favour of it."""
    images, labels = run.batch(indices)
    with run.casting():
        logits = run.model(images)
    losses_B = F.cross_entropy(logits.float(), labels, reduction="none").cpu().numpy()
    ranks_B = np.argsort(np.argsort(losses_B)) + 1
    keys_B = np.log(run.rng.random(len(indices))) / ranks_B if how == "soft" else ranks_B  # chance in favour of rank
    return np.split(indices[np.argsort(-keys_B)], MICRO_BATCHES)


@torch.no_grad()
def accuracy(run):
    right, num = 0, len(run.test[1])
    for begin in range(0, num, EVALUATED):
        images, labels = run.batch(np.arange(begin, min(begin + EVALUATED, num)), "test")
        with run.casting():
            right += int((run.model(images).argmax(1) == labels).sum())
    return right / num


def spec_of(args, seed):
    return JobSpec(
        model=args.model, weights=args.weights, img_size=args.img_size, dataset=args.dataset, seed=seed,
        micro_batches=MICRO_BATCHES, micro_batch_size=args.micro_batch_size,
    )  # fmt: skip


def decode(args, path):
    """All images once, in half precision, for every run to read."""
    spec = spec_of(args, 0)
    data = open_dataset(spec, model_input(build_model(spec, num_classes=1, load=False)), skipped=())
    first, last = (int(text) if text else None for text in (args.classes or ":").split(":"))
    classes = torch.arange(len(data.classes))[first:last]
    found = {}
    for of, num, read in (("train", data.num_train, data.train_batch), ("test", data.num_test, data.test_batch)):
        batches = [read(np.arange(b, min(b + EVALUATED, num))) for b in range(0, num, EVALUATED)]
        labels = torch.cat([batch.labels_B for batch in batches])
        wanted = torch.isin(labels, classes)
        found[f"{of}_images"] = torch.cat([batch.images_BCHW.half() for batch in batches])[wanted]
        found[f"{of}_labels"] = labels[wanted] - classes[0]
    torch.save(found, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="d2ft_digits")
    parser.add_argument("--weights")
    parser.add_argument("--img-size", type=int)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--classes", metavar="FIRST:LAST")
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", default=["*"], help="patterns of names")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--save")
    parser.add_argument("--out", default="controls")
    args = parser.parse_args()
    wanted = matching(WAYS, args.ways)
    with tempfile.TemporaryDirectory() as folder:
        args.data = str(Path(folder) / "images.pt")
        decode(args, args.data)
        with ProcessPoolExecutor(args.at_once, mp_context=get_context("spawn")) as pool:
            # Seed by seed, so that a run cut short has something of everything.
            order = [(name, seed, rate) for seed in args.seeds for name in wanted for rate in args.rates]
            found = {key: pool.submit(train, args, *key) for key in order}
            for (name, seed, rate), future in found.items():
                print(f"{name}, seed {seed}, rate {rate:g}: {future.result():.1f}", flush=True)
    rows = [row_of(name, args, {key: future.result() for key, future in found.items()}) for name in wanted]
    publish(
        args.out, rows, [], f"{args.model} on {args.dataset}, {args.steps} steps of 5 × {args.micro_batch_size} images"
    )


def row_of(name, args, found):
    by_rate = {rate: mean_and_std([found[name, seed, rate] for seed in args.seeds]) for rate in args.rates}
    best = max(by_rate, key=lambda rate: by_rate[rate][0])
    accuracy, std = by_rate[best]
    means = {f"at {rate:g}": mean for rate, (mean, _) in by_rate.items()}
    return {"way": name, "compute": WAYS[name].compute, "accuracy": accuracy, "std": std, "rate": best, **means}


if __name__ == "__main__":
    main()
