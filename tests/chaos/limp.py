"""What a group could still do without one of its workers: messages, sums, rings, and for how long Ray lets it live.

    python -m tests.chaos.limp

Three processes; rank 1 is killed while the others wait for it. Each survivor then tries, one after the other, what a
step without the lost worker's heads would need. Last, a group of Ray Train whose survivor pays no heed to the loss: how
long it lives depends on how often Ray looks.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ray.train import FailureConfig, RunConfig, ScalingConfig

from tests.bench.report import publish
from tests.chaos.runs import ray_here
from tests.service.conftest import free_port
from workers import neighbours
from workers.meeting import Meeting, Trainer

LOST, SURVIVORS = 1, (0, 2)
PATIENCE_S = 20.0
LOOKS_S = (0.2, 2.0, 30.0)
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--group", type=Path, help="only run the group of Ray Train, and leave its times here")
    folder = parser.parse_args().group
    if folder is not None:
        train(folder)
    else:
        publish("limp", [*in_a_process_group(), *under_ray_train()], [])


def in_a_process_group() -> list[Row]:
    """What survivors of a gloo group can do."""
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    group = mp.spawn(_member, args=(free_port(), free_port(), results), nprocs=3, join=False)
    told = [results.get() for _ in SURVIVORS]
    for process in group.processes:
        process.join(timeout=10)
        process.kill()
    return [_row(what, [each[what] for each in told]) for what in told[0]]


def _row(what: str, tried: list[tuple[str, float]]) -> Row:
    said = [answer[:60] for answer, _ in tried if answer != "yes"]
    return {"what": what, "works": not said, "seconds": max(seconds for _, seconds in tried), "said": " | ".join(said)}


def _member(rank: int, port: int, second_port: int, results: Any) -> None:
    torch.set_num_threads(1)
    patience = timedelta(seconds=PATIENCE_S)
    place = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=3, timeout=patience)
    rings = neighbours.connect(4096)
    apart = dist.new_group(list(SURVIVORS))
    dist.barrier()
    if rank == LOST:
        os.kill(os.getpid(), signal.SIGKILL)
    other = SURVIVORS[1 - SURVIVORS.index(rank)]
    tensor = torch.ones(16)

    def again() -> None:
        dist.destroy_process_group()
        place = f"tcp://127.0.0.1:{second_port}"
        dist.init_process_group("gloo", init_method=place, rank=SURVIVORS.index(rank), world_size=2, timeout=patience)
        dist.all_reduce(tensor)

    def through_ring() -> None:
        rings.outlets[other].put(tensor)
        rings.inlets[other].take(tensor.shape, tensor.dtype, PATIENCE_S, copied=True)

    tries: dict[str, Callable[[], object]] = {
        "a message from the lost one": lambda: dist.recv(tensor, LOST),
        "messages between survivors": lambda: _exchange(tensor, rank, other),
        "a sum over the whole group": lambda: dist.all_reduce(tensor),
        "messages after that sum": lambda: _exchange(tensor, rank, other),
        "a sum over a group of survivors made before": lambda: dist.all_reduce(tensor, group=apart),
        "rings between survivors": through_ring,
        "a new group of survivors, same processes": again,
    }
    results.put({what: _tried(action) for what, action in tries.items()})


def _exchange(tensor: torch.Tensor, rank: int, other: int) -> None:
    sent = dist.isend(tensor, other)
    dist.recv(torch.empty_like(tensor), other)
    if sent is not None:
        sent.wait()


def _tried(action: Callable[[], object]) -> tuple[str, float]:
    begin = time.perf_counter()
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}".replace("\n", " "), time.perf_counter() - begin
    return "yes", time.perf_counter() - begin


def under_ray_train() -> list[Row]:
    """How long a survivor lives that pays no heed to the loss."""
    rows = []
    with ray_here() as cluster:
        for number, look_s in enumerate(LOOKS_S):
            folder = cluster.home / f"look{number}"
            folder.mkdir()
            looks = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(look_s), "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
            command = [sys.executable, "-m", "tests.chaos.limp", "--group", str(folder)]
            subprocess.run(command, env={**os.environ, **cluster.env, **looks}, capture_output=True, check=True)
            lost, last = (float((folder / name).read_text()) for name in ("lost", "beat"))
            what = f"Ray Train that looks every {look_s:g} s: the survivor's life"
            rows.append({"what": what, "works": False, "seconds": last - lost, "said": ""})
    return rows


def train(folder: Path) -> None:
    """A group of two under Ray Train, of which one ends."""
    trainer = Trainer(
        lambda: _beat(folder),
        backend_config=Meeting(),
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
        run_config=RunConfig(storage_path=str(folder), failure_config=FailureConfig(max_failures=0)),
    )
    with contextlib.suppress(ray.train.TrainingFailedError):
        trainer.fit()


def _beat(folder: Path) -> None:
    """Rank 0 writes the time, on and on; rank 1 ends after a while."""
    rank, begin = ray.train.get_context().get_world_rank(), time.time()
    while True:
        if rank == 0:
            (folder / "next").write_text(str(time.time()))
            (folder / "next").rename(folder / "beat")
        elif time.time() - begin > 5:
            (folder / "lost").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05)


if __name__ == "__main__":
    main()
