"""Runs a function on real gloo processes, for tests; the function and its arguments must be importable."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_BUSY = """
import os
os.sched_setaffinity(0, {%d})
while os.getppid() == %d:
    sum(range(100_000))
"""


def on_processes(num_workers, work, *args, backend="gloo"):
    """Run work(rank, *args) on one process per worker and return what each returned, in rank order."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([__name__, "timm"])  # loaded once, not by each process of each test
    results = context.SimpleQueue()
    body_args = (num_workers, free_port(), backend, work, args, results)
    running = mp.start_processes(_body, args=body_args, nprocs=num_workers, join=False, start_method="forkserver")
    found = {}
    # A result larger than the pipe holds its process up until it is read, so reading cannot wait for the end.
    while not running.join(timeout=0.05):
        _drain(results, found)
    _drain(results, found)
    return [found[rank] for rank in range(num_workers)]


def _drain(results, found):
    while not results.empty():
        rank, value = results.get()
        found[rank] = value


def busy_guest(core):
    """A process that never sleeps, pinned to a core; it ends with this one, or when it is killed."""
    return subprocess.Popen([sys.executable, "-c", _BUSY % (core, os.getpid())])


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
