"""The supervisor: brings what the store wants and what Ray does together, one small look after another.

    queued ──claim──► created ──submit──► submitted ──outcome / Ray says over──► ended ──Ray let go──► settled
      ▲               (attempt)           events.jsonl ─► store                    │
      └────────────────── lost, drained, preempted, resumed, retried ◄─────────────┘

It keeps nothing in memory that a restart would miss: attempts, offsets and tokens are in the store, the driver has its
own file, Ray's ids follow from ours. `decide` says what is to be done as a value; the rest does it. A look that fails
is logged and taken again. Of several processes on one store, the one that holds the lease looks.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from scheduler import failpoints
from service import faults, runfiles
from service.errors import LostAttemptError, UnavailableError
from service.launch import Launch, too_small
from service.lead import Lead
from service.lifecycle import SWEEP, JobState
from service.logs import about
from service.meters import Meters
from service.ray_jobs import RayJob, RayJobs
from service.settings import Settings
from service.silence import Silence
from service.store import Attempt, Store
from service.store.actions import STOP
from service.store.attempts import CREATED, ENDED
from service.tail import read_batch
from service.telemetry import Attributes, Tracing
from workers import control
from workers.contract import RunContext
from workers.events import EVENTS_FILE
from workers.logs import log_path
from workers.sweeps.contract import SweepContext

SOON_S = 0.2
LEASE = "supervisor"
log = logging.getLogger(__name__)


class Step(enum.Enum):
    """What to do about an attempt."""

    SUBMIT = "submit"
    WAIT = "wait"
    STOP = "stop"
    ASK_PAUSE = "ask_pause"
    PAUSED = "paused"
    CANCELLED = "cancelled"
    DIED = "died"
    SETTLE = "settle"


def decide(attempt: Attempt, ray_job: RayJob | None, *, now: float, settle_s: float) -> Step:
    """What to do, given the attempt as stored, all its events read, and Ray's word (None: Ray does not know it)."""
    over = ray_job is None or ray_job.is_over
    if attempt.state == ENDED:
        if over:
            return Step.SETTLE
        return Step.STOP if now - (attempt.ended_at or now) > settle_s else Step.WAIT
    if attempt.job_state is JobState.CANCELLING:
        return Step.CANCELLED if over else Step.STOP
    if attempt.job_state is JobState.PAUSING:
        if over:
            return Step.PAUSED
        return Step.STOP if attempt.want == STOP else Step.ASK_PAUSE
    silent = not attempt.events_offset  # what has said something has been started, by a cluster that is gone now
    if attempt.state == CREATED and (not over or (ray_job is None and silent)):
        return Step.SUBMIT  # again, where a reply was lost: the id makes it harmless
    return Step.DIED if over else Step.WAIT


class Supervisor:
    """Follows every open attempt, and starts the next when there is room."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        ray: RayJobs,
        meters: Meters | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._meters = meters or Meters()
        self._tracing = tracing or Tracing()
        self._settings = settings
        self._store = store
        self._ray = ray
        self._launch = Launch(settings)
        self._resources: dict[str, float] = {}
        self._nudged = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lead = Lead(store, LEASE, settings.lease_s)
        self._silence = Silence(store, settings.outside_silence_s)

    def nudge(self) -> None:
        """Have the next look come soon, since a user has asked for something; from any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._nudged.set)

    async def run(self) -> None:
        """Look, for ever. Nothing that a look raises ends the loop."""
        self._loop = asyncio.get_running_loop()
        compared = -self._settings.reconcile_s
        try:
            while True:
                leads = await self._leads()
                self._meters.leads.set(leads)
                if leads:
                    with self._meters.look():
                        await self._guard(self.look(), "look")
                    if time.monotonic() - compared >= self._settings.reconcile_s:
                        compared = time.monotonic()
                        await self._guard(self.reconcile(), "reconcile")
                await self._pause()
        finally:
            self._lead.give_back()

    async def _pause(self) -> None:
        """Until the next look: `poll_s`, or less after a nudge, but never so little that users drive the loop."""
        await asyncio.sleep(min(SOON_S, self._settings.poll_s))
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, self._settings.poll_s - SOON_S)):
                await self._nudged.wait()
        self._nudged.clear()

    async def _leads(self) -> bool:
        try:
            return await self._lead.held()
        except UnavailableError as error:
            self._meters.failed("lease")
            log.warning("the lease: %s", error)
            return False

    async def look(self) -> None:
        """Follow what is open, then start what waits."""
        for attempt in await asyncio.to_thread(self._store.attempts.open):
            with about(job_id=attempt.job_id, attempt=attempt.n):
                await self._guard(self._follow(attempt), attempt.submission_id)
        await asyncio.to_thread(self._store.queue.expire)
        await asyncio.to_thread(self._silence.look)
        await self._start_next()
        if self._settings.preempt_after_s is not None:
            await asyncio.to_thread(
                self._store.queue.preempt, self._settings.max_running, self._settings.preempt_after_s, self._why_not
            )

    async def reconcile(self) -> None:
        """Stop drivers of ours that Ray runs and the store does not follow."""
        for job in await self._ray.list():
            if job.is_over or job.metadata.get("home") != str(self._settings.home):
                continue
            if not await asyncio.to_thread(self._store.attempts.is_open, job.submission_id):
                log.warning("stopping %s, which no open attempt owns", job.submission_id)
                await self._stop(job.submission_id, job.metadata.get("job_id"), job.metadata.get("attempt"))

    async def _guard(self, work: Any, what: str) -> None:
        try:
            await work
        except UnavailableError as error:
            self._meters.failed(what)
            log.warning("%s: %s", what, error)
        except LostAttemptError as error:
            log.warning("%s: stood down: %s", what, error)
        except Exception:
            self._meters.failed(what)
            log.exception("%s failed; it is taken again", what)

    async def _start_next(self) -> None:
        """Sweeps first: what they ask for comes later, and waits with the other jobs."""
        queue, jobs, sweeps = self._store.queue, self._settings.max_running, self._settings.max_sweeps
        await self._start_all(lambda: queue.may_claim_sweep(sweeps), lambda: queue.claim_sweep(sweeps))
        await self._start_all(lambda: queue.may_claim(jobs), lambda: queue.claim(jobs, self._why_not))

    async def _start_all(self, may_claim: Callable[[], bool], claim: Callable[[], Attempt | None]) -> None:
        queue, had_ray = self._store.queue, self._resources
        while await asyncio.to_thread(may_claim):
            try:
                self._resources = await self._ray.resources()
            except UnavailableError as error:
                self._resources = {}
                await asyncio.to_thread(queue.explain, str(error))
                return
            if not had_ray:
                await asyncio.to_thread(queue.explain, None)
            attempt = await asyncio.to_thread(claim)
            if attempt is None:
                return
            failpoints.hit("supervisor.claimed")
            await self._submit(attempt)

    def _why_not(self, workers: int) -> str | None:
        """Why the cluster, all of it, is too small for so many workers; None where it is not, or does not say."""
        return too_small(self._resources, self._launch.per_worker(self._resources), workers)

    async def _follow(self, attempt: Attempt) -> None:
        """One look at one attempt. What goes wrong is said on the job, since it waits for that."""
        try:
            await self._look_at(attempt)
        except UnavailableError as error:
            await self._explain(attempt, str(error))
            raise
        except LostAttemptError:
            raise
        except Exception as error:
            await self._explain(attempt, f"The supervisor fails on this attempt ({type(error).__name__}); see api.log.")
            raise

    async def _look_at(self, attempt: Attempt) -> None:
        # Ray is asked before the file is read: of a driver that was over then, every line is read now.
        try:
            ray_job = await self._ray.get(attempt.submission_id)
        except UnavailableError:
            await self._read_events(attempt)
            raise
        attempt = await self._read_events(attempt)
        step = decide(attempt, ray_job, now=time.time(), settle_s=self._settings.settle_s)
        await self._take(step, attempt, ray_job)
        if step in (Step.WAIT, Step.STOP, Step.ASK_PAUSE):
            await self._explain(attempt, None)

    async def _take(self, step: Step, attempt: Attempt, ray_job: RayJob | None) -> None:
        if step is Step.SUBMIT:
            await self._submit(attempt)
        elif step is Step.STOP:
            cancelled = attempt.job_state is JobState.CANCELLING
            await self._stop(attempt.submission_id, attempt.job_id, attempt.n, cancelled=cancelled)
        elif step is Step.ASK_PAUSE:
            run_dir = self._settings.attempt_dir(attempt.job_id, attempt.n)
            await asyncio.to_thread(control.ask, run_dir, control.PAUSE)
        elif step is Step.PAUSED:
            await self._finish(attempt, JobState.PAUSED, message=_paused_words(attempt))
        elif step is Step.CANCELLED:
            await self._finish(attempt, JobState.CANCELLED, message="cancelled; its devices are free")
        elif step is Step.DIED:
            error = await self._died(attempt, ray_job)
            await asyncio.to_thread(self._store.attempts.lose, attempt, error)
        elif step is Step.SETTLE:
            await self._keep_log(attempt)
            await asyncio.to_thread(self._store.attempts.settle, attempt)
            self._trace(attempt)

    async def _stop(
        self, submission_id: str, job_id: str | None, n: int | str | None, *, cancelled: bool = False
    ) -> None:
        """End a driver that nobody wants any more; its job is known unless Ray's word is all there is of it."""
        if job_id and n:
            run_dir = self._settings.attempt_dir(job_id, int(n))
            await asyncio.to_thread(lambda: runfiles.ask_end(run_dir, cancelled=cancelled))
        await self._ray.stop(submission_id)

    async def _submit(self, attempt: Attempt) -> None:
        with self._tracing.span("attempt submit", attempt.trace, _facts(attempt)):
            await self._hand_over(attempt)

    async def _hand_over(self, attempt: Attempt) -> None:
        run_dir = self._settings.attempt_dir(attempt.job_id, attempt.n)
        context = await self._context(attempt)
        path = await asyncio.to_thread(runfiles.write_context, run_dir, context)
        entrypoint = self._launch.entrypoint(attempt, path)
        metadata = {"job_id": attempt.job_id, "attempt": str(attempt.n), "home": str(self._settings.home)}
        with failpoints.passing("supervisor.submit"):
            await self._ray.submit(attempt.submission_id, entrypoint, self._launch.environment(), metadata)
        await asyncio.to_thread(self._store.attempts.mark_submitted, attempt)

    async def _context(self, attempt: Attempt) -> RunContext | SweepContext:
        if not self._resources:
            self._resources = await self._ray.resources()
        if attempt.kind == SWEEP:
            return await asyncio.to_thread(self._launch.sweep_context, attempt, self._resources)
        saved = await asyncio.to_thread(self._store.records.checkpoints, attempt.job_id)
        return self._launch.context(attempt, self._resources, resumes=bool(saved))

    async def _read_events(self, attempt: Attempt) -> Attempt:
        """Take over what the driver has written since; returns the attempt as it is then."""
        path = self._settings.attempt_dir(attempt.job_id, attempt.n) / EVENTS_FILE
        while attempt.state != ENDED:
            batch = await asyncio.to_thread(read_batch, path, attempt.events_offset)
            if batch.offset == attempt.events_offset:
                return attempt
            attempt = await asyncio.to_thread(self._store.attempts.absorb, attempt, batch.events, batch.offset)
        return attempt

    async def _explain(self, attempt: Attempt, reason: str | None) -> None:
        if attempt.state != ENDED and attempt.status_reason != reason:
            await asyncio.to_thread(self._store.attempts.explain, attempt, reason)

    async def _finish(self, attempt: Attempt, state: JobState, **why: Any) -> None:
        await asyncio.to_thread(lambda: self._store.attempts.finish(attempt, state, **why))

    async def _died(self, attempt: Attempt, ray_job: RayJob | None) -> dict[str, Any]:
        """The error of a driver that ended without a last word, with the end of what it printed."""
        code = faults.FORGOTTEN if ray_job is None else faults.DIED
        if ray_job is None:
            said = "Ray no longer knows the run; the cluster was restarted."
        else:
            # Ray's own message goes on with the log, which follows below.
            cause = ray_job.message.partition(", last available logs")[0]
            said = f"The run ended ({ray_job.status.lower()}) without saying how. {cause}".strip()
        printed = await self._printed(attempt, known=ray_job is not None)
        tail = f"\nThe end of its log:\n{printed[-runfiles.LOG_TAIL_CHARS :].strip()}" if printed else ""
        return {"code": code, "fault": "system", "message": said + tail, "param": None}

    async def _keep_log(self, attempt: Attempt) -> None:
        """Of a driver that ended before it had a log of its own, keep Ray's: it is forgotten with Ray's restart."""
        path = self._driver_log(attempt)
        if await asyncio.to_thread(path.exists):
            return
        printed = await self._ray.logs(attempt.submission_id)
        if printed is not None:
            await asyncio.to_thread(runfiles.keep_log, path, printed)

    async def _printed(self, attempt: Attempt, *, known: bool) -> str:
        """The end of what the driver printed: in its own log, and to Ray before and after that."""
        own = await asyncio.to_thread(runfiles.read_tail, self._driver_log(attempt))
        of_ray = (await self._ray.logs(attempt.submission_id) or "") if known else ""
        return f"{own}\n{of_ray}".strip()

    def _trace(self, attempt: Attempt) -> None:
        """Add the attempt, from its opening to the job's decision, to the trace of the request that made the job."""
        failed = attempt.job_state is JobState.FAILED
        facts = {**_facts(attempt), "d2ft.job_state": attempt.job_state.value}
        ended = attempt.ended_at or time.time()
        self._tracing.record("attempt", attempt.trace, facts, began=attempt.created_at, ended=ended, failed=failed)

    def _driver_log(self, attempt: Attempt) -> Path:
        return log_path(self._settings.attempt_dir(attempt.job_id, attempt.n), "driver")


def _facts(attempt: Attempt) -> Attributes:
    return {"d2ft.job_id": attempt.job_id, "d2ft.attempt": attempt.n}


def _paused_words(attempt: Attempt) -> str:
    if attempt.want == STOP:
        return "paused while it did not train"
    return "the run ended without a word of its own; it goes on from its newest checkpoint, or else from the beginning"
