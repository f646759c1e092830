"""Runs a function on real gloo processes, for tests; the function and its arguments must be importable."""

from __future__ import annotations

import socket
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_processes(num_workers, work, *args, backend="gloo"):
    """Run work(rank, *args) on one process per worker and return what each returned, in rank order."""
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    mp.spawn(_body, args=(num_workers, free_port(), backend, work, args, results), nprocs=num_workers)
    found = dict(results.get() for _ in range(num_workers))
    return [found[rank] for rank in range(num_workers)]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _body(rank, num_workers, port, backend, work, args, results):
    torch.set_num_threads(1)
    dist.init_process_group(
        backend,
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=num_workers,
        timeout=timedelta(seconds=60),
    )
    try:
        results.put((rank, work(rank, *args)))
    finally:
        dist.destroy_process_group()
