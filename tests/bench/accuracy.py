"""What choosing operations costs in accuracy, beside full fine-tuning and what people would do instead.

    python -m tests.bench.accuracy [--seeds 0 1 2] [--steps 100] [--ways 'held*' …] [--out accuracy]
        [--model d2ft_digits] [--weights FILE] [--model-arg depth=8 …] [--img-size 56] [--dataset folder:///…]
        [--images-per-class 200] [--micro-batches 5] [--micro-batch-size 8] [--lr 5e-4] [--device cuda] [--at-once 12]

Every run is the product's own session on two workers that share each block's heads ("split"), so fractions, bytes and
processor seconds are measured, not computed: processes on a CPU, threads on a GPU. Runs differ in their way (`ways`)
alone; data, order, start and learning-rate schedule are those of full fine-tuning with the same seed. "stopped" trains
in full for fewer steps, with the schedule drawn together: the rival at equal compute. "last blocks" trains the blocks
nearest the classifier. Without `--ways` those of `ways.SHOWN` run; `--ways '*'` runs all.

Each run is kept in `.bench/NAME.jsonl` as it ends: started again, the program does what is missing. At the end come
the table, `.bench/NAME.json`, `.bench/NAME.csv` and `.bench/NAME.png`. With `--at-once` so many run beside each other;
their seconds are then those of a crowded machine.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.progress import Progress

from tests.bench.report import matching, mean_and_std, publish, target
from tests.bench.training import on_device, on_group
from tests.bench.ways import FULL, SHOWN, WAYS

WITHIN_COMPUTE, WITHIN_BYTES, STOPPED = "hardest 3F2S", "hardest 0.6 compute, 0.5 bytes", "stopped at 60 %"
COLUMNS = ("compute", "bytes", "cpu_s", "wall_s", "peak_mb")


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
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--window", type=int, default=100)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", help="patterns of names")
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default="accuracy")
    args = parser.parse_args()
    store = Path(".bench") / f"{args.out}.jsonl"
    store.parent.mkdir(exist_ok=True)
    wanted = matching(WAYS, [FULL, *(args.ways or SHOWN)])
    runs = complete(args, wanted, store)
    rows = [summary(name, [run for run in runs if run["way"] == name]) for name in wanted]
    full = next(row for row in rows if row["way"] == FULL)
    for row in rows:
        row["points below full"] = full["accuracy"] - row["accuracy"]
    publish(args.out, rows, targets(rows), note_of(args))
    write_csv(rows, store.with_suffix(".csv"))
    plot(rows, store.with_suffix(".png"))


def complete(args, wanted, store):
    """Every run asked for, from the file where it is there; the others are made and added to it."""
    setting = {key: value for key, value in vars(args).items() if key not in ("seeds", "ways", "out", "at_once")}
    known = [json.loads(line) for line in store.read_text().splitlines()] if store.exists() else []
    known = [run for run in known if run["setting"] == setting]
    found = [run for run in known if run["way"] in wanted and run["seed"] in args.seeds]
    done = {(run["way"], run["seed"]) for run in found}
    left = [(name, [seed for seed in args.seeds if (name, seed) not in done]) for name in wanted]
    if args.device != "cpu":
        left = [(name, [seed]) for name, seeds in left for seed in seeds]
    with pool_of(args) as pool, Progress() as progress, store.open("a") as file:
        bar = progress.add_task("runs", total=len(wanted) * len(args.seeds), completed=len(found))
        running = [pool.submit(train_of(args), args, name, seeds) for name, seeds in left if seeds]
        for ended in as_completed(running):
            for run in ended.result():
                found.append({"setting": setting, **run})
                file.write(json.dumps(found[-1]) + "\n")
                progress.update(bar, advance=1, description=run["way"])
            file.flush()
    return found


def pool_of(args):
    """On a GPU processes that stay, as their start is dear; on a CPU every way starts processes of its own."""
    if args.device == "cpu":
        return ThreadPoolExecutor(args.at_once)
    return ProcessPoolExecutor(args.at_once, mp_context=get_context("spawn"))


def train_of(args):
    return on_group if args.device == "cpu" else on_device


def summary(name, runs):
    """Means over the seeds, and the deviation of accuracy."""
    accuracy, std = mean_and_std([run["accuracy"] for run in runs])
    means = {key: statistics.fmean(run[key] for run in runs) for key in COLUMNS}
    return {"way": name, "accuracy": accuracy, "std": std, "seeds": len(runs), **means}


def targets(rows):
    """What the default way keeps within 60 % of the compute, and within 50 % of the bytes."""
    by_name = {row["way"]: row for row in rows}
    out = []
    for name, column, most in ((WITHIN_COMPUTE, "compute", 0.605), (WITHIN_BYTES, "bytes", 0.505)):
        if name in by_name:
            row = by_name[name]
            out.append(target(f"{name}: {column}", row[column], "<=", most))
            out.append(target(f"{name}: points below full fine-tuning", row["points below full"], "<=", 1.0))
    if {WITHIN_COMPUTE, STOPPED} <= set(by_name):
        ahead = by_name[WITHIN_COMPUTE]["accuracy"] - by_name[STOPPED]["accuracy"]
        out.append(target(f"{WITHIN_COMPUTE}: points above full fine-tuning {STOPPED}", ahead, ">=", 0.0))
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

    figure, axes = pyplot.subplots(figsize=(8, 6))
    shapes = "os^vD<>Pp*Xh"
    for index, row in enumerate(sorted(rows, key=lambda row: -row["accuracy"])):
        label = f"{row['accuracy']:.1f} ± {row['std']:.1f}  {row['way']}"
        shape = shapes[index // 10 % len(shapes)]  # the colours come round after ten
        axes.errorbar(row["compute"], row["accuracy"], row["std"], fmt=shape, capsize=3, label=label)
    axes.legend(fontsize=7, bbox_to_anchor=(1.01, 1), loc="upper left")
    axes.set_xlabel("compute, as a fraction of full fine-tuning")
    axes.set_ylabel("test accuracy, %")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()
