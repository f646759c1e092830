"""The planner's actor and the API killed while a real run trains, and runs cancelled in every state.

    python -m tests.chaos.control [--kills 20]

None of the first two may touch the training: the same processes make every step once. A cancelled run has to have given
back everything within seconds.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from typing import Any

import psutil

from scheduler import actor
from service.home import read_server
from tests.bench.report import publish, target
from tests.chaos.runs import Run, ray_here
from tests.served import Served, served
from tests.waiting import until
from workers.pulse import accounts

CANCEL_S = 10.0  # asked
START_S, END_S = 120.0, 60.0  # waited for
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
    with served() as service:
        api = api_killed(service)
        cancels = [cancelled(service, state) for state in ("queued", "starting", "running", "recovering", "pausing")]
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


def api_killed(service: Served) -> Row:
    """The API goes and comes back while a run trains."""
    client, job = service.client, service.client.submit(LONG).id
    until(lambda: client.get(job).progress.step >= 3, START_S)
    pids = pids_of(service, job)
    assert len(pids) == 2, pids
    for _ in range(API_KILLS):
        os.kill(read_server(service.home)["api"]["pid"], signal.SIGKILL)
        time.sleep(3)
        service.up()
        further = client.get(job).progress.step + 1
        until(lambda further=further: client.get(job).progress.step >= further)
    replaced = pids_of(service, job) != pids
    end(service, job)
    steps = [event.data["step"] for event in client.events(job) if event.type == "metrics"]
    return {"fault": "API", "kills": API_KILLS, "steps": len(steps), "wrong": _wrong(steps) + replaced}


def cancelled(service: Served, state: str) -> Row:
    """Seconds from the cancel until the job says so, and until nothing of it is left."""
    client = service.client
    first = client.submit(LONG).id if state == "queued" else None
    job = client.submit(LONG).id
    if state in ("recovering", "pausing"):
        until(lambda: client.get(job).progress.step >= 25, START_S)
    if state == "recovering":
        os.kill(pids_of(service, job)[1], signal.SIGKILL)
    if state == "pausing":
        client.pause(job)
    until(lambda: client.get(job).status == state, START_S)
    said_s, free_s = end(service, job, alone=first is None)
    if first is not None:
        end(service, first)
    return {"cancelled while": state, "status": client.get(job).status, "said s": said_s, "free s": free_s}


def end(service: Served, job: str, *, alone: bool = True) -> tuple[float, float]:
    """Cancel a job; seconds until it says so, and until no process is left of it, nor, if it ran alone, any worker."""
    began = time.monotonic()
    service.client.cancel(job)
    until(lambda: service.client.get(job).status == "cancelled", END_S)
    said_s = time.monotonic() - began
    until(lambda: not _processes(job, alone=alone), END_S)
    return said_s, time.monotonic() - began


def pids_of(service: Served, job: str) -> dict[int, int]:
    """The processes of a job's workers, by rank."""
    return {account.rank: account.pid for account in accounts(service.run_dir(job))}


def _wrong(steps: list[int]) -> int:
    """How many steps are missing or there twice."""
    return len(steps) - len(set(steps)) + len(set(range(1, max(steps, default=0) + 1)) - set(steps))


def _processes(job: str, *, alone: bool) -> list[int]:
    """What still runs of a job: its driver, and where it is alone all workers and controllers."""
    wanted = (job, "RayTrainWorker", "TrainController") if alone else (job,)
    found = ((each.pid, " ".join(each.info["cmdline"] or [])) for each in psutil.process_iter(["cmdline"]))
    return [pid for pid, line in found if any(word in line for word in wanted)]


if __name__ == "__main__":
    main()
