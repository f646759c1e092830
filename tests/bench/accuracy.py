"""What choosing operations costs in accuracy, beside full fine-tuning and what people would do instead.

    python -m tests.bench.accuracy [--seeds 0 1 2] [--steps 300] [--rows 'held*' …] [--out accuracy]
        [--model d2ft_digits] [--weights FILE] [--model-arg depth=8 …] [--img-size 56] [--dataset folder:///…]
        [--images-per-class 200] [--micro-batches 5] [--micro-batch-size 8] [--lr 5e-4] [--device cuda]

Every run is the product's own session on worker processes that share each block's heads ("split"), so fractions,
bytes and processor seconds are measured, not computed. Rows differ in their method alone; data, order, start and
learning-rate schedule are those of full fine-tuning with the same seed. "stopped" trains in full for fewer steps, with
the schedule drawn together: the rival at equal compute. "last blocks" trains the blocks nearest the classifier.

Each run is kept in `.bench/NAME.jsonl` as it ends: started again, the program does what is missing. At the end come
the table, `.bench/NAME.json`, `.bench/NAME.csv` and `.bench/NAME.png`.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import json
import resource
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from scheduler.domain import Op
from tests.bench.report import publish, target
from tests.workers.planners import GroupPlanner, ScriptedPlanner, even_heads
from tests.workers.processes import on_processes
from workers.contract import JobSpec
from workers.profiling import keep_freed_memory
from workers.session import Place, Session
from workers.transport import Shared

FULL = "full fine-tuning"


@dataclass(frozen=True)
class Row:
    """One way to train: a method, for a `share` of the steps; `last` trains that share of the blocks alone."""

    method: dict[str, Any] = field(default_factory=dict)
    share: float = 1.0
    last: float | None = None


def ratios(full, forward, skip, **words):
    return Row({"ratios": {"full": full, "forward": forward, "skip": skip}, **words})


def phases(*pairs):
    """(share of the steps, compute) after one another; compute 1 is all-FULL."""
    return Row(
        {
            "schedule": [
                {"share": share, **({"budgets": {"compute": compute}} if compute < 1 else {})}
                for share, compute in pairs
            ]
        }
    )


SCORES = ("fisher", "gradient", "taylor", "weight", "activation")
ROWS = {
    FULL: Row(),
    "stopped at 60 %": Row(share=0.6),
    "stopped at 50 %": Row(share=0.5),
    "last 40 % of the blocks": Row(last=0.4),
    **{f"held 2F3O, {score}": ratios(2, 3, 0, score=score) for score in SCORES},
    "held 2F3O, by chance": ratios(2, 3, 0, score="random"),
    "held 2F3O, another chance per window": ratios(2, 3, 0, strategy="random"),
    "held 1F4O, fisher": ratios(1, 4, 0),
    "held 2F2O1S, coherent": ratios(2, 2, 1),
    "held 2F2O1S, scattered": ratios(2, 2, 1, grain="scattered"),
    "held 2F1O2S, coherent": ratios(2, 1, 2),
    "held 3F2S, coherent": ratios(3, 0, 2, hold="all"),
    "3F2S, redrawn, coherent": ratios(3, 0, 2),
    "3F2S, redrawn, scattered": ratios(3, 0, 2, grain="scattered"),
    "3F2S, redrawn, mean fill": ratios(3, 0, 2, skip_fill="mean"),
    "3F2S, redrawn, rescaled": ratios(3, 0, 2, skip_fill="rescale"),
    "3F2S, per micro-batch, fisher": ratios(3, 0, 2, hold="none", grain="scattered"),
    "2F3O, per micro-batch, fisher": ratios(2, 3, 0, hold="none", grain="scattered"),
    "2F3O, per micro-batch, random": ratios(2, 3, 0, hold="none", grain="scattered", strategy="random"),
    "2F2O1S, per micro-batch, two-stage": ratios(2, 2, 1, hold="none", grain="scattered", strategy="two_stage"),
    "3F2S, per micro-batch, two-stage": ratios(3, 0, 2, hold="none", grain="scattered", strategy="two_stage"),
    "3F2S, per micro-batch, random": ratios(3, 0, 2, hold="none", grain="scattered", strategy="random"),
    "budgets 0.6 compute": Row({"budgets": {"compute": 0.6}}),
    "budgets 0.6 compute, 0.5 bytes": Row({"budgets": {"compute": 0.6, "bytes": 0.5}}),
    "schedule 0.4 then all": phases((0.67, 0.4), (0.33, 1.0)),
    "schedule all then 0.4": phases((0.33, 1.0), (0.67, 0.4)),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="d2ft_digits")
    parser.add_argument("--weights")
    parser.add_argument("--model-arg", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--img-size", type=int)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--images-per-class", type=int)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=5)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--window", type=int, default=100)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=["*"], help="patterns of row names")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default="accuracy")
    args = parser.parse_args()
    store = Path(".bench") / f"{args.out}.jsonl"
    store.parent.mkdir(exist_ok=True)
    wanted = {n: r for n, r in ROWS.items() if n == FULL or any(fnmatch.fnmatch(n, p) for p in args.rows)}
    runs = complete(args, wanted, store)
    rows = [summary(name, [run for run in runs if run["row"] == name]) for name in wanted]
    full = next(row for row in rows if row["row"] == FULL)
    for row in rows:
        row["points below full"] = full["accuracy"] - row["accuracy"]
    publish(args.out, rows, targets(rows), note_of(args))
    write_csv(rows, store.with_suffix(".csv"))
    plot(rows, store.with_suffix(".png"))


def complete(args, wanted, store):
    """Every run asked for, from the file where it is there; the others are made and added to it."""
    setting = {key: value for key, value in vars(args).items() if key not in ("seeds", "rows", "out")}
    known = [json.loads(line) for line in store.read_text().splitlines()] if store.exists() else []
    known = [run for run in known if run["setting"] == setting]
    found = [run for run in known if run["row"] in wanted and run["seed"] in args.seeds]
    done = {(run["row"], run["seed"]) for run in found}
    left = [(name, [s for s in args.seeds if (name, s) not in done]) for name in wanted]
    with Progress() as progress, store.open("a") as file:
        bar = progress.add_task("runs", total=len(wanted) * len(args.seeds), completed=len(found))
        for name, seeds in left:
            progress.update(bar, description=name)
            # A process group for each row: peak memory is a process's, and never falls.
            for run in on_processes(args.workers, train_all, args, wanted[name], seeds)[0] if seeds else ():
                found.append({"row": name, "setting": setting, **run})
                file.write(json.dumps(found[-1]) + "\n")
                file.flush()
                progress.advance(bar)
    return found


def train_all(rank, args, row, seeds):
    """One row with every seed, on one worker."""
    torch.set_num_threads(1)
    keep_freed_memory()
    return [train(args, row, seed) for seed in seeds]


def train(args, row, seed):
    transport = Shared()
    if row.last is None:
        planner = GroupPlanner(transport)
    else:
        planner = ScriptedPlanner(
            transport,
            lambda _: even_heads(planner.shape.num_blocks, planner.shape.num_heads, args.workers),
            last_blocks(row.last),
        )
    with tempfile.TemporaryDirectory() as folder:
        place = Place(sharers=args.workers, device=args.device)
        ledger = Session(spec_of(args, row, seed), folder, transport, planner, None, place).run()
    measured = {entry["name"]: entry["measured"] for entry in ledger["rows"]}
    return {
        "seed": seed,
        "accuracy": 100 * ledger["accuracy"]["after"],
        "before": 100 * ledger["accuracy"]["before"],
        "compute": row.share * measured["compute fraction"],
        "bytes": row.share * measured["bytes fraction"],
        "cpu_s": measured["processor seconds per step"] * ledger["steps"],
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def spec_of(args, row, seed):
    return JobSpec.model_validate(
        {
            "model": args.model,
            "model_args": dict(read_arg(text) for text in args.model_arg),
            "weights": args.weights,
            "img_size": args.img_size,
            "dataset": args.dataset,
            "images_per_class": args.images_per_class,
            "method": row.method,
            "optimiser": {"learning_rate": args.lr},
            "workers": args.workers,
            "micro_batches": args.micro_batches,
            "micro_batch_size": args.micro_batch_size,
            "steps": max(1, round(row.share * args.steps)),
            "window": args.window,
            "placement": "split" if args.workers > 1 else "auto",
            "seed": seed,
        }
    )


def read_arg(text):
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def last_blocks(share):
    """Op tables in which the blocks nearest the classifier are FULL and the others FORWARD."""

    def cycle(window, shape, num_micro_batches):
        ops_LHM = np.full((shape.num_blocks, shape.num_heads, num_micro_batches), int(Op.FORWARD), dtype=np.int8)
        ops_LHM[shape.num_blocks - round(share * shape.num_blocks) :] = int(Op.FULL)
        return (ops_LHM,)

    return cycle


def summary(name, runs):
    """Means over the seeds, and the deviation of accuracy."""
    accuracies = [run["accuracy"] for run in runs]
    means = {key: statistics.fmean(run[key] for run in runs) for key in ("compute", "bytes", "cpu_s", "peak_mb")}
    deviation = statistics.stdev(accuracies) if len(runs) > 1 else 0.0
    return {"row": name, "accuracy": statistics.fmean(accuracies), "std": deviation, "seeds": len(runs), **means}


def targets(rows):
    """At most 60 % of the compute, and at most 50 % of the bytes: how near to full fine-tuning the best row comes."""
    by_name = {row["row"]: row for row in rows}
    ours = [row for row in rows if row["row"] != FULL and not row["row"].startswith(("stopped", "last"))]
    out = []
    for column, most in (("compute", 0.605), ("bytes", 0.505)):
        able = [row for row in ours if row[column] <= most]
        if able:
            best = max(able, key=lambda row: row["accuracy"])
            title = f"{best['row']}: points below full at {column} ≤ {most:.2f}"
            out.append(target(title, best["points below full"], "<=", 1.0))
            if column == "compute" and "stopped at 60 %" in by_name:
                ahead = best["accuracy"] - by_name["stopped at 60 %"]["accuracy"]
                out.append(target(f"{best['row']}: points above full stopped at 60 %", ahead, ">=", 0.0))
    return out


def note_of(args):
    return (
        f"{args.model} on {args.dataset}, {args.steps} steps of {args.micro_batches} × {args.micro_batch_size} images, "
        f"learning rate {args.lr:g}, {args.workers} workers, {args.device}; torch {torch.__version__}"
    )


def write_csv(rows, path):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def plot(rows, path):
    """Accuracy against compute, a point for each row, with its deviation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    for row in rows:
        axes.errorbar(row["compute"], row["accuracy"], row["std"], fmt="o", capsize=3)
        axes.annotate(
            row["row"], (row["compute"], row["accuracy"]), fontsize=6, xytext=(4, 2), textcoords="offset points"
        )
    axes.set_xlabel("compute, as a fraction of full fine-tuning")
    axes.set_ylabel("test accuracy, %")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()
