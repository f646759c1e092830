"""Webhooks: how messages are signed, and the loop that sends them.

    job moves ─► outbox (same transaction) ─► Sender ─ signed POST ─► receiver
                      ▲ tries + 1, later            │ no 2xx
                      └─────────────────────────────┘

Every message arrives at least once, in no promised order: one that arrived and could not be noted as sent comes again,
with the same id, by which a receiver knows it. Signatures are those of Standard Webhooks 1.0, so its libraries verify
them; `verify` does in Python. A webhook's secret is not kept anywhere: it follows from the service's own and its id.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import random
import re
import time
from collections import Counter
from collections.abc import Mapping

from service.errors import InvalidRequestError, UnavailableError
from service.lead import Lead
from service.outbound import Outbound
from service.store import Store
from service.store.webhooks import FAILED, PENDING, SENT, Message, Outcome

PREFIX = "whsec_"
MAX_TRIES = 12
FIRST_DELAY_S = 5.0
LONGEST_DELAY_S = 3600.0
JITTER = 0.2
AT_ONCE = 8
AT_ONCE_EACH = 3  # of one user
KEPT_S = 7 * 24 * 3600.0
PRUNE_EVERY_S = 3600.0
LEASE = "webhooks"
LEASE_S = 30.0  # longer than a request may take
GONE = 410
_MAX_ERROR_CHARS = 200
log = logging.getLogger(__name__)


class Signer:
    """Makes the secrets of webhooks out of the service's."""

    def __init__(self, master: str) -> None:
        self._master = master.encode()

    def secret(self, webhook_id: str) -> str:
        made = hmac.digest(self._master, webhook_id.encode(), hashlib.sha256)
        return PREFIX + base64.b64encode(made).decode()


def signed(secret: str, message_id: str, body: bytes, *, now: float) -> dict[str, str]:
    """The three headers that come with a message."""
    stamp = str(int(now))
    signature = _signature(secret, message_id, stamp, body).decode()
    return {"webhook-id": message_id, "webhook-timestamp": stamp, "webhook-signature": f"v1,{signature}"}


def verify(
    secret: str, headers: Mapping[str, str], body: bytes, tolerance_s: float = 300, *, now: float | None = None
) -> bool:
    """Whether a message is from the holder of the secret, and was sent just now. For receivers; body as it came.

    False for whatever a stranger may send. Raises ValueError for a secret that is none.
    """
    given = {name.lower(): value for name, value in headers.items()}
    message_id, stamp = given.get("webhook-id", ""), given.get("webhook-timestamp", "")
    if not re.fullmatch(r"[0-9]{1,12}", stamp) or not re.fullmatch(r"[^.]+", message_id):
        return False  # with a dot in the id, the parts of what is signed could be told apart in two ways
    if abs((time.time() if now is None else now) - int(stamp)) > tolerance_s:
        return False
    expected = b"v1," + _signature(secret, message_id, stamp, body)
    offered = given.get("webhook-signature", "").encode("utf-8", "surrogatepass").split(b" ")
    return any(hmac.compare_digest(one, expected) for one in offered)


def judge(tries: int, answer: int | str, *, now: float, jitter: float) -> Outcome:
    """What becomes of a message after a try: `answer` is the status, or why there is none; `jitter` in -1…1."""
    if isinstance(answer, int) and 200 <= answer < 300:
        return Outcome(SENT, now)
    error = _clean(_words(answer))
    if answer == GONE or tries + 1 >= MAX_TRIES:
        return Outcome(FAILED, now, error, gone=answer == GONE)
    delay = min(FIRST_DELAY_S * 2**tries, LONGEST_DELAY_S) * (1 + JITTER * jitter)
    return Outcome(PENDING, now, error, next_at=now + delay)


class Sender:
    """Sends what is due, several at once but one of a webhook. Of the processes on one store, one does."""

    def __init__(self, store: Store, signer: Signer, outbound: Outbound, *, look_s: float = 1.0) -> None:
        self._store = store
        self._signer = signer
        self._outbound = outbound
        self._look_s = look_s
        self._lead = Lead(store, LEASE, LEASE_S)
        self._flying: dict[asyncio.Task[None], Message] = {}
        self._prune_at = 0.0

    async def run(self) -> None:
        """Look, for ever. Nothing that a look raises ends the loop."""
        try:
            while True:
                try:
                    await self.look()
                except UnavailableError as error:
                    log.warning("webhooks: %s", error)
                except Exception:
                    log.exception("a look at the outbox failed; it is taken again")
                await self._rest()
        finally:
            for task in self._flying:
                task.cancel()
            await asyncio.gather(*self._flying, return_exceptions=True)
            self._lead.give_back()

    async def look(self) -> None:
        """Start whatever is due and has room."""
        if not await self._lead.held():
            return
        await self._prune()
        while len(self._flying) < AT_ONCE:
            each = Counter(message.owner for message in self._flying.values())
            busy = [message.webhook_id for message in self._flying.values()]
            full = [owner for owner, count in each.items() if count >= AT_ONCE_EACH]
            due = await asyncio.to_thread(self._store.webhooks.due, time.time(), busy=busy, full=full)
            for message in due[: AT_ONCE - len(self._flying)]:
                task = asyncio.create_task(self._deliver(message))
                self._flying[task] = message
                task.add_done_callback(self._flying.pop)
            if not due:
                return

    async def _rest(self) -> None:
        """Wait for the next look: until something has landed, since then its webhook is free; or for `look_s`."""
        if self._flying:
            await asyncio.wait(self._flying, timeout=self._look_s, return_when=asyncio.FIRST_COMPLETED)
        else:
            await asyncio.sleep(self._look_s)

    async def _prune(self) -> None:
        if time.monotonic() >= self._prune_at:
            await asyncio.to_thread(self._store.webhooks.prune, time.time() - KEPT_S)
            self._prune_at = time.monotonic() + PRUNE_EVERY_S

    async def _deliver(self, message: Message) -> None:
        """Send one message and note what became of it, however long the store takes: it would be sent again."""
        outcome = judge(message.tries, await self._try(message), now=time.time(), jitter=random.uniform(-1, 1))
        if outcome.error is not None:
            log.info("webhook %s, message %s: %s", message.webhook_id, message.id, outcome.error)
        while True:
            try:
                return await asyncio.to_thread(self._store.webhooks.settle, message, outcome)
            except UnavailableError as error:
                log.warning("message %s was tried, and that cannot be noted yet: %s", message.id, error)
            except Exception:
                log.exception("message %s was tried, and that could not be noted", message.id)
            await asyncio.sleep(FIRST_DELAY_S)

    async def _try(self, message: Message) -> int | str:
        """The status of the answer, or why there is none. Raises nothing: a fault of ours waits its turn, too."""
        body = json.dumps(message.body, separators=(",", ":")).encode()
        secret = self._signer.secret(message.webhook_id)
        headers = {"Content-Type": "application/json", "User-Agent": "d2ft-webhooks/1"}
        try:
            return await self._outbound.post(
                message.url, {**headers, **signed(secret, message.id, body, now=time.time())}, body
            )
        except (InvalidRequestError, UnavailableError) as error:
            return error.message
        except Exception:
            log.exception("message %s could not be sent", message.id)
            return "the service failed on this message; its log says how"


def _signature(secret: str, message_id: str, stamp: str, body: bytes) -> bytes:
    key = base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    text = f"{message_id}.{stamp}.".encode("utf-8", "surrogatepass") + body
    return base64.b64encode(hmac.digest(key, text, hashlib.sha256))


def _words(answer: int | str) -> str:
    if isinstance(answer, str):
        return answer
    if 300 <= answer < 400:
        return f"answered {answer}; redirects are not followed"
    return f"answered {answer}; the webhook is disabled" if answer == GONE else f"answered {answer}"


def _clean(text: str) -> str:
    """One short line that moves no cursor."""
    seen = "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text[:_MAX_ERROR_CHARS])
    return seen[:_MAX_ERROR_CHARS]
