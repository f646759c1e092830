"""Runs that were not ordered here, listed with a key; and what all runs tell and ask, with the token of their attempt.

A run writes its file first and posts afterwards, so an outage of this service costs nothing: the answer says how far
the store has the file, and the run sends the rest. Where the service sees the file it reads it by itself, too; each
line is taken once, whoever brings it.
"""

from __future__ import annotations

from fastapi import APIRouter, Response

from service.errors import ConflictError, ForbiddenError, InvalidRequestError, Issue
from service.lifecycle import SWEEP, JobState
from service.routes.jobs import IdempotencyKey
from service.routes.world import PROBLEM, ByCaller, ByRun, InWorld
from service.schemas import RunAnswer, RunBegun, RunBody, RunEvents, Trial, TrialBody, TrialList
from service.store import Attempt, Place
from service.tail import readable
from service.telemetry import current_trace

_WANTS = {JobState.PAUSING: "pause", JobState.CANCELLING: "cancel"}

router = APIRouter(tags=["runs"], responses=PROBLEM)


@router.post("/runs", status_code=201, response_model=RunBegun)
def begin_run(
    body: RunBody, world: InWorld, caller: ByCaller, response: Response, idempotency_key: IdempotencyKey = None
) -> RunBegun:
    """List a run that was started elsewhere as a job under way; it tells of itself with the token in the answer.

    Its model, data and weights are not looked for here.
    """
    attempt, fresh = world.store.outside.begin(
        body.spec, body.where, owner=caller.user_id, idempotency_key=idempotency_key, trace=current_trace()
    )
    response.headers["Location"] = f"/v1/jobs/{attempt.job_id}"
    if not fresh:
        response.headers["Idempotency-Replayed"] = "true"
    url = f"{world.settings.runs_url}/events"
    return RunBegun(job_id=attempt.job_id, attempt=attempt.n, token=attempt.token, url=url)


@router.post("/runs/events", response_model=RunAnswer)
def post_events(body: RunEvents, world: InWorld, attempt: ByRun) -> RunAnswer:
    """Take over lines of the run's event file."""
    if body.attempt != attempt.n:
        raise ConflictError(f"This token is attempt {attempt.n}'s.", code="wrong_attempt", param="attempt")
    events = readable(body.events)
    if len(events) != len(body.events):
        raise InvalidRequestError([Issue("events", "An event has an integer `seq` above 0 and a text `type`.")])
    fresh = [event for event in events if event["seq"] > attempt.events_offset]
    if fresh:
        attempt = world.store.attempts.absorb(attempt, fresh, max(event["seq"] for event in fresh))
    elif attempt.outside:
        world.store.outside.hear(attempt)
    return RunAnswer(offset=attempt.events_offset, want=_WANTS.get(attempt.job_state))


@router.get("/runs/trials", response_model=TrialList)
def list_trials(world: InWorld, attempt: ByRun) -> TrialList:
    """All trials of the sweep, oldest first."""
    return TrialList(data=list(world.store.sweeps.trials(_sweep(attempt))))


@router.post("/runs/trials", response_model=Trial)
def add_trial(body: TrialBody, world: InWorld, attempt: ByRun) -> Trial:
    """Have a job run as a trial of the sweep; the same key gives the same trial again, whatever has become of it."""
    place = Place(_sweep(attempt), body.key, body.setting, body.baseline)
    found = world.store.sweeps.add_trial(attempt, place, body.spec)
    world.nudge()
    return found


@router.post("/runs/trials/{key}/cancel", response_model=Trial)
def cancel_trial(key: str, world: InWorld, attempt: ByRun) -> Trial:
    """End a trial; harmless when it is over."""
    _sweep(attempt)
    found = world.store.sweeps.cancel_trial(attempt, key)
    world.nudge()
    return found


def _sweep(attempt: Attempt) -> str:
    """The id of the sweep that the run drives."""
    if attempt.kind != SWEEP:
        raise ForbiddenError("Only the run of a sweep has trials.", code="not_a_sweep")
    return attempt.job_id
