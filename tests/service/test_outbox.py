"""The outbox: a message for each who wants it, each once, each in its turn; on both databases."""

from __future__ import annotations

import time

import pytest

from service.errors import ConflictError, NotFoundError, TooManyError
from service.store import Store
from service.store.access import FIRST_USER
from service.store.webhooks import FAILED, FAILED_IN_A_ROW, MAX_EACH, SENT, Outcome
from service.webhooks import judge
from tests.service.outbox import due, make, run_job, states, user


@pytest.fixture(params=["sqlite", "postgres"])
def store_url(request: pytest.FixtureRequest, store_url: str) -> str:
    """What the shelf promises holds on both."""
    return str(request.getfixturevalue("database")) if request.param == "postgres" else store_url


def test_one_end_is_one_message_for_each_webhook_that_wants_it(store: Store) -> None:
    wants, other = make(store), make(store, types=["job.paused"])
    job_id = run_job(store)
    (message,) = due(store)
    assert message.webhook_id == wants.id and message.body["type"] == "job.failed"
    assert message.body["data"] == {"id": job_id} and message.body["id"] == message.id
    assert states(store, other) == []


def test_a_user_is_told_of_their_own_jobs_alone(store: Store) -> None:
    ann, bob = user(store, "ann"), user(store, "bob")
    of_ann, of_bob = make(store, ann), make(store, bob)
    run_job(store, owner=ann)
    assert (len(states(store, of_ann)), len(states(store, of_bob))) == (1, 0)
    with pytest.raises(NotFoundError):
        store.webhooks.get(of_ann.id, owner=bob)
    for call in (store.webhooks.delete, store.webhooks.test):
        with pytest.raises(NotFoundError):
            call(of_ann.id, owner=bob)
    with pytest.raises(NotFoundError):
        store.webhooks.deliveries(of_ann.id, owner=bob, after=None, limit=1)
    assert [one.id for one in store.webhooks.list(owner=bob)] == [of_bob.id]
    assert {one.user for one in store.webhooks.list(owner=None)} == {"ann", "bob"}


def test_there_is_a_limit_and_deleting_makes_room(store: Store) -> None:
    made = [make(store) for _ in range(MAX_EACH)]
    with pytest.raises(TooManyError, match="20 webhooks"):
        make(store)
    make(store, user(store, "ann"))
    run_job(store)
    assert store.webhooks.delete(made[0].id, owner=FIRST_USER) == made[0]
    make(store)
    assert made[0].id not in {message.webhook_id for message in due(store)}


def test_messages_are_paged_newest_first(store: Store) -> None:
    webhook = make(store)
    made = [store.webhooks.test(webhook.id, owner=FIRST_USER).id for _ in range(5)]
    first = store.webhooks.deliveries(webhook.id, owner=FIRST_USER, after=None, limit=3)
    rest = store.webhooks.deliveries(webhook.id, owner=FIRST_USER, after=first.last_id, limit=3)
    assert {one.id for one in (*first.data, *rest.data)} == set(made)
    assert (first.has_more, rest.has_more, len(rest.data)) == (True, False, 2)
    assert [one.id for one in first.data] == sorted((one.id for one in first.data), reverse=True)


def test_tests_do_not_pile_up(store: Store) -> None:
    webhook = make(store)
    with pytest.raises(TooManyError, match="wait to be sent"):
        for _ in range(50):
            store.webhooks.test(webhook.id, owner=FIRST_USER)


def test_each_owner_has_a_turn_however_long_the_outbox_of_another(store: Store) -> None:
    greedy, ann = [make(store) for _ in range(3)], user(store, "ann")
    for webhook in greedy:
        for _ in range(10):
            store.webhooks.test(webhook.id, owner=FIRST_USER)
    late = make(store, ann)
    wanted = store.webhooks.test(late.id, owner=ann)
    assert [message.owner for message in due(store)] == [FIRST_USER, ann]
    assert [message.id for message in due(store, full=[FIRST_USER])] == [wanted.id]
    assert due(store, busy=[late.id], full=[FIRST_USER]) == []


def test_a_message_waits_for_its_time(store: Store) -> None:
    make(store)
    run_job(store)
    (message,) = due(store)
    store.webhooks.settle(message, judge(0, 500, now=time.time(), jitter=0))
    assert due(store) == [] and [one.tries for one in due(store, later_s=6)] == [1]


def test_what_two_processes_note_of_one_try_counts_once_and_an_arrival_wins(store: Store) -> None:
    webhook = make(store)
    run_job(store)
    (message,) = due(store)
    missed = judge(0, 500, now=time.time(), jitter=0)
    store.webhooks.settle(message, missed)
    store.webhooks.settle(message, missed)
    assert due(store, later_s=6)[0].tries == 1
    store.webhooks.settle(message, Outcome(SENT, time.time()))
    store.webhooks.settle(message, missed)
    assert states(store, webhook) == [SENT] and due(store, later_s=9999) == []


def test_a_webhook_that_is_gone_is_told_nothing_more(store: Store) -> None:
    webhook = make(store)
    first, second = run_job(store), run_job(store)
    assert first != second
    store.webhooks.settle(due(store)[0], judge(0, 410, now=time.time(), jitter=0))
    run_job(store)
    assert store.webhooks.get(webhook.id, owner=None).disabled_at is not None
    assert states(store, webhook) == [FAILED, FAILED] and due(store, later_s=9999) == []
    with pytest.raises(ConflictError, match="disabled"):
        store.webhooks.test(webhook.id, owner=FIRST_USER)


@pytest.mark.parametrize("arrived", [False, True])
def test_a_webhook_that_takes_nothing_for_long_is_disabled(store: Store, arrived: bool) -> None:
    webhook = make(store)
    for n in range(FAILED_IN_A_ROW):
        store.webhooks.test(webhook.id, owner=FIRST_USER)
        (message,) = due(store)
        outcome = Outcome(SENT, 1.0) if arrived and n == 5 else Outcome(FAILED, 1.0, "answered 500")
        store.webhooks.settle(message, outcome)
    assert (store.webhooks.get(webhook.id, owner=None).disabled_at is None) is arrived


def test_old_messages_are_forgotten(store: Store) -> None:
    webhook = make(store)
    run_job(store)
    assert store.webhooks.prune(time.time() - 5) == 0
    assert store.webhooks.prune(time.time() + 5) == 1
    assert states(store, webhook) == []


def test_deleting_while_a_message_is_on_its_way_is_harmless(store: Store) -> None:
    webhook = make(store)
    run_job(store)
    (message,) = due(store)
    store.webhooks.delete(webhook.id, owner=FIRST_USER)
    store.webhooks.settle(message, Outcome(SENT, 1.0))
    assert store.webhooks.list(owner=None) == []
