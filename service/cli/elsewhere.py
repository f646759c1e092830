"""`submit` and `sweep` with `--ray-address`: plain `ray job submit` on any cluster, in one word.

    flags ─► spec ─► a directory with this package and the spec ─► ray job submit ─► workers.loop on the cluster
              └─► POST /v1/runs, where a service is named ─► the run's own token, in that directory

Ray's own command does it, as a child: nothing here loads Ray, and its token is looked for where Ray looks. What is
uploaded is made anew each time, so nothing of the user's directory can be in it, nor the user's key.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer
from ulid import ULID

from scheduler.errors import SystemFault, UserError
from service.cli import talk
from service.cli.exits import Exit
from service.cli.frame import connected
from service.home import write_private
from service.schemas import RunBegun
from service.settings import LOOPBACK, ClientSettings
from workers import outside
from workers.contract import JobSpec, RunContext
from workers.sweeps.contract import SweepSpec

RayAddress = Annotated[
    str | None,
    typer.Option(
        help="Run on this cluster of Ray, http://HEAD:8265, instead of by a service; --dataset and --weights are paths "
        "of its machines. With --url or D2FT_URL that service lists the run."
    ),
]
Out = Annotated[str | None, typer.Option(help="With --ray-address: directory of the run, one that all machines see.")]

PACKAGES = ("workers", "scheduler")
DATA = (".py", ".safetensors", ".json")  # of a package what its code needs
LOOP, SWEEP = "workers.loop", "workers.sweep"
SPEC, CONTEXT = "spec.json", "context.json"
NO_SENSE = {
    "priority": "there is no queue of ours there",
    "queue_timeout": "there is no queue of ours there",
    "idempotency_key": "no service is asked for a job",
}
# How Ray ends a run that is stopped: as the service has it done, a run has the time to write a checkpoint.
ENVIRONMENT = {"env_vars": {"RAY_JOB_STOP_SIGNAL": "SIGTERM", "RAY_JOB_STOP_WAIT_TIME_S": "15"}}
_SUBMITTED, _TAILING = "submitted successfully", "Tailing logs until the job exits"
_REFUSED = re.compile(r"authentication (required|failed)|authentication token", re.IGNORECASE)
_AWAY = re.compile(
    r"failed to connect to ray|connection(error| refused)|max retries exceeded|timed? ?out", re.IGNORECASE
)


@dataclass(frozen=True)
class Order:
    """What is to run where: the module, its spec as JSON, the cluster's address, and where the run goes there."""

    module: str
    body: Mapping[str, Any]
    address: str
    out: str | None
    id: str = field(default_factory=lambda: f"d2ft-{ULID()}".lower())

    def hints(self) -> str:
        logs, stop = (
            shlex.join(["ray", "job", *words, "--address", self.address, self.id])
            for words in (("logs", "--follow"), ("stop",))
        )
        return f"Follow it with: {logs}\nEnd it with: {stop}"


def refuse_out(flags: Mapping[str, Any]) -> None:
    """Where a service runs the job, it says where that goes."""
    if flags.get("out") is not None:
        raise typer.BadParameter(
            "goes with --ray-address only: a service has a directory for each job", param_hint="--out"
        )


def submit_job(body: dict[str, Any], flags: Mapping[str, Any]) -> Exit:
    """Have a job run on a cluster; the exit code of that, or with `watch_` of the run."""
    order = _order(LOOP, body, body, flags)
    spec = JobSpec.model_validate_json(json.dumps(body))
    begun = None
    if target := flags.get("url") or ClientSettings().url:
        begun = _listed(order, spec, target)
    return _carry_out(order, flags, begun, target)


def submit_sweep(body: dict[str, Any], flags: Mapping[str, Any]) -> Exit:
    """The same for a sweep, which no service lists."""
    order = _order(SWEEP, body, body.get("job") or {}, flags)
    SweepSpec.model_validate_json(json.dumps(body))
    if flags.get("url") or ClientSettings().url:
        talk.say("A sweep on another cluster is not listed by a service.")
    return _carry_out(order, flags, None, None)


def _order(module: str, body: Mapping[str, Any], job: Mapping[str, Any], flags: Mapping[str, Any]) -> Order:
    """Raises BadParameter for what makes no sense on a cluster of one's own, by its flag."""
    for flag, why in NO_SENSE.items():
        if flags.get(flag) is not None:
            raise typer.BadParameter(f"makes no sense with --ray-address: {why}", param_hint=_name(flag))
    for key, flag in (("priority", "priority"), ("queue_timeout_s", "queue_timeout")):
        if job.get(key):
            raise typer.BadParameter(f"the spec's {key} makes no sense with --ray-address", param_hint=_name(flag))
    if str(job.get("dataset", "")).startswith("dataset:"):
        message = "names of datasets are a service's; give a path that the cluster's machines see, or an address"
        raise typer.BadParameter(message, param_hint="--dataset")
    if str(job.get("weights") or "").startswith("job:"):
        message = "results of jobs are a service's; give a file that the cluster's machines see, or hf-hub:…"
        raise typer.BadParameter(message, param_hint="--weights")
    for flag in ("dataset", "weights", "out"):
        _check_path(flag, flags.get(flag))
    ray_command()  # before anything is asked of anybody
    return Order(module, body, _address(flags["ray_address"]), flags.get("out"))


def _check_path(flag: str, given: str | None) -> None:
    """A path is one of the cluster's machines, which know nothing of this directory."""
    if given is None or given.startswith("/") or (flag != "out" and (given == "digits" or ":" in given)):
        return
    raise typer.BadParameter(f"'{given}' is not a whole path, as the cluster's machines see it", param_hint=_name(flag))


def _address(text: str) -> str:
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port and parts.path in ("", "/")
    except ValueError:
        good = False
    if not good or parts.query or parts.username is not None:
        message = f"'{text}' is not the address of Ray's dashboard, like http://HEAD:8265"
        raise typer.BadParameter(message, param_hint="--ray-address")
    return text.rstrip("/")


def _listed(order: Order, spec: JobSpec, target: str) -> RunBegun:
    """The run's job at the service, before there is a run. The user's key goes there, and nowhere else."""
    if order.out is None:
        raise typer.BadParameter("is needed where a service lists the run: it says where that lies", param_hint="--out")
    where = {"submission_id": order.id, "run_dir": order.out, "ray_address": order.address}
    with connected(target) as client:
        begun = client.begin_run(spec, where)
    if urlsplit(begun.url).hostname in LOOPBACK and urlsplit(target).hostname not in LOOPBACK:
        begun = begun.model_copy(update={"url": f"{target.rstrip('/')}{outside.RUNS}/events"})
    talk.say(f"{target} lists it as {begun.job_id}")
    return begun


def _carry_out(order: Order, flags: Mapping[str, Any], begun: RunBegun | None, target: str | None) -> Exit:
    as_json, watch = bool(flags.get("json_")), bool(flags.get("watch_"))
    job_id = None if begun is None else begun.job_id
    told = {"object": "ray_job", "submission_id": order.id, "job_id": job_id, "ray_address": order.address}
    told["out"] = order.out
    show: Callable[[str], None] = talk.put_text if not as_json else lambda text: talk.complain(text.rstrip("\n"))
    child = _Child(order, show)
    try:
        with staged(order, begun) as directory:
            code = child.run(directory, watch=watch)
    except KeyboardInterrupt:
        goes_on = "it goes on" if child.submitted else "whether the cluster has taken it is not known"
        talk.say(f"Let go of {order.id}; {goes_on}.\n{order.hints()}")
        return Exit.INTERRUPTED
    except Exception as error:
        _give_up(begun, target, f"It could not be submitted: {error}")
        raise
    if not child.submitted:
        exit_, why = _refusal(order, child.text)
        _give_up(begun, target, why)
        talk.complain(f"error: {why}")
        return exit_
    if as_json:
        talk.put_json(told)
    elif not watch:
        talk.put(order.id)
    if not watch or code is Exit.UNREACHABLE:
        talk.say(order.hints())
    return code


def _give_up(begun: RunBegun | None, target: str | None, why: str) -> None:
    """The job that stands for a run which never will be has failed. Else the service would wait for it in vain."""
    if begun is None or target is None:
        return
    error = SystemFault(why, code="not_submitted")
    with suppress(OSError, http.client.HTTPException, ValueError):
        outside.give_up(f"{target.rstrip('/')}{outside.RUNS}/events", begun.token, begun.attempt, error)


def _refusal(order: Order, text: str) -> tuple[Exit, str]:
    """The exit code for what Ray's command has said, and what that means."""
    if _REFUSED.search(text):
        return Exit.AUTH, (
            f"The cluster at {order.address} wants its token. Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a "
            "file with it, or RAY_AUTH_TOKEN to the token itself."
        )
    if _AWAY.search(text):
        return Exit.UNREACHABLE, f"No cluster of Ray answers at {order.address}: is it the dashboard's address?"
    last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")
    return Exit.FAILED, f"Ray has not taken the job: {last[:500]}"


class _Child:
    """`ray job submit`, and what it says."""

    def __init__(self, order: Order, show: Callable[[str], None]) -> None:
        self._order, self._show = order, show
        self.text = ""
        self.submitted = False

    def run(self, directory: Path, *, watch: bool) -> Exit:
        """Submit what lies in the directory and, with `watch`, follow its log to its end."""
        env = {name: value for name, value in os.environ.items() if name not in (outside.KEY, outside.RAY)}
        child = subprocess.Popen(
            self._command(directory, watch=watch), env={**env, "PYTHONUNBUFFERED": "1"}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        assert child.stdout is not None
        try:
            with child.stdout:
                self._read(child.stdout)
            ended = child.wait()
        except BaseException:
            child.kill()
            child.wait()
            raise
        if ended == 0:
            return Exit.OK
        decided = re.search(rf"Job '{self._order.id}' (failed|was stopped)", self.text)
        return Exit.FAILED if decided or not watch else Exit.UNREACHABLE

    def _read(self, lines: Iterator[str]) -> None:
        tailing = False
        for line in lines:
            if tailing:
                self._show(line)
            self.text = f"{self.text}{line}"[-50_000:]
            self.submitted = self.submitted or (_SUBMITTED in line and self._order.id in line)
            tailing = tailing or (self.submitted and _TAILING in line)

    def _command(self, directory: Path, *, watch: bool) -> list[str]:
        order = self._order
        given = ["--context", CONTEXT] if (directory / CONTEXT).exists() else ["--spec", SPEC]
        if order.out is not None and given[0] == "--spec":
            given += ["--out", order.out]
        return [
            ray_command(), "job", "submit", "--address", order.address, "--submission-id", order.id,
            "--working-dir", str(directory), "--runtime-env-json", json.dumps(ENVIRONMENT),
            *([] if watch else ["--no-wait"]),
            "--", "python", "-m", order.module, *given,
        ]  # fmt: skip


def ray_command() -> str:
    """Ray's own command: that of this Python, or the one on the path. Raises UserError."""
    beside = Path(sys.executable).with_name("ray")
    found = str(beside) if beside.exists() else shutil.which("ray")
    if found is None:
        message = "The command `ray` is not installed here, which submits the job."
        raise UserError(message, code="no_ray", remedy="Install it: pip install 'ray[default]'.")
    return found


@contextmanager
def staged(order: Order, begun: RunBegun | None = None) -> Iterator[Path]:
    """A directory with all that the run needs: this package's code and data, its spec, and its token if it has one."""
    with tempfile.TemporaryDirectory(prefix="d2ft-") as made:
        directory = Path(made)
        for name in PACKAGES:
            found = find_spec(name)
            assert found is not None and found.submodule_search_locations
            shutil.copytree(found.submodule_search_locations[0], directory / name, ignore=_left_out)
        (directory / SPEC).write_text(json.dumps(order.body))
        if begun is not None:
            write_private(directory / CONTEXT, _context(order, begun).model_dump_json())
        yield directory


def _left_out(directory: str, names: list[str]) -> list[str]:
    return [
        name
        for name in names
        if name.startswith((".", "__pycache__")) or (Path(directory, name).is_file() and not name.endswith(DATA))
    ]


def _context(order: Order, begun: RunBegun) -> RunContext:
    assert order.out is not None
    plain = outside.plain_context(JobSpec.model_validate_json(json.dumps(order.body)), Path(order.out))
    told = {"job_id": begun.job_id, "attempt": begun.attempt, "post_url": begun.url, "post_token": begun.token}
    return plain.model_copy(update=told)


def _name(flag: str) -> str:
    return f"--{flag.replace('_', '-')}"
