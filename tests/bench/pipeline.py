"""How long a step waits for its images: the share of a step's time, for every kind of dataset, with augmentation and
without.

    python -m tests.bench.pipeline [--blocks 12] [--steps 12] [--pixels 320] [--kinds folder parquet webdataset hf]

The shape is that of `tests.bench.engine`: ViT-S width, 98 px, 5 micro-batches of 16 images, two workers with one thread
each on a core of their own, split blocks, all FULL. Images are photographs in size and cost: JPEGs of 320 × 320 smooth
noise, more than a step has. A wait is what `Prefetcher.get` takes before a step; decoding ahead takes processor time
from the step itself, which the ratio to the step whose images lie in memory shows. The first two steps do not count.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from PIL import Image, ImageFilter

from scheduler.compiler import compile_step
from scheduler.cost import Costs, residual_bytes
from scheduler.domain import Op, StepShape, uniform_ops
from scheduler.placement import propose
from tests.bench.engine import BATCH, MICRO_BATCHES, core_of, gathered, settled
from tests.bench.report import publish, target
from tests.workers.processes import on_processes
from workers.contract import Augment, JobSpec, Optimiser
from workers.data import Needs, Prefetcher, open_dataset
from workers.executor import Executor
from workers.model import model_input
from workers.optimiser import Adam
from workers.order import MicroBatches
from workers.partition import model_shape
from workers.profiling import profile_device
from workers.shard import Shard
from workers.steps import Batch, StepPrograms
from workers.transport import Shared

CLASSES, IMAGES = 10, 320
WARM_UP = 2
MOST_WAIT = 0.03
CHANGES = {
    "none": Augment(),
    "all": Augment(
        flip=True, crop_scale=(0.3, 1.0), randaugment="rand-m9-mstd0.5-inc1", erasing=0.25, mixup=0.8, cutmix=1.0
    ),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--pixels", type=int, default=320)
    parser.add_argument("--kinds", nargs="+", choices=WRITERS, default=list(WRITERS))
    parser.add_argument("--out", default="pipeline")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        images = photographs(args.pixels)
        uris = {kind: WRITERS[kind](Path(folder) / kind, images) for kind in args.kinds}
        measured = on_processes(2, measure, uris, args.blocks, args.steps)
    rows = rows_of(measured)
    targets = [target("largest share of a step spent waiting", max(row["wait share"] for row in rows), "<=", MOST_WAIT)]
    publish(
        args.out,
        rows,
        targets,
        f"{args.blocks} blocks; {args.steps} steps; {args.pixels} px; torch {torch.__version__}",
    )


def measure(rank, uris, num_blocks, num_steps):
    """By (kind, change): seconds of waiting and of the whole step, [steps, 2]; and "memory", where nothing is read."""
    model = settled(core_of(rank), num_blocks)
    executor, compiled = built(rank, model)
    needs = Needs(frozenset(compiled.own.image_micro_batches), frozenset(compiled.own.label_micro_batches))
    found = {}
    for kind, uri in uris.items():
        for change, augment in CHANGES.items():
            data = open_dataset(JobSpec(dataset=uri, augment=augment), model_input(model), skipped=())
            order = MicroBatches(data.num_train, BATCH, MICRO_BATCHES, seed=0)

            def wanted(step):
                return needs if step < num_steps else None

            with Prefetcher(data, order, wanted, augment=augment.wanted) as batches:
                found[kind, change] = clocked(executor, compiled, batches.get, num_steps)
                kept = batches.get(num_steps - 1)
    found["memory", "none"] = clocked(executor, compiled, lambda _: kept, num_steps)
    return found


def built(rank, model):
    """The executor of this worker, and the compiled step: split blocks, all FULL."""
    transport, step = Shared(), StepShape(MICRO_BATCHES, BATCH)
    shape = model_shape(model)
    transport.prepare(residual_bytes(shape, step))
    costs = Costs(shape, step, gathered(profile_device(model, step, transport)))
    placement = propose(costs, "split")[0].placement
    shard = Shard(model, placement, rank)
    executor = Executor(shard, transport, update=Adam(shard, Optimiser(learning_rate=1e-5), 1000))
    programs = compile_step(placement, uniform_ops(shape, MICRO_BATCHES, Op.FULL), costs)
    return executor, StepPrograms(programs, rank, costs, shard.dtype)


def clocked(executor, compiled, get, num_steps):
    seconds = []
    for step in range(num_steps):
        dist.barrier()
        begin = time.perf_counter()
        data = get(step)
        here = time.perf_counter()
        executor.run(compiled, Batch(data.images, data.labels))
        seconds.append((here - begin, time.perf_counter() - begin))
    return np.array(seconds)[WARM_UP:]


def rows_of(measured):
    """A row for each kind and change; the worker that waits longer speaks for both."""
    memory = max(float(np.median(of["memory", "none"][:, 1])) for of in measured)
    rows = []
    for kind, change in measured[0]:
        if kind == "memory":
            continue
        each = [of[kind, change] for of in measured]
        rows.append(
            {
                "kind": kind,
                "augment": change,
                "wait ms": 1e3 * max(float(np.median(of[:, 0])) for of in each),
                "step s": max(float(np.median(of[:, 1])) for of in each),
                "wait share": max(float(of[:, 0].sum() / of[:, 1].sum()) for of in each),
                "step / in memory": max(float(np.median(of[:, 1])) for of in each) / memory,
            }
        )
    return rows


def photographs(pixels):
    """(label, JPEG) of smooth noise, class after class."""
    rng, found = np.random.default_rng(0), []
    for number in range(IMAGES):
        noise = Image.fromarray(rng.integers(0, 256, (pixels // 4, pixels // 4, 3), dtype=np.uint8))
        out = io.BytesIO()
        noise.resize((pixels, pixels)).filter(ImageFilter.GaussianBlur(1)).save(out, "JPEG", quality=90)
        found.append((number % CLASSES, out.getvalue()))
    return found


def as_folder(root, images):
    for number, (label, data) in enumerate(images):
        path = root / f"train/c{label}/{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return f"folder://{root}"


def as_parquet(root, images):
    root.mkdir()
    stored = pa.array([{"bytes": data, "path": None} for _, data in images])
    labels = pa.array([label for label, _ in images])
    pq.write_table(pa.table({"image": stored, "label": labels}), root / "train.parquet", row_group_size=100)
    return f"parquet://{root}"


def as_archive(root, images):
    root.mkdir()
    with tarfile.open(root / "train-0.tar", "w") as archive:
        for number, (label, data) in enumerate(images):
            for suffix, content in (("jpg", data), ("cls", str(label).encode())):
                info = tarfile.TarInfo(f"{number:06d}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return f"webdataset://{root}"


def as_saved(root, images):
    datasets.disable_progress_bars()
    rows = {"image": [{"bytes": data, "path": None} for _, data in images], "label": [label for label, _ in images]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(root))
    return f"hf:{root}"


WRITERS = {"folder": as_folder, "parquet": as_parquet, "webdataset": as_archive, "hf": as_saved}


if __name__ == "__main__":
    main()
