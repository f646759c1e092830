"""Webhooks and their outbox: who is told, which message is due, and what became of it.

A message is put into the outbox in the transaction that makes it true (`journal`), so there is none for what was rolled
back and none is lost. Which message is sent next is asked owner by owner: a user whose receivers are slow, or whose
outbox is long, keeps no other user waiting.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session
from ulid import ULID

from service.errors import ConflictError, NotFoundError, TooManyError
from service.schemas import Delivery, Page, Webhook, WebhookBody
from service.store.database import Database
from service.store.jobs import owner_name, page
from service.store.views import seconds
from service.tables import DeliveryRow, UserRow, WebhookRow

PENDING, SENT, FAILED = "pending", "sent", "failed"
MAX_EACH = 20
MAX_TESTS_WAITING = 20
FAILED_IN_A_ROW = 12  # messages given up one after another, by which a webhook is disabled
_DISABLED = "the webhook was disabled before this was sent"


@dataclass(frozen=True)
class Message:
    """One message that is due. `tries` were in vain."""

    id: str
    webhook_id: str
    owner: str
    url: str
    body: dict[str, Any]
    tries: int


@dataclass(frozen=True)
class Outcome:
    """What became of a try: the message's state from now on, why, when to try again, whether to stop for good."""

    state: str
    at: float
    error: str | None = None
    next_at: float = 0.0
    gone: bool = False


class Webhooks:
    """The shelf of webhooks and deliveries."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def make(self, body: WebhookBody, *, owner: str) -> Webhook:
        """Raises TooManyError when the user has as many as one may."""
        with self._database.write() as session:
            user = session.get_one(UserRow, owner, with_for_update=True)
            have = session.scalar(select(func.count()).select_from(WebhookRow).where(WebhookRow.owner == owner)) or 0
            if have >= MAX_EACH:
                message = f"You have {have} webhooks, as many as one user may have."
                raise TooManyError(message, code="too_many_webhooks", remedy="Delete one first.")
            types = list(dict.fromkeys(body.types))
            row = WebhookRow(id=f"wh_{ULID()}", owner=owner, url=body.url, types=types, created_at=time.time())
            session.add(row)
            return _webhook_view(row, user.name)

    def list(self, *, owner: str | None) -> Sequence[Webhook]:
        """All webhooks, newest first, disabled ones included."""
        with self._database.read() as session:
            wanted = select(WebhookRow, UserRow.name).outerjoin(UserRow, UserRow.id == WebhookRow.owner)
            if owner is not None:
                wanted = wanted.where(WebhookRow.owner == owner)
            return [_webhook_view(row, name) for row, name in session.execute(wanted.order_by(WebhookRow.id.desc()))]

    def get(self, webhook_id: str, *, owner: str | None) -> Webhook:
        with self._database.read() as session:
            return _view(session, _own(session, webhook_id, owner))

    def delete(self, webhook_id: str, *, owner: str | None) -> Webhook:
        """Take a webhook away with all its messages; returns it as it was."""
        with self._database.write() as session:
            row = _own(session, webhook_id, owner, lock=True)
            session.execute(delete(DeliveryRow).where(DeliveryRow.webhook_id == webhook_id))
            session.delete(row)
            return _view(session, row)

    def deliveries(self, webhook_id: str, *, owner: str | None, after: str | None, limit: int) -> Page[Delivery]:
        """Its messages, newest first; from the one after `after` on."""
        with self._database.read() as session:
            _own(session, webhook_id, owner)
            wanted = select(DeliveryRow).where(DeliveryRow.webhook_id == webhook_id)
            if after is not None:
                wanted = wanted.where(DeliveryRow.id < after)
            rows = session.scalars(wanted.order_by(DeliveryRow.id.desc()).limit(limit + 1)).all()
            shown = rows[:limit]
            return page([_delivery_view(row) for row in shown], [row.id for row in shown], more=len(rows) > limit)

    def test(self, webhook_id: str, *, owner: str | None) -> Delivery:
        """Put a message of the type `webhook.test` into the outbox.

        Raises ConflictError when the webhook is disabled, TooManyError when many messages wait already.
        """
        with self._database.write() as session:
            row = _own(session, webhook_id, owner, lock=True)
            if row.disabled_at is not None:
                message = "This webhook is disabled: its receiver said that it is gone, or took no message for long."
                raise ConflictError(message, code="webhook_disabled", remedy="Delete it and make a new one.")
            waiting = select(func.count()).select_from(DeliveryRow).where(_waits_at(webhook_id))
            if (session.scalar(waiting) or 0) >= MAX_TESTS_WAITING:
                message = "Many messages to this webhook wait to be sent already."
                raise TooManyError(message, code="webhook_busy", remedy="Wait until they are; see its deliveries.")
            made = _test_message(webhook_id)
            session.add(made)
            return _delivery_view(made)

    def due(self, now: float, *, busy: Collection[str] = (), full: Collection[str] = ()) -> Sequence[Message]:
        """Of each owner the oldest message that is due, oldest first; passes over `busy` webhooks, `full` owners."""
        enabled = (DeliveryRow.state == PENDING, DeliveryRow.next_at <= now, WebhookRow.disabled_at.is_(None))
        first = (
            select(func.min(DeliveryRow.id))
            .join(WebhookRow, WebhookRow.id == DeliveryRow.webhook_id)
            .where(*enabled, WebhookRow.id.not_in(busy), WebhookRow.owner.not_in(full))
            .group_by(WebhookRow.owner)
        )
        wanted = (
            select(DeliveryRow, WebhookRow)
            .join(WebhookRow, WebhookRow.id == DeliveryRow.webhook_id)
            .where(DeliveryRow.id.in_(first))
            .order_by(DeliveryRow.id)
        )
        with self._database.read() as session:
            return [
                Message(row.id, to.id, to.owner, to.url, row.body, row.tries) for row, to in session.execute(wanted)
            ]

    def settle(self, message: Message, outcome: Outcome) -> None:
        """Note what became of a try. One that another process has noted meanwhile stands, unless this one arrived."""
        with self._database.write() as session:
            webhook = session.get(WebhookRow, message.webhook_id, with_for_update=True)
            row = session.get(DeliveryRow, message.id, with_for_update=True)
            if webhook is None or row is None or row.state != PENDING:
                return
            if outcome.state != SENT and row.tries != message.tries:
                return
            row.state, row.tries, row.last_error = outcome.state, message.tries + 1, outcome.error
            row.next_at = outcome.next_at
            row.sent_at = outcome.at if outcome.state == SENT else None
            if outcome.gone or (outcome.state == FAILED and _fails_always(session, webhook.id)):
                webhook.disabled_at = outcome.at
                over = update(DeliveryRow).where(_waits_at(webhook.id))
                session.execute(over.values(state=FAILED, last_error=_DISABLED))

    def prune(self, before: float) -> int:
        """Forget messages made before then. One that still waits is stale as well: nobody sent any for that long."""
        with self._database.write() as session:
            old = session.scalars(select(DeliveryRow.id).where(DeliveryRow.created_at < before)).all()
            session.execute(delete(DeliveryRow).where(DeliveryRow.created_at < before))
            return len(old)


def _own(session: Session, webhook_id: str, owner: str | None, *, lock: bool = False) -> WebhookRow:
    """The row of a webhook. Raises NotFoundError for another user's, too."""
    row = session.get(WebhookRow, webhook_id, with_for_update=lock or None)
    if row is None or owner not in (None, row.owner):
        raise NotFoundError(f"There is no webhook {webhook_id[:60]}.", code="webhook_not_found", param="id")
    return row


def _waits_at(webhook_id: str) -> Any:
    return (DeliveryRow.webhook_id == webhook_id) & (DeliveryRow.state == PENDING)


def _fails_always(session: Session, webhook_id: str) -> bool:
    decided = select(DeliveryRow.state).where(DeliveryRow.webhook_id == webhook_id, DeliveryRow.state != PENDING)
    last = session.scalars(decided.order_by(DeliveryRow.id.desc()).limit(FAILED_IN_A_ROW)).all()
    return len(last) == FAILED_IN_A_ROW and set(last) == {FAILED}


def _test_message(webhook_id: str) -> DeliveryRow:
    id, now = f"evt_{ULID()}", time.time()
    body = {"id": id, "object": "event", "created_at": int(now), "type": "webhook.test", "data": {"id": webhook_id}}
    return DeliveryRow(id=id, webhook_id=webhook_id, body=body, state=PENDING, tries=0, next_at=now, created_at=now)


def _view(session: Session, row: WebhookRow) -> Webhook:
    return _webhook_view(row, owner_name(session, row.owner))


def _webhook_view(row: WebhookRow, user: str | None) -> Webhook:
    return Webhook(
        id=row.id,
        url=row.url,
        types=row.types,
        user=user,
        created_at=int(row.created_at),
        disabled_at=seconds(row.disabled_at),
    )


def _delivery_view(row: DeliveryRow) -> Delivery:
    return Delivery(
        id=row.id,
        state=row.state,
        type=row.body["type"],
        data=row.body["data"],
        tries=row.tries,
        last_error=row.last_error,
        created_at=int(row.created_at),
        next_at=int(row.next_at) if row.state == PENDING else None,
        sent_at=seconds(row.sent_at),
    )
