"""A sweep of 8 ratios on the bundled model, through the service: how long, and what a trial costs beyond its job.

    python -m tests.bench.sweep [--steps N]

`d2ft up` starts Ray and the API on this machine with two cores. A trial's time runs from the end of the one before it
to its own end. Beyond "training" are queue, start of the group, profile, plan, evaluations and rehearsal; beyond
"phases" is what no phase of the run's own ledger accounts for: the sweep, the queue, and the start of the group;
"between" is the sweep's own part of that, until the trial is a job.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from service.client import Client
from tests.bench.first_step import ask
from tests.bench.report import publish, target
from tests.served import served

RATIOS = ([1, 0, 4], [2, 0, 3], [3, 0, 2], [4, 0, 1], [1, 4, 0], [2, 3, 0], [3, 2, 0], [2, 1, 2])
OVER = ("succeeded", "failed", "cancelled")
MOST_S, MOST_BEYOND_S = 600.0, 15.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, help="of each job, instead of its three epochs")
    given = parser.parse_args()
    job = {} if given.steps is None else {"steps": given.steps}
    body = {"job": job, "space": {"method.ratios": {"values": list(RATIOS)}}}
    with served() as service:
        begin = time.time()
        found = ask(service.url, service.key, "POST", "/v1/sweeps", body)
        while found["status"] not in OVER:
            time.sleep(1.0)
            found = ask(service.url, service.key, "GET", f"/v1/sweeps/{found['id']}")
        whole_s = time.time() - begin
        if found["status"] != "succeeded":
            raise SystemExit(f"the sweep ended otherwise: {found['error']}")
        rows = rows_of(service.client, found, begin)
    beyond = [row["beyond phases s"] for row in rows[1:]]  # the first one waits for the driver, too
    checks = [
        target("the whole sweep s", whole_s, "<=", MOST_S),
        target("a trial beyond its phases, median s", statistics.median(beyond), "<=", MOST_BEYOND_S),
        target("a trial beyond its phases, slowest s", max(beyond), "<=", MOST_BEYOND_S),
    ]
    publish("sweep", rows, checks, f"the knee is {found['knee']}")


def rows_of(client: Client, sweep: dict[str, Any], begin: float) -> list[dict[str, Any]]:
    """A row for each trial, in their order."""
    points = {point["key"]: point for point in sweep["points"]}
    rows, before = [], begin
    for trial in sweep["trials"]:
        events = list(client.events(trial["job_id"]))
        phases = next(event.data["phases"] for event in events if event.type == "ledger")
        end = events[-1].created_at
        point = points[trial["key"]]
        rows.append(
            {
                "trial": trial["key"], "ratios": str(trial["setting"].get("method.ratios", "full")),
                **{name: point[name] for name in ("accuracy", "compute", "bytes", "seconds")}, "wall s": end - before,
                "between s": events[0].created_at - before,
                "training s": phases["train"], "beyond training s": end - before - phases["train"],
                "beyond phases s": end - before - sum(phases.values()),
            }
        )  # fmt: skip
        before = end
    return rows


if __name__ == "__main__":
    main()
