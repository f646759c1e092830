"""A sweep's driver that behaves like `workers.sweep --context FILE`, without Tune: it asks the service for its trials.

One after the other, full fine-tuning first and last. Of its metadata, "dies" has its first attempt end without a word
after so many trials.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2

from workers.contract import JobSpec
from workers.events import EventLog
from workers.sweeps.contract import SweepContext

OVER = ("succeeded", "failed", "cancelled")


def run(context: SweepContext, events: EventLog, stopped: Callable[[], bool] = lambda: False) -> None:
    dies = int(context.spec.metadata.get("dies", "0")) if context.attempt == 1 else 0
    headers = {"Authorization": f"Bearer {context.post_token}"}
    events.emit("phase", name="running")
    found = []
    with httpx2.Client(headers=headers, timeout=30, trust_env=False) as http:
        for number, (key, setting, spec, baseline) in enumerate(wanted(context), 1):
            body = {"key": key, "setting": setting, "spec": spec.model_dump(mode="json"), "baseline": baseline}
            trial = _asked(http, context, body, stopped)
            if trial is None or number == dies:
                return
            level = "info" if trial["status"] == "succeeded" else "warning"
            events.emit("sweep.trial", f"{key} {trial['status']}", level=level, **trial)
            found.append(trial)
    _finish(context, events, [trial for trial in found if trial["figures"]])


def wanted(context: SweepContext) -> Iterator[tuple[str, dict[str, Any], JobSpec, str | None]]:
    spec = context.spec
    if spec.baselines:
        yield "full", {}, spec.full(), "full"
    for number, setting in enumerate(spec.grid() if spec.search.type == "grid" else ()):
        yield f"t-{number}", setting, spec.trial(setting), None
    if spec.baselines:
        yield "stopped", {}, spec.full(share=0.5), "stopped"


def _asked(
    http: httpx2.Client, context: SweepContext, body: dict[str, Any], stopped: Callable[[], bool]
) -> dict[str, Any] | None:
    """The trial once it is over; None where the sweep is stopped before."""
    while not stopped():
        try:
            answer = http.post(f"{context.post_url}/trials", json=body)
        except httpx2.TransportError:  # the service is restarted
            time.sleep(0.05)
            continue
        if answer.status_code in (401, 409):
            return None
        if answer.status_code == 200 and answer.json()["status"] in OVER:
            found: dict[str, Any] = answer.json()
            return found
        assert answer.status_code in (200, 429, 503), answer.text
        time.sleep(0.05)
    return None


def _finish(context: SweepContext, events: EventLog, found: list[dict[str, Any]]) -> None:
    if not found:
        error = {"code": "no_trial_succeeded", "fault": "user", "message": "no trial succeeded", "param": None}
        events.emit("outcome", status="failed", error=error)
        return
    points = [{"key": trial["key"], **trial["figures"]} for trial in found]
    events.emit("sweep.result", points=points, fronts={"compute": [points[0]["key"]]}, knee=points[0]["key"])
    path = Path(context.run_dir) / "sweep.json"
    path.write_text(json.dumps(points))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    events.emit("artifact.ready", name=path.name, path=str(path), bytes=path.stat().st_size, sha256=digest)
    events.emit("outcome", status="succeeded", error=None)
