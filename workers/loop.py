"""Runs one attempt of a job on a Ray cluster: `python -m workers.loop --context FILE`, or with the flags of a job.

It runs alike as a Ray job of our service and under plain `ray job submit`:

    ray job submit --address http://HEAD:8265 --working-dir . -- \\
        python -m workers.loop --model d2ft_digits --dataset digits --ratios 3,0,2 --out /shared/run1

What happened is in the run's event file, whose last line is the outcome; where no service has ordered the run it is
printed as well, as it happens. A service that is named in the environment lists such a run (`outside`), and may have it
paused or cancelled. The exit status is 0 for succeeded and paused, 1 for failed, 2 for a command line that asks for
nothing that can be, or a key that is refused, 143 for a run that was cancelled.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from pydantic import ValidationError

from scheduler.errors import D2ftError, SystemFault, UserError
from workers import control, logs, outside
from workers.attempt import attempt, emit, has_gpus, join, leave, paused, tell
from workers.command import add_job_flags, add_places, job_spec, run_dir_of
from workers.contract import RunContext
from workers.poster import Poster, posting
from workers.pulse import accounts
from workers.tracking import CUT_S, Trackers, tracked

_LOG = logging.getLogger(__name__)
Ended = tuple[D2ftError | None, str]  # what went wrong, if anything did, and the outcome's message


def main(argv: Sequence[str] | None = None) -> int:
    key = os.environ.pop(outside.KEY, None)  # before anything is started that would inherit it
    context = read_context(argv)
    with logs.kept(logs.log_path(context.run_dir, "driver")) as say, ExitStack() as held:
        if context.outside:
            try:
                held.enter_context(outside.alone(Path(context.run_dir)))
                context = _listed(context, key, say)
            except UserError as refused:
                say(f"d2ft: {refused.message} {refused.remedy or ''}".rstrip())
                return 2
        _LOG.info("job %s, attempt %d", context.job_id, context.attempt)
        error, message = _outside(context, say) if context.outside else _ordered(context, say)
        leave()  # it prints what the workers said, and the last word is to be ours
        if error is not None:
            say(f"d2ft: job {context.job_id} failed: {message}")
    return 0 if error is None else 1


def _ordered(context: RunContext, say: logs.Say) -> Ended:
    """A run whose service follows it, and stops what Ray runs for it."""
    with tracked(context, say if context.post_url is None else None) as trackers:
        before = signal.signal(signal.SIGTERM, lambda *_: _switched_off(Path(context.run_dir), trackers))
        try:
            error, why = _run(context)
        finally:
            signal.signal(signal.SIGTERM, before)
        return error, tell(context, error, why)


def _outside(context: RunContext, say: logs.Say) -> Ended:
    """A run that no service has ordered: it is printed, and this process posts all of it and hears what is wanted."""
    silent = context.model_copy(update={"post_url": None, "post_token": None})
    posters: list[Poster | None] = []

    def last_word() -> None:
        emit(silent, "outcome", "cancelled", status="cancelled", error=None)
        for poster in filter(None, posters):
            poster.close(CUT_S)

    with tracked(silent, say) as trackers:
        before = signal.signal(signal.SIGTERM, lambda *_: _switched_off(Path(context.run_dir), trackers, last_word))
        try:
            with posting(context, end=lambda: os.kill(os.getpid(), signal.SIGTERM)) as poster:
                posters.append(poster)
                error, why = _caught(silent)
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it has ended, and is about to say how
                return error, tell(silent, error, why)
        finally:
            signal.signal(signal.SIGTERM, before)


def _caught(context: RunContext) -> tuple[D2ftError | None, str | None]:
    """`_run`, of which nobody else would see that it broke off."""
    try:
        return _run(context)
    except Exception as error:
        _LOG.exception("the driver ends with an error")
        return SystemFault(f"The driver ended with {type(error).__name__}: {error}", code="driver_failed"), None


def _listed(context: RunContext, key: str | None, say: logs.Say) -> RunContext:
    """The run with its directory to itself, and with a job where a service is to list it. Raises UserError."""
    if outside.shown_by_ray(os.environ):
        say(f"d2ft: Ray shows {outside.KEY} on its dashboard: keep it out of the runtime environment")
    return outside.begun_anew(outside.listed(context, os.environ.get(outside.URL), key, say, os.environ), say)


def _run(context: RunContext) -> tuple[D2ftError | None, str | None]:
    """Join the cluster and run the attempt; what ended it, and why it is paused if it is."""
    try:
        join()
        if context.use_gpu is None:
            context = context.model_copy(update={"use_gpu": has_gpus()})
        emit(context, "phase", name="starting")
        return attempt(context), paused(context)
    except _SwitchedOffError:
        return None, control.DRAIN
    except D2ftError as error:
        return error, None


class _SwitchedOffError(BaseException):
    """The driver is to end, and no step has been made that would be lost."""


def _switched_off(run_dir: Path, trackers: Trackers, last_word: Callable[[], None] | None = None) -> None:
    """SIGTERM: the end at once for a job that is cancelled, else a checkpoint, which is asked for like a pause.

    `last_word` is what is to be said of a cancel, where no service sees it by itself.
    """
    if (want := control.asked(run_dir)) in (control.CANCEL, control.END):
        if want == control.CANCEL and last_word is not None:
            last_word()
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
        return outside.plain_context(job_spec(args), run_dir_of(args))
    except (ValidationError, ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
