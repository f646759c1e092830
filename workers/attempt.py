"""One attempt of a job on a Ray cluster that this process has joined, for a driver of its own and for a sweep's trials.

It waits until the cluster can hold the workers, finds or starts the scheduler actor, and hands a Ray Train group to
`Session`. A group that is lost is followed by another, which goes on from the newest checkpoint.

Neither this process nor Ray Train's controller loads torch: each would spend seconds on it before a worker starts. So
the trainer is not `TorchTrainer`, whose configuration is torch's, but the class below it with a `Meeting`.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from scheduler import actor, failpoints
from scheduler.errors import D2ftError, SystemFault, UserError
from workers import control, early
from workers.contract import DriverContext, RunContext
from workers.control import PAUSED_FILE
from workers.events import EventLog
from workers.failures import FAILURES_DIR, root_cause
from workers.manifest import names
from workers.meeting import Meeting, Trainer
from workers.muster import Recruiter, muster, resources_of
from workers.poster import posting
from workers.pulse import Account
from workers.recovery import Losses, last_step
from workers.watch import STRIKE_S, Watchdog, strike_here

RANK = "workers.rank"  # what a worker runs
FORGET_TIMEOUT_S = 10.0
# Ray Train paces what it hears of its workers by the first; the second is a process that only tells of lost workers.
TRAIN_ENV = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
_LOG = logging.getLogger(__name__)


def join() -> None:
    """Join the cluster that this process is told of, or start one of its own. Raises UserError where it is refused.

    Ray takes SIGTERM for itself, by which the process would exit without a word; it is given back.
    """
    hook = {"worker_process_setup_hook": early.HOOK}
    heeds = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(namespace=actor.NAMESPACE, log_to_driver=True, logging_level=logging.WARNING, runtime_env=hook)
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        where = os.environ.get("RAY_ADDRESS", "this machine's")
        raise UserError(
            f"The Ray cluster ({where}) does not let this process in: {error}",
            code="cluster_refused",
            remedy="Check the address, and that RAY_AUTH_MODE is token and RAY_AUTH_TOKEN_PATH the cluster's token.",
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, heeds)


def leave() -> None:
    """Leave the cluster; what Ray has kept back of its workers' output is printed."""
    ray.shutdown()


def has_gpus() -> bool:
    """Whether the cluster has any."""
    return bool(ray.cluster_resources().get("GPU", 0) > 0)


def attempt(context: RunContext) -> D2ftError | None:
    """Run the job, by as many groups of workers as it takes; the error that ended it, or None."""
    for name, value in TRAIN_ENV.items():
        os.environ.setdefault(name, value)
    losses = Losses(context.max_losses)
    while True:
        _clear(Path(context.run_dir))
        error = _group(context)
        if error is not None:
            step = last_step(context.run_dir)
            if end := losses.end(error, step):
                return end
            _LOG.warning("group %d is lost after step %d: %s", context.group, step, error.message)
            reason = {"reason": error.message, "code": error.code, "failures": losses.count, "step": step}
            emit(context, "phase", f"lost after step {step}: {error.message}", name="recovering", **reason)
        elif paused(context) == control.REGROUP:
            emit(
                context, "phase", "a group of another size", name="recovering", reason="regroup", failures=losses.count
            )
        else:
            return None
        update: dict[str, Any] = {"group": context.group + 1}
        if names(Path(context.vault_dir)):  # until this run has one of its own, it is the one that it began with
            update["resume_from"] = context.vault_dir
        context = context.model_copy(update=update)


def tell(context: RunContext, error: D2ftError | None, why: str | None) -> str:
    """Write how the attempt ended and have it posted, as `outcome` says."""
    with posting(context):
        return outcome(context, error, why)


def outcome(context: DriverContext, error: D2ftError | None, why: str | None) -> str:
    """Write how an attempt ended, `why` it is paused if it is; the message."""
    told = error.to_dict() if error else None
    status = "failed" if error else "paused" if why else "succeeded"
    message = str(told["message"]) if told else status
    emit(context, "outcome", message, status=status, error=told, **({"why": why} if why else {}))
    return message


def paused(context: RunContext) -> str | None:
    """Why the group has stopped at a checkpoint; None where it has not."""
    if not (Path(context.run_dir) / PAUSED_FILE).exists():
        return None
    return control.asked(context.run_dir) or control.PAUSE


def emit(context: DriverContext, type: str, message: str = "", **data: Any) -> None:
    """The file is opened for one event: while the group runs, it is rank 0's to write."""
    with EventLog(context.run_dir) as log:
        log.emit(type, message, **data)


def _clear(run_dir: Path) -> None:
    """What the group before has left and would be taken for this one's."""
    shutil.rmtree(run_dir / FAILURES_DIR, ignore_errors=True)
    (run_dir / PAUSED_FILE).unlink(missing_ok=True)
    if control.asked(run_dir) == control.REGROUP:
        control.take_back(run_dir)


def _group(context: RunContext) -> D2ftError | None:
    """Have one group run the job, or what is left of it; the error that ended it, or None."""
    try:
        with posting(context):  # while the group runs, it is rank 0 that posts
            size = muster(context)
            scheduler = actor.connect(context.scheduler_dir)
        try:
            with Watchdog(context.run_dir, size, strike), Recruiter(context, size):
                _trainer(context, size).fit()
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


def strike(account: Account, number: int) -> None:
    """Send a worker's process a signal, on whatever machine of the cluster it is."""
    if account.node == ray.get_runtime_context().get_node_id():
        strike_here(account, number)
        return
    there = NodeAffinitySchedulingStrategy(account.node, soft=False)
    task: Any = ray.remote(strike_here)
    placed = task.options(num_cpus=0, scheduling_strategy=there, max_retries=0)
    ray.get(placed.remote(account, number), timeout=STRIKE_S)  # the node may be gone


def _forget(scheduler: Any, job_id: str) -> None:
    """The job is over: the actor's memory of it is a courtesy, so that a lost actor must not change the outcome."""
    with contextlib.suppress(ray.exceptions.RayError):
        ray.get(scheduler.forget.remote(job_id), timeout=FORGET_TIMEOUT_S)


def _trainer(context: RunContext, size: int) -> Trainer:
    def work() -> None:
        importlib.import_module(RANK).run(context)  # by name: it loads torch

    return Trainer(
        work,  # not by `train_loop_config`, which Ray shows on its dashboard: the context has a token
        backend_config=Meeting(),
        scaling_config=ScalingConfig(
            num_workers=size, use_gpu=bool(context.use_gpu), resources_per_worker=resources_of(context)
        ),
        run_config=RunConfig(
            name=f"{context.job_id}-a{context.attempt}.{context.group}",
            storage_path=context.storage_path,
            worker_runtime_env={"env_vars": {early.MODULE: RANK, **failpoints.told()}},
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=1),  # type: ignore[call-arg]
        ),
    )
