"""One worker of a Ray Train group: makes the process group, asks the scheduler actor for plans, runs the session."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import get_device

from scheduler import actor
from scheduler.errors import CapacityError, D2ftError, SystemFault, from_dict
from workers import logs
from workers.changes import Planned
from workers.checkpoint import Vault
from workers.contract import RunContext
from workers.control import PAUSED_FILE
from workers.events import EventLog
from workers.failures import record
from workers.poster import posting
from workers.profiling import keep_freed_memory
from workers.pulse import Pulse
from workers.session import Place, Session
from workers.transport import Nccl, Shared
from workers.windows import Report

POLL_S = 0.05
PLAN_TIMEOUT_S = 300.0
# A group without a member's heartbeat for this long is given up by the collectives.
COLLECTIVE_TIMEOUT_S = 120
_LOG = logging.getLogger(__name__)


def run(context: RunContext) -> None:
    """All that one worker does in an attempt."""
    ranks = ray.train.get_context()
    rank, size = ranks.get_world_rank(), ranks.get_world_size()
    with (
        logs.kept(logs.log_path(context.run_dir, f"rank{rank}")),
        Pulse(context.run_dir, rank, ray.get_runtime_context().get_node_id()) as pulse,
        _group(rank, size, bool(context.use_gpu)),
    ):
        _work(context, pulse)


@contextlib.contextmanager
def _group(rank: int, size: int, use_gpu: bool) -> Iterator[None]:
    """The process group, made where `Meeting` has said, and let go of at the end."""
    if use_gpu:
        torch.cuda.set_device(get_device())
    backend, patience = "nccl" if use_gpu else "gloo", timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    if (interface := interface_of(ray.util.get_node_ip_address())) is not None:
        # Left to itself gloo listens where the host's name leads, which on many hosts is 127.0.0.1.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    dist.init_process_group(backend, rank=rank, world_size=size, timeout=patience)
    try:
        yield
    finally:
        dist.destroy_process_group()


def interface_of(address: str) -> str | None:
    """The network interface of this host that has the address; None where none has, as behind a translated one."""
    for name, has in psutil.net_if_addrs().items():
        if any(each.address == address for each in has):
            return name
    return None


def _work(context: RunContext, pulse: Pulse) -> None:
    ranks = ray.train.get_context()
    rank = ranks.get_world_rank()
    _LOG.info("job %s, attempt %d: rank %d of %d", context.job_id, context.attempt, rank, ranks.get_world_size())
    if context.cores is not None:
        os.sched_setaffinity(0, {context.cores[rank]})
    # Threads follow what was booked; more would only take turns on the same cores.
    threads = 1 if context.cores is not None else int(context.resources_per_worker.get("CPU", 1))
    torch.set_num_threads(max(1, threads))
    keep_freed_memory()
    device = str(get_device()) if context.use_gpu else "cpu"
    runtime = ray.get_runtime_context()
    labels = {key: str(value) for key, value in runtime.get_node_labels().items()}
    place = Place(runtime.get_node_id(), labels, device, ranks.get_local_world_size(), context.worker_memory_bytes)
    transport = Nccl(device) if context.use_gpu else Shared()
    planner = ActorPlanner(context, rank, ranks.get_world_size())
    with posting(context) if rank == 0 else contextlib.nullcontext():
        log = EventLog(context.run_dir) if rank == 0 else None
        session = Session(context.spec, context.run_dir, transport, planner, log, place, vault_of(context), pulse)
        try:
            session.run()
            if rank == 0 and session.saved is not None:
                (Path(context.run_dir) / PAUSED_FILE).write_text(json.dumps(asdict(session.saved)))
        except Exception as error:
            record(Path(context.run_dir), rank, error, as_known(error, rank))
            raise
        finally:
            if log is not None:
                log.close()


def vault_of(context: RunContext) -> Vault:
    """Where the job's checkpoints go, and where this attempt looks for one."""
    resume_from = None if context.resume_from is None else Path(context.resume_from)
    return Vault(Path(context.vault_dir), context.job_id, context.attempt, resume_from, context.group)


@dataclass
class ActorPlanner:
    """Asks the scheduler actor, by name; a call is repeated when the actor restarts, or is gone and made anew."""

    context: RunContext
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        self._actor = actor.connect(self.context.scheduler_dir)
        self._announcement: dict[str, Any] = {}

    def announce(self, announcement: dict[str, Any]) -> None:
        self._announcement = announcement
        answer = self._ask("announce", self.world_size, self.rank, announcement)
        if "error" in answer:
            raise from_dict(answer["error"])

    def plan(self, window: int, report: Report | None) -> Planned:
        if report is not None and "placement" in report:
            # Should the actor lose its memory, it must not choose another placement than the one in use.
            self._announcement["placement"] = report["placement"]
        deadline = time.monotonic() + PLAN_TIMEOUT_S
        answer: dict[str, Any] = {}
        while time.monotonic() < deadline:
            answer = self._ask("plan", window, report, self.rank)
            if "cycle" in answer:
                return Planned.from_answer(answer)
            if answer.get("error", {}).get("code") == "unknown_attempt":
                self.announce(self._announcement)  # the actor was restarted and has forgotten
            elif "error" in answer:
                raise from_dict(answer["error"])
            time.sleep(POLL_S)
        raise SystemFault(
            f"No plan for window {window} came within {PLAN_TIMEOUT_S:g} s: {answer}", code="plan_timeout"
        )

    def _ask(self, method: str, *args: Any) -> dict[str, Any]:
        """Call the actor about this attempt, over its restarts; a lost one is replaced and knows nothing yet."""
        deadline = time.monotonic() + PLAN_TIMEOUT_S
        while True:
            try:
                call = getattr(self._actor, method).remote(self.context.job_id, self.context.attempt, *args)
                answer: dict[str, Any] = ray.get(call)
                return answer
            except ray.exceptions.RayActorError as error:
                if time.monotonic() > deadline:
                    raise SystemFault(f"The scheduler is gone: {error}", code="scheduler_lost") from error
                time.sleep(POLL_S)
                self._actor = actor.connect(self.context.scheduler_dir)


def as_known(error: Exception, rank: int) -> D2ftError:
    """The error in words of ours."""
    if isinstance(error, D2ftError):
        return error
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return CapacityError(
            f"Worker {rank} ran out of memory ({psutil.virtual_memory().available >> 20} MiB of main memory left).",
            code="out_of_memory",
            param="micro_batch_size",
            remedy="Lower micro_batch_size, or spread the model over more workers.",
        )
    return SystemFault(f"Worker {rank} ended with {type(error).__name__}: {error}", code="worker_failed")
