"""Runs one attempt of a job on a Ray cluster: `python -m workers.loop --context FILE` or `--spec job.json`.

The driver waits until the cluster can hold the workers, finds or starts the scheduler actor, and hands a Ray Train
group to `Session`. A group that is lost is followed by another, which goes on from the newest checkpoint. It runs alike
as a Ray job of our service and under plain `ray job submit`. What happened is in the run's event file, whose last line
is the outcome; the exit status is 0 for succeeded and paused, 1 for failed.

Neither this process nor Ray Train's controller loads torch: each would spend seconds on it before a worker starts. So
the trainer is not `TorchTrainer`, whose configuration is torch's, but the class below it with a `Meeting`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from pydantic import ValidationError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from scheduler import actor, failpoints
from scheduler.errors import D2ftError, SystemFault
from workers import control, early, logs
from workers.contract import JobSpec, RunContext
from workers.control import PAUSED_FILE
from workers.events import EventLog
from workers.failures import FAILURES_DIR, root_cause
from workers.manifest import names
from workers.meeting import Meeting, Trainer
from workers.muster import Recruiter, muster, resources_of
from workers.poster import posting
from workers.pulse import Account, accounts
from workers.recovery import Losses, last_step
from workers.tracking import Trackers, tracked
from workers.watch import STRIKE_S, Watchdog, strike_here

RANK = "workers.rank"  # what a worker runs
FORGET_TIMEOUT_S = 10.0
_LOG = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    context = read_context(argv)
    with logs.kept(logs.log_path(context.run_dir, "driver")) as say:
        _LOG.info("job %s, attempt %d", context.job_id, context.attempt)
        hook = {"worker_process_setup_hook": early.HOOK}
        ray.init(namespace=actor.NAMESPACE, log_to_driver=True, logging_level=logging.WARNING, runtime_env=hook)
        if context.use_gpu is None:
            context = context.model_copy(update={"use_gpu": ray.cluster_resources().get("GPU", 0) > 0})
        with tracked(context) as trackers:
            before = signal.signal(signal.SIGTERM, lambda *_: _switched_off(Path(context.run_dir), trackers))
            _emit(context, "phase", name="starting")
            try:
                error = _attempt(context)
                why = _paused(context)
            except _SwitchedOffError:
                error, why = None, control.DRAIN
            finally:
                signal.signal(signal.SIGTERM, before)
            told = error.to_dict() if error else None
            status = "failed" if error else "paused" if why else "succeeded"
            message = str(told["message"]) if told else status
            with posting(context):
                _emit(context, "outcome", message, status=status, error=told, **({"why": why} if why else {}))
        ray.shutdown()  # it prints what the workers said, and the last word is to be ours
        if error is not None:
            say(f"d2ft: job {context.job_id} failed: {message}")
    return 0 if error is None else 1


class _SwitchedOffError(BaseException):
    """The driver is to end, and no step has been made that would be lost."""


def _switched_off(run_dir: Path, trackers: Trackers) -> None:
    """SIGTERM: the end at once for a job that is cancelled, else a checkpoint, which is asked for like a pause."""
    if (want := control.asked(run_dir)) in (control.CANCEL, control.END):
        trackers.cut_off("cancelled" if want == control.CANCEL else "paused")
        os._exit(128 + signal.SIGTERM)  # what Ray runs for this driver ends with it
    _LOG.info("SIGTERM: this machine is to be switched off")
    if not any(account.phase == "train" for account in accounts(run_dir)):
        raise _SwitchedOffError
    control.ask(run_dir, control.DRAIN)


def _paused(context: RunContext) -> str | None:
    """Why the group has stopped at a checkpoint; None where it has not."""
    if not (Path(context.run_dir) / PAUSED_FILE).exists():
        return None
    return control.asked(context.run_dir) or control.PAUSE


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
    )


def _attempt(context: RunContext) -> D2ftError | None:
    """Run the job, by as many groups of workers as it takes; the error that ended it, or None."""
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
            _emit(context, "phase", f"lost after step {step}: {error.message}", name="recovering", **reason)
        elif _paused(context) == control.REGROUP:
            _emit(
                context, "phase", "a group of another size", name="recovering", reason="regroup", failures=losses.count
            )
        else:
            return None
        update: dict[str, Any] = {"group": context.group + 1}
        if names(Path(context.vault_dir)):  # until this run has one of its own, it is the one that it began with
            update["resume_from"] = context.vault_dir
        context = context.model_copy(update=update)


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


def _emit(context: RunContext, type: str, message: str = "", **data: Any) -> None:
    """The file is opened for one event: while the group runs, it is rank 0's to write."""
    with EventLog(context.run_dir) as log:
        log.emit(type, message, **data)


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


if __name__ == "__main__":
    sys.exit(main())
