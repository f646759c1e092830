"""Runs one attempt of a job on a Ray cluster: `python -m workers.loop --context FILE` or `--spec job.json`.

The driver waits until the cluster can hold the workers, finds or starts the scheduler actor, and hands a Ray Train
group to `Session`. It runs alike as a Ray job of our service and under plain `ray job submit`. What happened is in the
run's event file, whose last line is the outcome; the exit status is 0 for succeeded and paused, 1 for failed.

Neither this process nor Ray Train's controller loads torch: each would spend seconds on it before a worker starts. So
the trainer is not `TorchTrainer`, whose configuration is torch's, but the class below it with a `Meeting`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from pydantic import ValidationError
from ray.train import FailureConfig, RunConfig, ScalingConfig

from scheduler import actor
from scheduler.errors import CapacityError, D2ftError, SystemFault
from workers import early, logs
from workers.contract import JobSpec, RunContext
from workers.control import PAUSED_FILE
from workers.events import EventLog
from workers.failures import root_cause
from workers.meeting import Meeting, Trainer
from workers.poster import posting

RANK = "workers.rank"  # what a worker runs
FORGET_TIMEOUT_S = 10.0
_LOG = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    context = read_context(argv)
    with logs.kept(logs.log_path(context.run_dir, "driver")) as say:
        _LOG.info("job %s, attempt %d", context.job_id, context.attempt)
        paused = Path(context.run_dir) / PAUSED_FILE
        paused.unlink(missing_ok=True)
        hook = {"worker_process_setup_hook": early.HOOK}
        ray.init(namespace=actor.NAMESPACE, log_to_driver=True, logging_level=logging.WARNING, runtime_env=hook)
        if context.use_gpu is None:
            context = context.model_copy(update={"use_gpu": ray.cluster_resources().get("GPU", 0) > 0})
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
    )


def _attempt(context: RunContext) -> D2ftError | None:
    """Run the job; the error that ended it, or None."""
    try:
        with posting(context):  # while the group runs, it is rank 0 that posts
            wait_for_capacity(context)
            scheduler = actor.connect(context.scheduler_dir)
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


def _trainer(context: RunContext) -> Trainer:
    def work() -> None:
        importlib.import_module(RANK).run(context)  # by name: it loads torch

    return Trainer(
        work,  # not by `train_loop_config`, which Ray shows on its dashboard: the context has a token
        backend_config=Meeting(),
        scaling_config=ScalingConfig(
            num_workers=context.spec.workers, use_gpu=bool(context.use_gpu), resources_per_worker=_resources(context)
        ),
        run_config=RunConfig(
            name=f"{context.job_id}-a{context.attempt}",
            storage_path=context.storage_path,
            worker_runtime_env={"env_vars": {early.MODULE: RANK}},
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=1),  # type: ignore[call-arg]
        ),
    )


def _resources(context: RunContext) -> dict[str, float]:
    gpu = {"GPU": 1.0} if context.use_gpu else {}
    return {**gpu, **context.resources_per_worker}


if __name__ == "__main__":
    sys.exit(main())
