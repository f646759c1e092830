"""The page that makes a job: its form, and beside it the plan that such a job would get. What is typed stays in it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from pydantic import ValidationError

from scheduler.book import read_book
from scheduler.fleets import KINDS
from service.routes.world import ByCaller, InWorld
from service.web.errors import PageRoute
from service.web.render import page
from workers.contract import ADDED_RATE, DIGITS_RATE, RATE, JobSpec
from workers.digits import split_digits

# What people choose among; the words are the contract's.
STRATEGIES = {
    "hardest": "whole micro-batches: the hardest images train",
    "hull": "heads: the most worthy within each worker's time",
    "cpsat": "heads: the same, proved",
    "two_stage": "heads: FULL first, then FORWARD, device by device",
    "random": "heads: at random",
    "uniform": "heads: evenly",
    "full": "everything: all-FULL",
}
SCORES = {
    "fisher": "empirical Fisher of a gate",
    "gradient": "size of its gradient",
    "taylor": "first-order Taylor",
    "weight": "size of its weights",
    "activation": "size of its output",
    "random": "at random",
}
NUM_DIGITS = 1797
SPOKEN_KINDS = [kind for kind in KINDS if not kind.endswith("-fp32")]

router = APIRouter(route_class=PageRoute)


@router.get("/ui/new")
def new_job(
    request: Request,
    world: InWorld,
    caller: ByCaller,
    source: Annotated[str | None, Query(alias="from", max_length=80)] = None,
) -> Response:
    """An empty form, or one that holds the spec of a job of the caller's."""
    copied = world.store.jobs.get(source, owner=caller.reach) if source else None
    measured = read_book(world.settings.devices_file)
    train, test = split_digits(NUM_DIGITS)
    return page(
        request,
        "new.html",
        copied=copied,
        known={
            "spec": given(copied.spec) if copied else {},
            "usual": usual(),
            "digits": {"train": len(train), "test": len(test)},
            "measured": len(measured),
        },
        usual=usual(),
        strategies=STRATEGIES,
        scores=SCORES,
        num_measured=len(measured),
    )


def given(spec: dict[str, Any]) -> dict[str, Any]:
    """What a spec says beyond the defaults; one that this version does not know stays as it is."""
    try:
        return JobSpec.model_validate(spec).model_dump(mode="json", exclude_defaults=True)
    except ValidationError:
        return spec


def usual() -> dict[str, Any]:
    """A job as it is where nothing is said, and the learning rates that follow from the rest."""
    rates = {"added": ADDED_RATE, "digits": DIGITS_RATE, "other": RATE}
    return {**JobSpec().model_dump(mode="json"), "learning_rates": rates}
