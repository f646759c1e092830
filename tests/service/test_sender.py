"""The sender: what a slow, gone or broken receiver, or a crash of ours, does to the messages of others: nothing."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import event

from service import webhooks as room
from service.errors import UnavailableError
from service.outbound import Outbound
from service.schemas import WebhookBody
from service.store import Store
from service.store.access import FIRST_USER
from service.store.webhooks import FAILED, PENDING, SENT, Message, Outcome
from service.webhooks import Sender, Signer, verify
from tests.service.outbox import LOOPBACK, due, make, run_job, states, user
from tests.service.receiver import receiving, silent

SIGNER = Signer("master")


class Wire:
    """Stands in for the way out: notes what is sent, answers as told, or does not until `hold` is set."""

    def __init__(self, answer: int | Exception = 200) -> None:
        self.answer = answer
        self.sent: list[str] = []
        self.hold: asyncio.Event | None = None
        self.now_open: list[str] = []
        self.most_open = 0

    async def post(self, url: str, headers: dict[str, str], body: bytes) -> int:
        self.sent.append(headers["webhook-id"])
        assert verify(SIGNER.secret(url.rpartition("/")[2]), headers, body)
        self.now_open.append(url)
        self.most_open = max(self.most_open, len(self.now_open))
        if self.hold is not None:
            await self.hold.wait()
        self.now_open.remove(url)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_all_that_is_due_is_sent_once(store: Store) -> None:
    webhooks = [make(store), make(store, user(store, "ann"))]
    for webhook in webhooks:
        for _ in range(10):
            store.webhooks.test(webhook.id, owner=None)
    wire = Wire()
    drive(sender(store, wire), lambda: all(set(states(store, one)) == {SENT} for one in webhooks))
    assert len(wire.sent) == len(set(wire.sent)) == 20


def test_a_slow_receiver_holds_up_its_own_messages_alone(store: Store) -> None:
    ann = user(store, "ann")
    slow = [make(store) for _ in range(6)]
    for webhook in slow:
        for _ in range(3):
            store.webhooks.test(webhook.id, owner=None)

    async def run() -> None:
        wire = Wire()
        wire.hold = asyncio.Event()
        loop = sender(store, wire)
        await loop.look()
        await asyncio.sleep(0.05)
        assert len(wire.now_open) == len(set(wire.now_open)) == room.AT_ONCE_EACH
        quick = make(store, ann)
        store.webhooks.test(quick.id, owner=ann)
        await loop.look()
        await asyncio.sleep(0.05)
        assert wire.now_open[-1].endswith(quick.id)
        wire.hold.set()
        await asyncio.gather(*loop._flying)

    asyncio.run(run())


def test_no_more_than_so_many_are_open(store: Store) -> None:
    for name in "abcdefghijkl":
        owner = user(store, name)
        store.webhooks.test(make(store, owner).id, owner=owner)

    async def run() -> None:
        wire = Wire()
        wire.hold = asyncio.Event()
        loop = sender(store, wire)
        await loop.look()
        await asyncio.sleep(0.05)
        assert wire.most_open == room.AT_ONCE
        wire.hold.set()
        await asyncio.gather(*loop._flying)

    asyncio.run(run())


def test_a_message_sent_just_before_the_end_is_sent_again_by_the_same_id(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    webhook, wire = make(store), Wire()
    run_job(store)
    with monkeypatch.context() as broken:
        broken.setattr(store.webhooks, "settle", _fails(UnavailableError("gone", code="store_unavailable")))
        drive(sender(store, wire), lambda: len(wire.sent) == 1)
    drive(sender(store, wire), lambda: states(store, webhook) == [SENT])
    assert len(wire.sent) == 2 and len(set(wire.sent)) == 1


@pytest.mark.parametrize("error", [UnavailableError("gone", code="store_unavailable"), RuntimeError("bug")])
def test_a_store_that_cannot_note_does_not_make_it_send_again(
    store: Store, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    webhook, wire, noted = make(store), Wire(), store.webhooks.settle
    run_job(store)
    monkeypatch.setattr(room, "FIRST_DELAY_S", 0.02)
    failures = iter(range(5))

    def settle(message: Message, outcome: Outcome) -> None:
        if next(failures, None) is not None:
            raise error
        noted(message, outcome)

    monkeypatch.setattr(store.webhooks, "settle", settle)
    drive(sender(store, wire), lambda: states(store, webhook) == [SENT])
    assert len(wire.sent) == 1


@pytest.mark.parametrize("fault", [RuntimeError("bug"), UnavailableError("no answer", code="x")])
def test_a_fault_of_ours_waits_its_turn(store: Store, fault: Exception) -> None:
    webhook, wire = make(store), Wire(fault)
    run_job(store)
    drive(
        sender(store, wire),
        lambda: store.webhooks.deliveries(webhook.id, owner=None, after=None, limit=1).data[0].tries == 1,
    )
    assert len(wire.sent) == 1 and states(store, webhook) == [PENDING]


def test_of_two_senders_one_sends_until_it_ends(store: Store) -> None:
    webhook, wire = make(store), Wire()

    async def run() -> None:
        first, second = sender(store, wire), sender(store, wire)
        await first.look()
        run_job(store)
        await second.look()
        assert wire.sent == [] and not second._flying
        running = asyncio.create_task(first.run())
        await asyncio.sleep(0.05)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert len(wire.sent) == 1
        store.webhooks.test(webhook.id, owner=None)
        await second.look()
        await asyncio.gather(*second._flying)
        assert len(wire.sent) == 2

    asyncio.run(run())


def test_a_look_at_an_empty_outbox_is_one_query(store: Store) -> None:
    async def run() -> list[str]:
        said: list[str] = []
        loop = sender(store, Wire())
        await loop.look()
        event.listen(store._database.engine, "before_cursor_execute", lambda *args: said.append(args[2]))
        for _ in range(3):
            await loop.look()
        return said

    said = asyncio.run(run())
    assert len([text for text in said if not text.startswith("BEGIN")]) == 3
    assert "BEGIN IMMEDIATE" not in said


def test_a_store_that_is_away_does_not_end_the_loop(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    webhook, wire, there = make(store), Wire(), store.webhooks.due
    run_job(store)
    failures = iter([UnavailableError("away", code="store_unavailable"), RuntimeError("bug")])

    def away(*args: Any, **options: Any) -> Any:
        if (error := next(failures, None)) is not None:
            raise error
        return there(*args, **options)

    monkeypatch.setattr(store.webhooks, "due", away)
    drive(sender(store, wire), lambda: states(store, webhook) == [SENT])


def test_retries_come_later_and_later_and_end(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "FIRST_DELAY_S", 0.1)
    monkeypatch.setattr(room, "MAX_TRIES", 4)
    with receiving(500, 503, 302, 404, 200) as receiver:
        made = store.webhooks.make(WebhookBody(url=receiver.url), owner=FIRST_USER)
        run_job(store)
        at: list[float] = []
        receiver.answers[:] = [_noting(at, status) for status in (500, 503, 302, 404)]
        drive(sender(store, Outbound(LOOPBACK)), lambda: states(store, made) == [FAILED])
    gaps = [later - earlier for earlier, later in itertools.pairwise(at)]
    assert len(at) == 4 and gaps == sorted(gaps) and len(set(receiver.ids())) == 1
    (failed,) = store.webhooks.deliveries(made.id, owner=None, after=None, limit=1).data
    assert (failed.tries, failed.last_error) == (4, "answered 404")


def test_a_receiver_that_never_answers_is_a_miss(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.outbound.IN_ALL_S", 0.2)
    end = threading.Event()
    with receiving(silent(end)) as receiver:
        made = store.webhooks.make(WebhookBody(url=receiver.url), owner=FIRST_USER)
        run_job(store)

        def missed() -> bool:
            (one,) = store.webhooks.deliveries(made.id, owner=None, after=None, limit=1).data
            return one.last_error == "no answer within 0.2 s" and one.next_at is not None

        drive(sender(store, Outbound(LOOPBACK)), missed)
        end.set()


def test_an_address_that_turned_inward_is_not_called(store: Store) -> None:
    with receiving() as receiver:
        made = store.webhooks.make(WebhookBody(url=receiver.url), owner=FIRST_USER)
        run_job(store)
        drive(sender(store, Outbound()), lambda: due(store) == [])
        (one,) = store.webhooks.deliveries(made.id, owner=None, after=None, limit=1).data
        assert one.tries == 1 and "must be https" in (one.last_error or "")
        assert receiver.num_connections == 0


def sender(store: Store, wire: Any) -> Sender:
    return Sender(store, SIGNER, wire, look_s=0.01)


def drive(run: Sender, until: Callable[[], bool], patience_s: float = 10) -> None:
    """Let a sender run until something holds, then end it."""

    async def wait() -> None:
        task = asyncio.create_task(run.run())
        end = time.monotonic() + patience_s
        while not until():
            assert time.monotonic() < end, "it never came to that"
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(wait())


def _fails(error: Exception) -> Callable[..., None]:
    def fail(*args: Any) -> None:
        raise error

    return fail


def _noting(at: list[float], status: int) -> Callable[[Any], None]:
    def answer(handler: Any) -> None:
        at.append(time.monotonic())
        handler.send_response(status)
        handler.send_header("content-length", "0")
        handler.end_headers()

    return answer
