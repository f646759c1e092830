"""Drives a sweep on a Ray cluster: `python -m workers.sweep --context FILE`, or `--spec sweep.json [--out DIR]`.

It runs full fine-tuning first, then what Ray Tune tries, then full fine-tuning again for as much compute as the knee
has taken. Of the service its trials are jobs of their own; under plain `ray job submit` it runs them itself. Started
again after it was killed, it goes on: what has come to its end is not run again.

The result is in `run_dir/result`: `sweep.json`, and the fronts as `front.svg` and `front.png`. The exit status is that
of `workers.loop`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from scheduler.errors import D2ftError, SystemFault, UserError
from workers import control, logs, outside
from workers.attempt import join, leave, outcome
from workers.command import add_places, run_dir_of
from workers.contract import JobSpec
from workers.disk import leave as leave_file
from workers.disk import sha256_of
from workers.events import EventLog
from workers.poster import posting
from workers.sweeps.alike import placed, placement_of, told
from workers.sweeps.children import FULL, SHORT, STOPPED, SUCCEEDED, Child, Children, follow
from workers.sweeps.contract import SweepContext, SweepSpec
from workers.sweeps.drawing import draw
from workers.sweeps.points import Points, points_of, settled, share_of_knee
from workers.sweeps.trial import children_of, poll_of
from workers.sweeps.tuning import run_tuner

RESULT_DIR, RESULT_FILE, CONTEXT_FILE = "result", "sweep.json", "sweep-context.json"
_LOG = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    os.environ.pop(outside.KEY, None)  # no service lists a sweep, and nothing that is started here is to inherit a key
    context, path = read_context(argv)
    with logs.kept(logs.log_path(context.run_dir, "driver")) as say, ExitStack() as held:
        if context.post_url is None:
            try:
                held.enter_context(outside.alone(Path(context.run_dir)))
            except UserError as refused:
                say(f"d2ft: {refused.message} {refused.remedy}")
                return 2
        driver = Driver(context, path, say)
        error, why = None, None
        posted = context.model_copy(update={"post_url": context.post_url and f"{context.post_url}/events"})
        with posting(posted):
            before = signal.signal(signal.SIGTERM, lambda *_: _switched_off(Path(context.run_dir)))
            try:
                join()
                driver.run()
            except _SwitchedOffError:
                why = control.DRAIN
            except D2ftError as caught:
                error = caught
            except Exception as caught:
                _LOG.exception("the sweep ends with an error")
                error = SystemFault(f"The sweep ended with {type(caught).__name__}: {caught}", code="driver_failed")
            finally:
                signal.signal(signal.SIGTERM, before)
            message = outcome(context, error, why)
        leave()
        if error is not None:
            say(f"d2ft: sweep {context.sweep_id} failed: {message}")
    return 0 if error is None else 1


class Driver:
    """One attempt of a sweep."""

    def __init__(self, context: SweepContext, path: Path, say: Callable[[str], None]) -> None:
        self.context, self.path, self.say = context, path, say
        self.children: Children = children_of(context)
        self.full: Child | None = None

    def run(self) -> None:
        """The search between its two baselines. Raises SystemFault if no trial has succeeded."""
        spec = self.context.spec
        self.emit("phase", name="running")
        if spec.baselines:
            self.full = self._baseline(FULL, spec.full())
        heard = run_tuner(self.context, self.path, self.ended)
        for child in heard:
            if not child.is_over:
                self.children.cancel(child.key)  # once more: a driver may have died before it could
        trials = settled(heard, self.children.all())
        if not any(child.status == SUCCEEDED for child in trials):
            raise _nothing(trials)
        points = self._points(trials)
        if spec.baselines:
            steps = ((self.full and self.full.figures) or {}).get("steps")
            short = self._baseline(SHORT, spec.full(share_of_knee(points), steps))
            points = self._points([*trials, short])
        self.emit("phase", name="finalizing")
        self._keep(points)

    def ended(self, child: Child) -> None:
        """A trial is over, or Tune has stopped it: its job is ended then, and what it has half made goes with it."""
        if not child.is_over or (child.error or {}).get("code") == "trial_lost":
            self.children.cancel(child.key)
        if not child.is_over:
            child = Child(**{**asdict(child), "status": STOPPED, "figures": None})
        self._tell(child)

    def emit(self, type: str, message: str = "", *, level: str = "info", **data: Any) -> None:
        with EventLog(self.context.run_dir) as log:
            log.emit(type, message, level=level, **data)

    def _baseline(self, key: str, spec: JobSpec) -> Child:
        placement = placement_of(self.context.spec, self.children.all())
        started = self.children.start(key, {}, placed(spec, placement), baseline=key)
        child = told(follow(self.children, started, poll_of(self.context)), placement)
        self._tell(child)
        return child

    def _points(self, children: Sequence[Child]) -> Points:
        return points_of([*([self.full] if self.full else []), *children])

    def _tell(self, child: Child) -> None:
        point = self._points([child]).points[-1]
        costs = "  ".join(
            f"{name} {value:.3f}"
            for name in ("accuracy", "compute", "bytes", "seconds")
            if (value := getattr(point, name)) is not None
        )
        said = (child.error or {}).get("message")
        line = f"{child.key}  {point.label}  {costs or child.status}{f': {said}' if said else ''}"
        self.say(line)
        told = {name: getattr(child, name) for name in ("key", "job_id", "status", "figures", "error")}
        level = "info" if child.status in (SUCCEEDED, STOPPED) else "warning"
        self.emit("sweep.trial", line, level=level, setting=dict(child.setting), baseline=child.baseline, **told)

    def _keep(self, points: Points) -> None:
        """Say and write what has come out."""
        for line in points.table():
            self.say(line)
        self.emit("sweep.result", **points.to_dict())
        directory = Path(self.context.run_dir) / RESULT_DIR
        directory.mkdir(parents=True, exist_ok=True)
        result = {"sweep": self.context.sweep_id, "spec": self.context.spec.model_dump(mode="json"), **points.to_dict()}
        leave_file(directory / RESULT_FILE, json.dumps(result, indent=2) + "\n")
        paths = [directory / RESULT_FILE]
        try:
            paths += draw(points, directory)
        except Exception as error:  # the figures are there, and a picture of them can be made later
            why = f"The front is not drawn: {error}. Install d2ft[sweeps] where jobs run."
            self.emit("sweep.undrawn", why, level="warning")
        for path in paths:
            size, digest = path.stat().st_size, sha256_of(path)
            self.emit("artifact.ready", path.name, name=path.name, path=str(path), bytes=size, sha256=digest)


class _SwitchedOffError(BaseException):
    """The driver is to end, and another goes on."""


def _switched_off(run_dir: Path) -> None:
    """SIGTERM: the end at once for a sweep that is cancelled, else one that another attempt goes on from."""
    if control.asked(run_dir) in (control.CANCEL, control.END):
        os._exit(128 + signal.SIGTERM)  # what Ray runs for this driver ends with it
    raise _SwitchedOffError


def _nothing(trials: Sequence[Child]) -> SystemFault:
    said = next((str(child.error["message"]) for child in trials if child.error), "")
    return SystemFault(
        f"None of {len(trials)} trials has succeeded{f'; the first says: {said}' if said else '.'}",
        code="no_trial_succeeded",
        remedy="Try the same job by itself, then widen the space from there.",
    )


def read_context(argv: Sequence[str] | None) -> tuple[SweepContext, Path]:
    """Parse the command line: the context, and where it lies. A bad one ends the process with status 2."""
    parser = argparse.ArgumentParser(prog="python -m workers.sweep", description="Run a sweep of jobs on Ray.")
    add_places(parser, spec="a sweep's spec, the body of POST /v1/sweeps")
    args = parser.parse_args(argv)
    if (args.context is None) == (args.spec is None):
        parser.error("give one of --context and --spec")
    try:
        if args.context is not None:
            return SweepContext.model_validate_json(args.context.read_bytes()), args.context.absolute()
        return _plain(SweepSpec.model_validate_json(args.spec.read_bytes()), run_dir_of(args))
    except (ValidationError, ValueError, OSError) as error:
        parser.error(str(error))


def _plain(spec: SweepSpec, run_dir: Path) -> tuple[SweepContext, Path]:
    """A sweep that no service has ordered. Raises ValueError where another lies, with which it would go on."""
    path = run_dir / CONTEXT_FILE
    context = SweepContext(sweep_id=run_dir.name, spec=spec, run_dir=str(run_dir), storage_path=str(run_dir / "ray"))
    if path.exists() and SweepContext.model_validate_json(path.read_bytes()) != context:
        raise ValueError(f"--out {run_dir}: another sweep lies there; give another directory, or the spec that it had")
    run_dir.mkdir(parents=True, exist_ok=True)
    leave_file(path, context.model_dump_json())
    return context, path


if __name__ == "__main__":
    sys.exit(main())
