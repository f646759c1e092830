"""Watching a job: a live bar on a terminal, a line every few seconds elsewhere, the ledger at the end."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from service.cli import talk
from service.cli.exits import Exit
from service.client import ApiNotFoundError, Client
from service.schemas import Event, Job

LINE_EVERY_S = 5.0


class JobView:
    """What is known of a job from its events, drawn as they come; nothing where the user wants quiet."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._figures: dict[str, Any] = dict(job.metrics)
        self._accuracy: float | None = None
        self._status = job.status
        self._next_line = 0.0
        self._bar = _bar() if talk.err.is_terminal and not talk.is_quiet() else None
        self._row = self._bar.add_task("", total=None, status=job.status, figures="") if self._bar else None

    @property
    def drawn(self) -> AbstractContextManager[Any]:
        return self._bar or nullcontext()

    def show(self, event: Event) -> None:
        """Take in one event."""
        if event.type == "metrics":
            self._figures = event.data
            self._draw()
        elif event.type == "evaluation":
            self._accuracy = event.data.get("accuracy", self._accuracy)
            self._say(f"accuracy {event.data.get('when', '')} {talk.percent(self._accuracy)}")
        elif event.type == "job.status":
            self._status = str(event.data.get("to", self._status))
            self._say(event.message)
        elif event.type in ("plan.created", "plan.changed"):
            self._say(_plan_words(event.data))
        elif event.type == "window":
            self._say(event.message)
        elif event.level in ("warning", "error"):
            self._say(f"{event.level}: {event.message}")

    def _draw(self) -> None:
        step, total = self._figures.get("step", 0), self._figures.get("total_steps")
        if self._bar is not None and self._row is not None:
            self._bar.update(self._row, completed=step, total=total, status=self._status, figures=self._words())
        elif time.monotonic() >= self._next_line or step == total:
            self._next_line = time.monotonic() + LINE_EVERY_S
            talk.say(f"step {step}/{total}  {self._words()}")

    def _words(self) -> str:
        figures = self._figures
        parts = [
            _part("loss", figures.get("loss"), "{:.3f}"),
            _part("accuracy", self._accuracy, "{:.1%}"),
            _part("step", figures.get("step_seconds"), "{:.3f} s"),
            _part("compute", figures.get("compute_fraction"), "{:.0%}"),
            _part("bytes", figures.get("bytes_fraction"), "{:.0%}"),
        ]
        return "  ".join(part for part in parts if part)

    def _say(self, text: str) -> None:
        text = talk.line(f"{self._status:10} {text}")
        if self._bar is not None and self._row is not None:
            self._bar.update(self._row, status=self._status)
            self._bar.console.print(text)
        else:
            talk.say(text)


def watch_job(client: Client, job_id: str, *, as_json: bool, timeout_s: float | None = None) -> Exit:
    """Follow a job to its end and show how it ended. Ctrl-C lets go of it and leaves it running."""
    try:
        job = client.get(job_id)
        _follow(client, job, as_json=as_json, timeout_s=timeout_s)
    except KeyboardInterrupt:
        talk.say(f"Let go of {job_id}; it goes on. Watch it again with: d2ft watch {job_id}")
        return Exit.INTERRUPTED
    job = client.get(job_id)
    if as_json:
        talk.put_json(job)
    else:
        _show_end(client, job)
    return Exit.OK if job.status == "succeeded" else Exit.FAILED


def _follow(client: Client, job: Job, *, as_json: bool, timeout_s: float | None) -> None:
    if as_json:
        for event in client.events(job.id, follow=True, timeout_s=timeout_s):
            talk.put_json(event)
        return
    view = JobView(job)
    with view.drawn:
        for event in client.events(job.id, follow=True, timeout_s=timeout_s):
            view.show(event)


def _show_end(client: Client, job: Job) -> None:
    talk.put(f"{job.id}  {job.status}")
    if job.error:
        field = f" [{job.error.param}]" if job.error.param else ""
        talk.complain(f"{job.error.code}{field} ({job.error.fault}): {job.error.message}")
    try:
        talk.put_ledger(client.ledger(job.id))
    except ApiNotFoundError:
        return
    artifacts = client.artifacts(job.id).data
    if artifacts:
        talk.put("artifacts " + ", ".join(artifact.name for artifact in artifacts))
        talk.say(f"Fetch them with: d2ft artifacts {job.id} -o DIR")


def _bar() -> Progress:
    columns: tuple[ProgressColumn, ...] = (
        TextColumn("{task.fields[status]:10}"),
        BarColumn(bar_width=30),
        TextColumn("{task.completed:.0f}/{task.total}"),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=talk.err, transient=False)


def _plan_words(data: dict[str, Any]) -> str:
    share = f"compute {talk.percent(data.get('compute_fraction'))}, bytes {talk.percent(data.get('bytes_fraction'))}"
    text = f"plan {data.get('plan_version')}: {share}, {_part('step', data.get('step_seconds'), '{:.3f} s')} forecast"
    change = data.get("change") or {}
    if not change.get("migrated"):
        return text
    return f"{text}; {change.get('moved_heads')} heads move: {change.get('reason')}"


def _part(name: str, value: Any, form: str) -> str:
    return f"{name} {form.format(value)}" if isinstance(value, int | float) else ""
