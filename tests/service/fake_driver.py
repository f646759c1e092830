"""A driver that behaves like `workers.loop --context FILE`, without a model: it writes a run's events and its result.

What it does is in the spec's metadata: "outcome" succeeded (default), failed, crash (dies without a last word) or hang;
"deaths", how many attempts end halfway without a last word; "saves", with which it writes a checkpoint halfway, and
goes on from it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from workers.contract import RunContext
from workers.events import EventLog
from workers.manifest import Manifest, describe, names, write_manifest

TRACED = 3  # the step that is told as it was measured


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--context", type=Path, required=True)
    context = RunContext.model_validate_json(parser.parse_args().context.read_text())
    print(f"fake driver of {context.job_id}", flush=True)
    with EventLog(context.run_dir) as events:
        run(context, events)


def run(context: RunContext, events: EventLog, stopped: Callable[[], bool] = lambda: False) -> None:
    metadata = context.spec.metadata
    outcome, pause_s = metadata.get("outcome", "succeeded"), float(metadata.get("pause_s", "0"))
    events.emit("phase", name="starting")
    events.emit("phase", name="planning")
    events.emit("plan.created", **plan())
    events.emit("phase", name="running")
    events.emit("evaluation", when="before", accuracy=0.11, loss=2.3, num_images=100)
    steps = context.spec.steps or 10
    begin = newest(context, events) if "saves" in metadata else 0
    for step in range(begin + 1, steps + 1):
        events.emit("metrics", **metrics(step, steps))
        if step == TRACED:
            events.emit("timeline", f"step {step}, as measured", **chart(), step=step, window=1)
        time.sleep(pause_s)
        if stopped():
            return
        if outcome == "crash" and step == steps // 2:
            print("about to crash", flush=True)
            os._exit(13)
        if "saves" in metadata and step == steps // 2:
            save(context, events, step)
        if step >= steps // 2 and context.attempt <= int(metadata.get("deaths", "0")):
            return
    events.emit("window", "window 1: +4% of the forecast", window=1, steps=steps, error=0.04)
    change = {"migrated": True, "moved_heads": 3, "reason": "worker 1 is slower", "before": {}, "after": {}}
    events.emit("plan.changed", **{**plan(), "version": 2, "window": 2}, change=change)
    while outcome == "hang" and not stopped():
        time.sleep(0.05)
    events.emit("phase", name="finalizing")
    if outcome == "failed":
        error = {"code": "bad_image", "fault": "user", "message": "train/cat/3.jpg cannot be read", "param": "dataset"}
        events.emit("outcome", status="failed", error=error)
        return
    finish(context, events, steps)


def finish(context: RunContext, events: EventLog, steps: int) -> None:
    result = Path(context.run_dir) / "result"
    result.mkdir(exist_ok=True)
    for name, content in (("model.safetensors", b"weights" * 100), ("ledger.json", b"{}")):
        (result / name).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        events.emit("artifact.ready", name=name, path=str(result / name), bytes=len(content), sha256=digest)
    events.emit("evaluation", when="after", accuracy=0.87, loss=0.4, num_images=100)
    events.emit("ledger", **ledger(steps, str(result)))
    events.emit("outcome", status="succeeded", error=None)


def save(context: RunContext, events: EventLog, step: int) -> None:
    """A checkpoint without tensors, whole by its manifest."""
    manifest = Manifest(
        job_id=context.job_id, fingerprint="", step=step, total_steps=step * 2, adam_step=step, workers=1, seed=0,
        num_train=1, window={}, owners=[], held=None, ledger={},
    )  # fmt: skip
    directory = Path(context.storage_path) / "checkpoints" / context.job_id
    draft = directory / f"{manifest.name}.tmp-a{context.attempt}"
    draft.mkdir(parents=True, exist_ok=True)
    (draft / "group.safetensors").write_bytes(b"state" * step)
    told = write_manifest(draft, replace(manifest, files=(describe(draft / "group.safetensors"),)))
    target = directory / manifest.name
    shutil.rmtree(target, ignore_errors=True)
    draft.rename(target)
    facts = {"step": step, "path": str(target), "bytes": told.bytes, "sha256": told.sha256, "files": 1}
    events.emit("checkpoint.saved", name=manifest.name, **facts)


def newest(context: RunContext, events: EventLog) -> int:
    """The step from which a run goes on."""
    found = names(Path(context.resume_from)) if context.resume_from else []
    step = int(found[0].removeprefix("step-")) if found else 0
    events.emit("checkpoint.resumed", name=found[0] if found else None, step=step)
    return step


def metrics(step: int, steps: int) -> dict[str, float | int]:
    return {
        "step": step,
        "total_steps": steps,
        "epoch": 0,
        "loss": 2.0 / step,
        "learning_rate": 5e-4,
        "grad_norm": 1.0,
        "step_seconds": 0.05,
        "idle_share": 0.1,
        "compute_fraction": 0.6,
        "bytes_fraction": 0.5,
    }


def plan() -> dict[str, object]:
    return {
        "version": 1,
        "window": 0,
        "placement": {"owners": [[0, 0, 1], [0, 1, 1]], "num_workers": 2, "classifier": 1},
        "cycle": [[["FFS", "FOS", "FFF"], ["FFS", "FOS", "FFF"]]],
        "forecast": forecast(52_000),
        "all_full": forecast(80_000),
        "placement_report": report("local search"),
        "selection_report": report("hull"),
        "memory_bytes": [200_000_000, 150_000_000],
        "compute_fraction": 0.6,
        "bytes_fraction": 0.48,
        "heads": [[{"owner": 0, "ops": "FFS", "worth": 1.0, "time_us": 9, "reason": "It is fast; FULL."}] * 3] * 2,
        "devices": [{"rank": rank, "name": f"box-{rank}", "binding": "time"} for rank in range(2)],
        "gantt": chart(),
    }


def forecast(step_us: int) -> dict[str, object]:
    busy_us, link_bytes = [step_us - 2000, step_us - 9000], [[0, 20_000_000], [15_000_000, 0]]
    return {"step_us": step_us, "busy_us": busy_us, "idle_share": 0.08, "link_bytes": link_bytes}


def report(method: str) -> dict[str, object]:
    figures = {"objective": 1.0, "bound": 1.01, "gap": 0.01, "rounding_loss": 0.0, "seconds": 0.05}
    return {"method": method, "status": "FEASIBLE", **figures, "note": ""}


def chart() -> dict[str, object]:
    """A step of two workers, as `scheduler.gantt` has it."""
    rows = [
        [0, 40_000, "fwd", 0, "attn", 0],
        [40_000, 50_000, "wait", 1, "attn", 0],
        [50_000, 52_000, "update", -1, "", -1],
    ]
    fields = ["begin_us", "end_us", "what", "block", "part", "mb"]
    return {"fields": fields, "step_us": 52_000, "workers": [rows, rows[:2]]}


def ledger(steps: int, checkpoint: str) -> dict[str, object]:
    return {
        "rows": [
            {"name": "compute fraction", "unit": "fraction", "predicted": 0.6, "measured": 0.61, "all_full": 1.0},
            {"name": "bytes per step", "unit": "MB", "predicted": 35.25, "measured": 35.25, "all_full": 72.3},
            {"name": "traffic per step", "unit": "MB", "predicted": 35.0, "measured": 35.0, "all_full": 72.0},
            {"name": "compute per step", "unit": "GFLOP", "predicted": 1.2, "measured": 1.25, "all_full": 2.0},
            {"name": "step seconds", "unit": "s", "predicted": 0.052, "measured": 0.05, "all_full": None},
        ],
        "accuracy": {"before": 0.11, "after": 0.87},
        "phases": {"starting": 1.0, "running": 2.0, "train": 1.5},
        "steps": steps,
        "checkpoint": checkpoint,
    }


if __name__ == "__main__":
    main()
