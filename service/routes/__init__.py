"""The routes. Thin: read the request, ask a room below, answer.

What comes in has passed the door (`auth`); what goes wrong becomes a problem (`problems`). All of `/v1` is there
without `/v1`, too.
"""

from fastapi import APIRouter

from service.routes import (
    access,
    datasets,
    health,
    jobs,
    logs,
    models,
    plans,
    predictions,
    records,
    runs,
    sweeps,
    webhooks,
)
from service.routes.world import World

__all__ = ["World", "routers"]


def routers() -> list[tuple[APIRouter, str, bool]]:
    """(router, prefix, whether the description of the API names it)."""
    of_jobs = (jobs.router, records.router, logs.router, predictions.router)
    others = (plans.router, access.router, datasets.router, models.router, webhooks.router)
    return [
        *((router, "/v1/jobs", True) for router in of_jobs),
        *((router, "/jobs", False) for router in of_jobs),
        (sweeps.router, "/v1/sweeps", True),
        (sweeps.router, "/sweeps", False),
        *((router, "/v1", True) for router in others),
        *((router, "", False) for router in others),
        (runs.router, "/v1", True),
        (health.router, "", True),
    ]
