"""Webhooks: addresses that are told of the caller's jobs, and what became of each message."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Query

from service.errors import ForbiddenError
from service.routes.world import PROBLEM, ByCaller, InWorld, Limit, World
from service.schemas import Delivery, Page, Webhook, WebhookBody
from service.store.jobs import page

router = APIRouter(prefix="/webhooks", tags=["webhooks"], responses=PROBLEM)


@router.post("", status_code=201, response_model=Webhook)
async def make_webhook(body: WebhookBody, world: InWorld, caller: ByCaller) -> Webhook:
    """A new webhook. The answer shows the secret that signs its messages, and nothing ever will again."""
    _check_on(world)
    await world.outbound.check(body.url)
    made = await asyncio.to_thread(world.store.webhooks.make, body, owner=caller.user_id)
    return made.model_copy(update={"secret": world.signer.secret(made.id)})


@router.get("", response_model=Page[Webhook])
def list_webhooks(world: InWorld, caller: ByCaller) -> Page[Webhook]:
    """The caller's webhooks, an administrator everybody's."""
    found = world.store.webhooks.list(owner=caller.reach)
    return page(list(found), [webhook.id for webhook in found], more=False)


@router.get("/{webhook_id}", response_model=Webhook)
def get_webhook(webhook_id: str, world: InWorld, caller: ByCaller) -> Webhook:
    """One webhook; `disabled_at` says since when it is told nothing more."""
    return world.store.webhooks.get(webhook_id, owner=caller.reach)


@router.delete("/{webhook_id}", response_model=Webhook)
def delete_webhook(webhook_id: str, world: InWorld, caller: ByCaller) -> Webhook:
    """Take it away, with its messages: none is sent any more."""
    return world.store.webhooks.delete(webhook_id, owner=caller.reach)


@router.get("/{webhook_id}/deliveries", response_model=Page[Delivery])
def list_deliveries(
    webhook_id: str, world: InWorld, caller: ByCaller, after: str | None = Query(None, max_length=40), limit: Limit = 20
) -> Page[Delivery]:
    """Its messages of the last seven days, newest first: sent, given up or waiting, and why."""
    return world.store.webhooks.deliveries(webhook_id, owner=caller.reach, after=after, limit=limit)


@router.post("/{webhook_id}/test", status_code=202, response_model=Delivery)
def test_webhook(webhook_id: str, world: InWorld, caller: ByCaller) -> Delivery:
    """Send it a message of the type `webhook.test`; its deliveries say what became of that."""
    _check_on(world)
    return world.store.webhooks.test(webhook_id, owner=caller.reach)


def _check_on(world: World) -> None:
    if not world.settings.webhooks:
        message = "This service sends no messages to webhooks."
        raise ForbiddenError(message, code="webhooks_off", remedy="Start it with D2FT_WEBHOOKS=true.")
