"""Runs one attempt of a job on a Ray cluster: `python -m workers.loop --context FILE`, or with the flags of a job.

It runs alike as a Ray job of our service and under plain `ray job submit`:

    ray job submit --address http://HEAD:8265 --working-dir . -- \\
        python -m workers.loop --model d2ft_digits --dataset digits --ratios 3,0,2 --out /shared/run1

What happened is in the run's event file, whose last line is the outcome; without a service it is printed as well, as it
happens. The exit status is 0 for succeeded and paused, 1 for failed, 2 for a command line that asks for nothing that
can be.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from scheduler.errors import D2ftError
from workers import control, logs
from workers.attempt import attempt, emit, has_gpus, join, leave, paused, tell
from workers.command import add_job_flags, add_places, job_spec, run_dir_of
from workers.contract import JobSpec, RunContext
from workers.pulse import accounts
from workers.tracking import Trackers, tracked

_LOG = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    context = read_context(argv)
    with logs.kept(logs.log_path(context.run_dir, "driver")) as say:
        _LOG.info("job %s, attempt %d", context.job_id, context.attempt)
        with tracked(context, say if context.post_url is None else None) as trackers:
            before = signal.signal(signal.SIGTERM, lambda *_: _switched_off(Path(context.run_dir), trackers))
            try:
                error, why = _run(context)
            except _SwitchedOffError:
                error, why = None, control.DRAIN
            finally:
                signal.signal(signal.SIGTERM, before)
            message = tell(context, error, why)
        leave()  # it prints what the workers said, and the last word is to be ours
        if error is not None:
            say(f"d2ft: job {context.job_id} failed: {message}")
    return 0 if error is None else 1


def _run(context: RunContext) -> tuple[D2ftError | None, str | None]:
    """Join the cluster and run the attempt; what ended it, and why it is paused if it is."""
    try:
        join()
    except D2ftError as error:
        return error, None
    if context.use_gpu is None:
        context = context.model_copy(update={"use_gpu": has_gpus()})
    emit(context, "phase", name="starting")
    return attempt(context), paused(context)


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


def read_context(argv: Sequence[str] | None) -> RunContext:
    """Parse the command line; a bad one ends the process with status 2 and says what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m workers.loop", description="Run one fine-tuning job on Ray.")
    add_places(parser, spec="a job spec, the body of POST /v1/jobs; flags go over it")
    add_job_flags(parser)
    args = parser.parse_args(argv)
    try:
        if args.context is not None:
            return RunContext.model_validate_json(args.context.read_bytes())
        return plain_context(job_spec(args), run_dir_of(args))
    except (ValidationError, ValueError, OSError) as error:
        parser.error(str(error))


def plain_context(spec: JobSpec, run_dir: Path) -> RunContext:
    """A run that no service has ordered: everything of it is in one directory."""
    return RunContext(job_id=run_dir.name, spec=spec, run_dir=str(run_dir), storage_path=str(run_dir / "ray"))


if __name__ == "__main__":
    sys.exit(main())
