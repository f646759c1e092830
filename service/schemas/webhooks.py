"""Webhooks: addresses that are told when a job or a sweep moves."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from service.schemas.base import Wire
from workers.method import Frozen

WebhookType = Literal[
    "job.running",
    "job.paused",
    "job.succeeded",
    "job.failed",
    "job.cancelled",
    "sweep.running",
    "sweep.succeeded",
    "sweep.failed",
    "sweep.cancelled",
]


class WebhookBody(Frozen):
    """A new webhook: an https address and what it is told; by default the ends of jobs."""

    url: Annotated[str, Field(min_length=1, max_length=2048)]
    types: Annotated[list[WebhookType], Field(min_length=1, max_length=9)] = Field(
        default=["job.succeeded", "job.failed", "job.cancelled"]
    )


class Webhook(Wire):
    """A webhook; `secret`, by which its messages are signed, is there once, in the answer that made it."""

    id: str
    object: Literal["webhook"] = "webhook"
    url: str
    types: list[str]
    user: str | None = None
    created_at: int
    disabled_at: int | None = None
    secret: str | None = Field(default=None, repr=False)


class Delivery(Wire):
    """One message to a webhook. `state`: pending (tried again at `next_at`), sent, or failed (given up)."""

    id: str
    object: Literal["webhook.delivery"] = "webhook.delivery"
    state: str
    type: str
    data: dict[str, Any]
    tries: int
    last_error: str | None = None
    created_at: int
    next_at: int | None = None
    sent_at: int | None = None
