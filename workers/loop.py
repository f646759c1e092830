"""Runs one attempt of a job on a Ray cluster: `python -m workers.loop --context FILE` or `--spec job.json`.

The driver waits until the cluster can hold the workers, finds or starts the scheduler actor, and hands a Ray Train
group to `Session`. It runs alike as a Ray job of our service and under plain `ray job submit`. What happened is in the
run's event file, whose last line is the outcome; the exit status is 0 for succeeded and paused, 1 for failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
import ray.train
import torch
from pydantic import ValidationError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from scheduler import actor
from scheduler.domain import DeviceProfile, Plan
from scheduler.errors import CapacityError, D2ftError, SystemFault, from_dict
from workers import logs
from workers.checkpoint import Vault
from workers.contract import JobSpec, RunContext
from workers.events import EventLog
from workers.poster import posting
from workers.profiling import keep_freed_memory
from workers.session import Place, Session
from workers.transport import Nccl, Shared
from workers.windows import Planned, Report

FAILURES_DIR = "failures"
PAUSED_FILE = "paused.json"  # what rank 0 leaves for the driver when the group has stopped at a checkpoint
POLL_S = 0.05
PLAN_TIMEOUT_S = 300.0
FORGET_TIMEOUT_S = 10.0
# A group without a member's heartbeat for this long is given up by the collectives.
COLLECTIVE_TIMEOUT_S = 120
_LOG = logging.getLogger(__name__)
_ECHO_CODES = ("peer_lost", "transport_timeout")


def main(argv: Sequence[str] | None = None) -> int:
    context = read_context(argv)
    with logs.kept(logs.log_path(context.run_dir, "driver")) as say:
        _LOG.info("job %s, attempt %d", context.job_id, context.attempt)
        paused = Path(context.run_dir) / PAUSED_FILE
        paused.unlink(missing_ok=True)
        ray.init(namespace=actor.NAMESPACE, log_to_driver=True, logging_level=logging.WARNING)
        _emit(context, "phase", name="starting")
        error = _attempt(context)
        told = error.to_dict() if error else None
        status = "failed" if error else "paused" if paused.exists() else "succeeded"
        message = str(told["message"]) if told else status
        with posting(context):
            _emit(context, "outcome", message, status=status, error=told)
        ray.shutdown()  # it prints what the workers said, and the last word is to be ours
        if error is not None:
            say(f"d2ft: job {context.job_id} failed: {message}")
    return 0 if error is None else 1


def read_context(argv: Sequence[str] | None) -> RunContext:
    """Parse the command line; a bad file ends the process with status 2 and says what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m workers.loop", description="Run one fine-tuning job on Ray.")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--context", type=Path, help="a run context, as the service writes it")
    given.add_argument("--spec", type=Path, help="a job spec, the body of POST /v1/jobs")
    parser.add_argument("--out", type=Path, help="with --spec: where the run goes (default: D2FT_HOME/runs/<time>)")
    args = parser.parse_args(argv)
    try:
        if args.context is not None:
            return RunContext.model_validate_json(args.context.read_bytes())
        return _context_of(JobSpec.model_validate_json(args.spec.read_bytes()), args.out)
    except (ValidationError, OSError) as error:
        parser.error(str(error))


def _context_of(spec: JobSpec, out: Path | None) -> RunContext:
    home = Path(os.environ.get("D2FT_HOME", "~/.d2ft")).expanduser()
    run_dir = (out or home / "runs" / time.strftime("%Y%m%d-%H%M%S")).absolute()
    return RunContext(
        job_id=run_dir.name,
        spec=spec,
        run_dir=str(run_dir),
        storage_path=str(run_dir / "ray"),
        use_gpu=torch.cuda.is_available(),
    )


def _attempt(context: RunContext) -> D2ftError | None:
    """Run the job; the error that ended it, or None."""
    try:
        with posting(context):  # while the group runs, it is rank 0 that posts
            wait_for_capacity(context)
            scheduler = actor.connect(scheduler_dir(context))
        try:
            _trainer(context).fit()
        finally:
            _forget(scheduler, context.job_id)
    except D2ftError as error:
        return error
    except Exception as error:
        _LOG.exception("the group of workers ends with an error")
        return root_cause(Path(context.run_dir)) or SystemFault(
            f"The run ended with {type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error) else ''}",
            code="driver_failed",
        )
    return None


def scheduler_dir(context: RunContext) -> str:
    """Where the scheduler actor keeps what outlives it."""
    return str(Path(context.storage_path) / "scheduler")


def _forget(scheduler: Any, job_id: str) -> None:
    """The job is over: the actor's memory of it is a courtesy, so that a lost actor must not change the outcome."""
    with contextlib.suppress(ray.exceptions.RayError):
        ray.get(scheduler.forget.remote(job_id), timeout=FORGET_TIMEOUT_S)


def _emit(context: RunContext, type: str, message: str = "", **data: Any) -> None:
    """The file is opened for one event: while the group runs, it is rank 0's to write."""
    with EventLog(context.run_dir) as log:
        log.emit(type, message, **data)


def wait_for_capacity(context: RunContext) -> None:
    """Wait until the cluster is large enough; raises CapacityError after `start_timeout_s`."""
    need = {name: amount * context.spec.workers for name, amount in _resources(context).items()}
    deadline = time.monotonic() + context.start_timeout_s
    while True:
        have = ray.cluster_resources()
        short = [name for name, amount in need.items() if have.get(name, 0) + 1e-9 < amount]
        if not short:
            return
        if time.monotonic() > deadline:
            name = short[0]
            raise CapacityError(
                f"{context.spec.workers} workers need {need[name]:g} {name}, "
                f"but after {context.start_timeout_s:g} s the cluster has {have.get(name, 0):g}.",
                code="cluster_too_small",
                param="workers",
                remedy="Ask for fewer workers or add nodes.",
            )
        time.sleep(0.5)


def _trainer(context: RunContext) -> TorchTrainer:
    backend = "nccl" if context.use_gpu else "gloo"

    def work() -> None:
        run_worker(context)

    return TorchTrainer(
        work,  # not by `train_loop_config`, which Ray shows on its dashboard: the context has a token
        torch_config=TorchConfig(backend=backend, timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=context.spec.workers, use_gpu=context.use_gpu, resources_per_worker=_resources(context)
        ),
        run_config=RunConfig(
            name=f"{context.job_id}-a{context.attempt}",
            storage_path=context.storage_path,
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=1),  # type: ignore[call-arg]
        ),
    )


def _resources(context: RunContext) -> dict[str, float]:
    gpu = {"GPU": 1.0} if context.use_gpu else {}
    return {**gpu, **context.resources_per_worker}


def run_worker(context: RunContext) -> None:
    """The body of one Ray Train worker."""
    with logs.kept(logs.log_path(context.run_dir, f"rank{ray.train.get_context().get_world_rank()}")):
        _work(context)


def _work(context: RunContext) -> None:
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
    place = Place(runtime.get_node_id(), labels, device, ranks.get_local_world_size())
    transport = Nccl(device) if context.use_gpu else Shared()
    planner = ActorPlanner(context, rank, ranks.get_world_size())
    with posting(context) if rank == 0 else contextlib.nullcontext():
        log = EventLog(context.run_dir) if rank == 0 else None
        session = Session(context.spec, context.run_dir, transport, planner, log, place, vault_of(context))
        try:
            session.run()
            if rank == 0 and session.saved is not None:
                (Path(context.run_dir) / PAUSED_FILE).write_text(json.dumps(asdict(session.saved)))
        except Exception as error:
            _record_failure(Path(context.run_dir), rank, error)
            raise
        finally:
            if log is not None:
                log.close()


def vault_of(context: RunContext) -> Vault:
    """Where the job's checkpoints go, next to what Ray Train keeps, and where this attempt looks for one."""
    directory = Path(context.storage_path) / "checkpoints" / context.job_id
    resume_from = None if context.resume_from is None else Path(context.resume_from)
    return Vault(directory, context.job_id, context.attempt, resume_from)


@dataclass
class ActorPlanner:
    """Asks the scheduler actor, by name; a call is repeated when the actor restarts, or is gone and made anew."""

    context: RunContext
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        self._actor = actor.connect(scheduler_dir(self.context))
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
                profiles = [DeviceProfile.from_dict(profile) for profile in answer["profiles"]]
                return Planned(Plan.from_dict(answer), profiles, answer.get("change") or {})
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
                self._actor = actor.connect(scheduler_dir(self.context))


def _record_failure(run_dir: Path, rank: int, error: Exception) -> None:
    """Leave this worker's error where the driver looks for the root cause."""
    known = error if isinstance(error, D2ftError) else _as_fault(error, rank)
    path = run_dir / FAILURES_DIR / f"rank{rank}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    trace = "".join(traceback.format_exception(error))
    record = {"at": time.time(), "rank": rank, "type": type(error).__name__, "error": known.to_dict(), "trace": trace}
    path.write_text(json.dumps(record))


def _as_fault(error: Exception, rank: int) -> D2ftError:
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return CapacityError(
            f"Worker {rank} ran out of memory ({psutil.virtual_memory().available >> 20} MiB of main memory left).",
            code="out_of_memory",
            param="micro_batch_size",
            remedy="Lower micro_batch_size, or spread the model over more workers.",
        )
    return SystemFault(f"Worker {rank} ended with {type(error).__name__}: {error}", code="worker_failed")


def root_cause(run_dir: Path) -> D2ftError | None:
    """The first failure that a worker recorded, but one that says only that a peer is gone comes last."""
    records = [json.loads(path.read_text()) for path in (run_dir / FAILURES_DIR).glob("rank*.json")]
    if not records:
        return None
    return from_dict(min(records, key=lambda record: (_is_echo(record), record["at"]))["error"])


def _is_echo(record: dict[str, Any]) -> bool:
    """Whether the failure is only what a worker sees when another one is gone."""
    return record["type"] in ("RuntimeError", "DistBackendError") or record["error"]["code"] in _ECHO_CODES


if __name__ == "__main__":
    sys.exit(main())
