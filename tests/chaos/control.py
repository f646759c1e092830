"""The planner's actor and the API killed while a real run trains, and runs cancelled in every state.

    python -m tests.chaos.control [--kills 20]

None of the first two may touch the training: the same processes make every step once. A cancelled run has to have given
back everything within seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from scheduler import actor
from service.client import Client
from service.home import read_secret, read_server
from tests.bench.report import publish, target
from tests.chaos.runs import Run, ray_here
from tests.service.conftest import free_port
from workers.pulse import accounts

CANCEL_S = 10.0
API_KILLS = 5
LONG = {"steps": 3000, "window": 50, "method": {"budgets": {"compute": 0.6}}, "checkpoint": {"every_steps": 20}}
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    given = parser.parse_args()
    rows, targets = rows_and_targets(given.kills)
    publish("chaos_control", rows, targets, f"{given.kills} kills of the planner's actor")


def rows_and_targets(kills: int) -> tuple[list[Row], list[Row]]:
    """All rows; what is asked of them."""
    planner = planner_killed(kills)
    with served() as (home, client, env):
        api = api_killed(home, client, env)
        cancels = [
            cancelled(home, client, state) for state in ("queued", "starting", "running", "recovering", "pausing")
        ]
    return [planner, api, *cancels], [
        target("planner's actor: kills", planner["kills"], ">=", kills),
        target("planner's actor: steps lost or doubled, or groups lost", planner["wrong"], "==", 0),
        target("API: kills", api["kills"], "==", API_KILLS),
        target("API: steps lost or doubled, or processes replaced", api["wrong"], "==", 0),
        target("cancel: all given back, slowest s", max(row["free s"] for row in cancels), "<=", CANCEL_S),
        target("cancel: not cancelled at the end", sum(row["status"] != "cancelled" for row in cancels), "==", 0),
    ]


def planner_killed(kills: int) -> Row:
    """A run that asks for a plan every few steps, while the one it asks is killed over and over."""
    code = (
        "import ray, sys, time\n"
        "from scheduler import actor\n"
        "ray.init(namespace=actor.NAMESPACE, logging_level='ERROR')\n"
        "for _ in range(int(sys.argv[1])):\n"
        "    try: ray.kill(ray.get_actor(actor.NAME), no_restart=False); print('killed', flush=True)\n"
        "    except ValueError: pass\n"
        "    time.sleep(2)\n"
    )
    with ray_here() as ray:
        run = Run(ray, "planned", steps=20_000, window=5, checkpoint={"every_s": None})
        run.until_step(5)
        done = subprocess.run(
            [sys.executable, "-c", code, str(kills)], env={**os.environ, **ray.env}, capture_output=True, text=True,
            timeout=kills * 20 + 60, check=False,
        )  # fmt: skip
        step = run.steps()[-1]
        run.until_step(step + 10)
        wrong = _wrong(run.steps()) + len([e for e in run.events("phase") if e["data"]["name"] == "recovering"])
        alive = run.driver.poll() is None
        run.driver.kill()
        run.driver.wait()
    return {"fault": actor.NAME, "kills": done.stdout.count("killed"), "steps": step, "wrong": wrong + (not alive)}


def api_killed(home: Path, client: Client, env: dict[str, str]) -> Row:
    """The API goes and comes back while a run trains."""
    job = client.submit(LONG).id
    run_dir = home / "runs" / job / "a1"
    until(lambda: client.get(job).progress.step >= 3)
    pids = {account.rank: account.pid for account in accounts(run_dir)}
    kills = 0
    for _ in range(API_KILLS):
        os.kill(read_server(home)["api"]["pid"], signal.SIGKILL)
        kills += 1
        time.sleep(3)
        subprocess.run([*D2FT, "up"], env=env, check=True, capture_output=True)
        before = client.get(job).progress.step
        until(lambda before=before: client.get(job).progress.step > before)  # type: ignore[misc]
    replaced = {account.rank: account.pid for account in accounts(run_dir)} != pids
    steps = [event.data["step"] for event in client.events(job) if event.type == "metrics"]
    client.cancel(job)
    until(lambda: client.get(job).status == "cancelled")
    return {"fault": "API", "kills": kills, "steps": len(steps), "wrong": _wrong(steps) + replaced}


def cancelled(home: Path, client: Client, state: str) -> Row:
    """Seconds from the cancel until the job says so, and until nothing of it is left."""
    first = client.submit(LONG).id if state == "queued" else None
    job = client.submit(LONG).id
    if state in ("recovering", "pausing"):
        until(lambda: client.get(job).progress.step >= 25)
    if state == "recovering":
        os.kill(next(each.pid for each in accounts(home / "runs" / job / "a1") if each.rank == 1), signal.SIGKILL)
    if state == "pausing":
        client.pause(job)
    until(lambda: client.get(job).status == state)
    began = time.monotonic()
    client.cancel(job)
    until(lambda: client.get(job).status == "cancelled", 60)
    said_s = time.monotonic() - began
    until(lambda: not _processes(job), 60)
    free_s = time.monotonic() - began
    status = client.get(job).status
    if first is not None:
        client.cancel(first)
        until(lambda: client.get(first).status == "cancelled" and not _processes(first))
    return {"cancelled while": state, "status": status, "said s": said_s, "free s": free_s}


D2FT = (sys.executable, "-c", "from service.cli import main; main()")


@contextlib.contextmanager
def served() -> Iterator[tuple[Path, Client, dict[str, str]]]:
    """A service with a real Ray; its home, a client, the environment of its commands."""
    home = Path(tempfile.mkdtemp(prefix="d2k", dir="/tmp"))
    env = {**os.environ, "D2FT_HOME": str(home), "D2FT_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    try:
        subprocess.run([*D2FT, "up", "--num-cpus", "2"], env=env, check=True, capture_output=True)
        with Client(f"http://127.0.0.1:{env['D2FT_PORT']}", read_secret(home / "key") or "") as client:
            yield home, client, env
    finally:
        subprocess.run([*D2FT, "down"], env=env, check=False, capture_output=True)
        shutil.rmtree(home, ignore_errors=True)


def until(done: Callable[[], bool], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout_s:g} s")
        time.sleep(0.1)


def _wrong(steps: list[int]) -> int:
    """How many steps are missing or there twice."""
    return len(steps) - len(set(steps)) + len(set(range(1, max(steps, default=0) + 1)) - set(steps))


def _processes(job: str) -> list[int]:
    """Drivers of a job, and workers of whatever job: there is one at a time."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if job in line or "RayTrainWorker" in line or "TrainController" in line:
            found.append(process.info["pid"])
    return found


if __name__ == "__main__":
    main()
