"""Webhooks and messages put straight into a store."""

from __future__ import annotations

import time
from typing import Any

from service.lifecycle import JobState
from service.schemas import UserBody, Webhook, WebhookBody
from service.settings import Settings
from service.store import Store
from service.store.access import FIRST_USER
from service.store.webhooks import Message
from service.tables import WebhookRow
from workers.contract import JobSpec

GOOD = "https://hooks.example.com/in"
LOOPBACK = Settings(webhook_networks="127.0.0.0/8").webhook_networks  # type: ignore[arg-type]


def make(store: Store, owner: str = FIRST_USER, **body: Any) -> Webhook:
    """A webhook whose URL ends in its id, for `Wire`."""
    made = store.webhooks.make(WebhookBody(url=GOOD, **body), owner=owner)
    with store._database.write() as session:
        session.get_one(WebhookRow, made.id).url = f"{GOOD}/{made.id}"
    return store.webhooks.get(made.id, owner=None)


def run_job(store: Store, *, owner: str = FIRST_USER, state: JobState = JobState.FAILED) -> str:
    """A job from its making to its end."""
    job, _ = store.jobs.create(JobSpec(steps=4), owner=owner)
    attempt = store.queue.claim(100)
    assert attempt is not None and attempt.job_id == job.id
    store.attempts.finish(attempt, state, error={"code": "x", "fault": "user", "message": "no", "param": None})
    return job.id


def user(store: Store, name: str) -> str:
    return store.access.make_user(UserBody(name=name)).id


def due(store: Store, later_s: float = 0.0, **but: Any) -> list[Message]:
    return list(store.webhooks.due(time.time() + later_s, **but))


def states(store: Store, webhook: Webhook) -> list[str]:
    return [one.state for one in store.webhooks.deliveries(webhook.id, owner=None, after=None, limit=100).data]
