"""Children that a sweep runs itself, where no service does: each in `run_dir/trials/KEY/`, by the attempts of `loop`.

    trial.json     key, setting, baseline, and how many attempts there have been
    events.jsonl   what happened, as of any run; its outcome says that the child is over

Whoever starts a child runs it, in a thread: a trial of Ray Tune in its own process, the driver its baselines. It goes
when that process goes, and the next one to start the same key goes on from the newest checkpoint.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workers.attempt import attempt, emit, has_gpus, tell
from workers.contract import JobSpec, RunContext
from workers.disk import leave
from workers.events import EVENTS_FILE, read_events
from workers.manifest import names
from workers.sweeps.children import CANCELLED, STOPPED, Child
from workers.sweeps.contract import SweepContext
from workers.sweeps.outcome import figures_of

TRIALS_DIR, NOTE_FILE, RESULT_DIR = "trials", "trial.json", "result"
_LOG = logging.getLogger(__name__)


class Direct:
    """The children of one sweep, as one of its processes sees them."""

    def __init__(self, context: SweepContext) -> None:
        self._context = context
        self._dir = Path(context.run_dir) / TRIALS_DIR
        self._threads: dict[str, threading.Thread] = {}
        self._read: dict[str, tuple[int, dict[str, Any]]] = {}  # how far the events of each are read, and what they say

    def start(self, key: str, setting: Mapping[str, Any], spec: JobSpec, baseline: str | None = None) -> Child:
        note = self._note(key) or {"key": key, "setting": dict(setting), "baseline": baseline, "began": time.time()}
        child = self._seen(note)
        if child.is_over or key in self._threads:
            return child
        number = int(note.get("attempts", 0)) + 1
        (self._dir / key).mkdir(parents=True, exist_ok=True)
        leave(self._dir / key / NOTE_FILE, json.dumps({**note, "attempts": number}))
        context = self._run_context(key, spec, number)
        thread = threading.Thread(target=self._run, args=(context,), name=f"child {key}", daemon=True)
        self._threads[key] = thread
        thread.start()
        return child

    def look(self, key: str) -> Child:
        note = self._note(key)
        assert note is not None, f"{key} has not been started"
        return self._seen(note)

    def cancel(self, key: str) -> None:
        """The process that trains it is gone or goes: what it leaves is that it was stopped."""
        note = self._note(key)
        if note is None:
            return
        child = self._seen(note)
        if not child.is_over:
            context = self._run_context(key, JobSpec(), 1)
            emit(context, "outcome", "stopped early", status=STOPPED, error=None)
        elif child.status not in (STOPPED, CANCELLED):
            return
        self.clear(key)

    def clear(self, key: str) -> None:
        """Remove what a stopped child has half made."""
        shutil.rmtree(self._run_context(key, JobSpec(), 1).vault_dir, ignore_errors=True)
        shutil.rmtree(self._dir / key / RESULT_DIR, ignore_errors=True)

    def all(self) -> Sequence[Child]:
        notes = [note for path in self._dir.glob(f"*/{NOTE_FILE}") if (note := self._note(path.parent.name))]
        return [self._seen(note) for note in sorted(notes, key=lambda note: float(note["began"]))]

    def _run(self, context: RunContext) -> None:
        try:
            if context.use_gpu is None:
                context = context.model_copy(update={"use_gpu": has_gpus()})
            tell(context, attempt(context), None)
        except BaseException:
            _LOG.exception("the run of a trial ends with an error")
            raise

    def _run_context(self, key: str, spec: JobSpec, number: int) -> RunContext:
        ours = self._context
        job_id = f"{ours.sweep_id}-{key}"
        context = RunContext(
            job_id=job_id,
            attempt=number,
            spec=spec,
            run_dir=str(self._dir / key),
            storage_path=ours.storage_path,
            resources_per_worker=ours.resources_per_worker,
            use_gpu=ours.use_gpu,
            start_timeout_s=ours.start_timeout_s,
        )
        return context.model_copy(update={"resume_from": context.vault_dir} if names(Path(context.vault_dir)) else {})

    def _note(self, key: str) -> dict[str, Any] | None:
        try:
            return dict(json.loads((self._dir / key / NOTE_FILE).read_text()))
        except FileNotFoundError:
            return None

    def _seen(self, note: Mapping[str, Any]) -> Child:
        """What the events of a child say of it."""
        key = str(note["key"])
        offset, seen = self._read.get(key, (0, {"status": "running"}))
        for behind, event in read_events(self._dir / key / EVENTS_FILE, offset):
            offset, seen = behind, seen | _told(event["type"], event["data"])
        self._read[key] = offset, seen
        own = {name: note[name] for name in ("key", "setting", "baseline")}
        return Child(**own, job_id=f"{self._context.sweep_id}-{key}", **seen)


def _told(type: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """What an event changes of a child."""
    if type == "metrics":
        return {"step": data["step"], "total_steps": data["total_steps"], "loss": data["loss"]}
    if type == "evaluation" and data["when"] != "before":
        return {"accuracy": data["accuracy"]}
    if type == "ledger":
        return {"figures": figures_of(data)}
    if type == "outcome":
        return {"status": data["status"], "error": data["error"]}
    return {}
