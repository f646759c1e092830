"""What runs tell: lines of their own event file, with the token of their attempt.

A run writes its file first and posts afterwards, so an outage of this service costs nothing: the answer says how far
the store has the file, and the run sends the rest. Where the service sees the file it reads it by itself, too; each
line is taken once, whoever brings it.
"""

from __future__ import annotations

from fastapi import APIRouter

from service.errors import ConflictError, InvalidRequestError, Issue
from service.lifecycle import JobState
from service.routes.world import PROBLEM, ByRun, InWorld
from service.schemas import RunAnswer, RunEvents
from service.tail import readable

_WANTS = {JobState.PAUSING: "pause", JobState.CANCELLING: "cancel"}

router = APIRouter(tags=["runs"], responses=PROBLEM)


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
    return RunAnswer(offset=attempt.events_offset, want=_WANTS.get(attempt.job_state))
