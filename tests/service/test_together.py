"""Writing together: one transaction for all that comes at once, each answered once it is committed, failing alone."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from service.errors import InvalidRequestError, TooManyError, UnavailableError
from service.schemas import UserBody
from service.store import JobQuery, Store
from service.store.access import FIRST_USER
from workers.contract import JobSpec


@pytest.fixture(params=["sqlite", "postgres"])
def store_url(request: pytest.FixtureRequest, store_url: str) -> str:
    """The same tests on both."""
    return str(request.getfixturevalue("database")) if request.param == "postgres" else store_url


def submit(store: Store, *asked: dict[str, Any]) -> list[Any]:
    """What became of submits that were sent at the same moment."""

    async def all_of_them() -> list[Any]:
        sent = [store.jobs.create_together(**{"owner": FIRST_USER, **each}) for each in asked]
        return await asyncio.gather(*sent, return_exceptions=True)

    return asyncio.run(all_of_them())


def commits_of(store: Store) -> list[None]:
    """Grows by one with every commit of the store."""
    seen: list[None] = []
    event.listen(store._database.engine, "commit", lambda connection: seen.append(None))
    return seen


def test_many_at_once_are_all_made_in_their_order_by_few_commits(store: Store) -> None:
    commits = commits_of(store)
    made = submit(store, *({"spec": JobSpec(steps=1 + i)} for i in range(60)))
    ids = [job.id for job, fresh in made if fresh]
    assert len(set(ids)) == 60 and len(commits) <= 15
    listed = store.jobs.list(JobQuery(limit=100, order="asc")).data
    assert [job.spec["steps"] for job in listed] == list(range(1, 61))
    assert all(len(store.records.events(job_id).data) == 2 for job_id in ids)


def test_what_one_raises_undoes_that_one_alone(store: Store) -> None:
    poor = store.access.make_user(UserBody(name="poor", max_queued=1)).id
    asked = [{"spec": JobSpec(steps=2)}, {"spec": JobSpec(priority=100), "owner": poor}]
    asked += [{"spec": JobSpec(steps=3), "owner": poor}] * 3 + [{"spec": JobSpec(steps=4)}]
    outcomes = submit(store, *asked)
    kinds = [type(outcome) for outcome in outcomes]
    assert kinds == [tuple, InvalidRequestError, tuple, TooManyError, TooManyError, tuple]
    assert len(store.jobs.list(JobQuery()).data) == 3


def test_one_key_many_times_at_once_is_one_job(store: Store) -> None:
    other = {"spec": JobSpec(steps=9), "idempotency_key": "a"}
    outcomes = submit(store, *([{"spec": JobSpec(steps=5), "idempotency_key": "a"}] * 20), other)
    assert isinstance(outcomes.pop(), InvalidRequestError)
    assert len({job.id for job, _ in outcomes}) == 1
    assert [fresh for _, fresh in outcomes] == [True] + [False] * 19


def test_where_nothing_is_committed_nobody_is_told_that_it_was(store: Store) -> None:
    def fail(connection: Any) -> None:
        raise OperationalError("COMMIT", {}, Exception("database or disk is full"))

    event.listen(store._database.engine, "commit", fail)
    outcomes = submit(store, *({"spec": JobSpec(steps=1 + i)} for i in range(5)))
    assert [type(outcome) for outcome in outcomes] == [UnavailableError] * 5
    event.remove(store._database.engine, "commit", fail)
    assert store.jobs.list(JobQuery()).data == []
    assert submit(store, {"spec": JobSpec()})[0][1]


def test_commits_ring_for_all_that_they_brought(store: Store) -> None:
    rung: list[str] = []
    store.on_change(rung.append)
    made = submit(store, *({"spec": JobSpec(steps=1 + i)} for i in range(10)))
    assert sorted(rung) == sorted(job.id for job, _ in made)


def test_a_key_is_answered_again_however_many_wait(store: Store) -> None:
    poor = store.access.make_user(UserBody(name="poor", max_queued=1)).id
    asked = {"spec": JobSpec(), "owner": poor, "idempotency_key": "a"}
    ((first, _),) = submit(store, asked)
    new, again = submit(store, {"spec": JobSpec(), "owner": poor}, asked)
    assert isinstance(new, TooManyError) and again == (first, False)


def test_two_processes_that_bring_the_same_keys_make_each_job_once(store: Store, store_url: str) -> None:
    other = Store(store_url)
    asked = [{"spec": JobSpec(steps=1 + i), "idempotency_key": f"key {i}"} for i in range(60)]
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(lambda each: submit(*each), [(store, *asked), (other, *reversed(asked))]))
    other.close()
    theirs, ours = ({job.spec["steps"]: (job.id, fresh) for job, fresh in each} for each in outcomes)
    assert len(theirs) == len(ours) == len(store.jobs.list(JobQuery(limit=100)).data) == 60
    assert all(theirs[step][0] == ours[step][0] and theirs[step][1] != ours[step][1] for step in theirs)
