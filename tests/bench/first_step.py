"""From POST to the first training step on a cluster that is up: where the seconds go.

    python -m tests.bench.first_step [--jobs 5]

`d2ft up` starts Ray and the API on this machine; the first job warms the cluster and is not counted. The breakdown is
by the job's own events, in seconds after the POST was sent.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import time
from typing import Any
from urllib.parse import urlsplit

from tests.bench.report import publish, target
from tests.served import served

MARKS = {
    "accepted": lambda event: event["type"] == "job.created",
    "claimed": lambda event: event["data"].get("to") == "planning",
    "taken by Ray": lambda event: event["data"].get("to") == "starting",
    "driver runs": lambda event: event["type"] == "phase" and event["data"].get("name") == "starting",
    "workers measured": lambda event: (event["data"].get("from"), event["data"].get("to")) == ("starting", "planning"),
    "planned": lambda event: event["type"] == "plan.created",
    "evaluated": lambda event: event["type"] == "evaluation",
    "rehearsed": lambda event: event["type"] == "window",
    "first step": lambda event: event["type"] == "metrics",
}
SETTLED_S = 8.0  # until Ray has let go of the last job, and the cluster is idle again
BODY = {"steps": 3, "method": {"budgets": {"compute": 0.6, "bytes": 0.5}}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=5)
    given = parser.parse_args()
    rows = []
    with served() as service:
        for _ in range(given.jobs + 1):
            rows.append(run(service.url, service.key))
            time.sleep(SETTLED_S)
    del rows[0]
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    slowest = max(row["first step"] for row in rows)
    checks = [target("POST to first step, slowest s", slowest, "<=", 20.0)]
    publish("first_step", [*rows, medians], checks, "the last row is the median; seconds after the POST")


def run(url: str, key: str) -> dict[str, float]:
    """Submit a job and follow it to its end; when each mark was reached."""
    begin = time.time()
    job_id = ask(url, key, "POST", "/v1/jobs", BODY)["id"]
    answered = time.time() - begin
    while ask(url, key, "GET", f"/v1/jobs/{job_id}")["status"] not in ("succeeded", "failed", "cancelled"):
        time.sleep(0.2)
    events = ask(url, key, "GET", f"/v1/jobs/{job_id}/events?limit=100")["data"]
    if events[-1]["data"].get("to") != "succeeded":
        raise SystemExit(f"the job ended otherwise: {events[-1]}")
    times = {"answered": answered}
    for name, is_it in MARKS.items():
        found = next((event for event in events if is_it(event)), None)
        if found is not None:
            times[name] = found["created_at"] - begin
    return times


def ask(url: str, key: str, method: str, path: str, body: Any = None) -> Any:
    """One request, answered with success."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    connection.request(method, path, None if body is None else json.dumps(body), headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    if answer.status >= 300:
        raise SystemExit(content.decode())
    return json.loads(content)


if __name__ == "__main__":
    main()
