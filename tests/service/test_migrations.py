"""Older databases are brought forward with all they held; newer ones are refused by name."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest
from sqlalchemy import create_engine

from scheduler.errors import SystemFault
from service.schemas import RunPlace, UserBody
from service.store import JobQuery, Place, Store
from service.store.access import FIRST_USER
from workers.contract import JobSpec
from workers.sweeps.contract import SweepSpec

DATA = Path(__file__).parent / "data"
OLD, SECOND, THIRD, FOURTH = (DATA / f"store_000{n}.sql" for n in (1, 2, 3, 4))
OLD_KEY = "d2ft_old_key"  # its hash is in that file


@pytest.fixture
def old_url(home: Path) -> str:
    """A database as the first version left it: a job that is done, one that runs, one that waits."""
    return loaded(home, OLD)


@pytest.fixture
def second_url(home: Path) -> str:
    """A database as the second version left it: a job that failed, one that runs, one that waits."""
    return loaded(home, SECOND)


@pytest.fixture
def third_url(home: Path) -> str:
    """A database as the third version left it, which knew no sweeps: jobs that are done, run and wait."""
    return loaded(home, THIRD)


@pytest.fixture
def fourth_url(home: Path) -> str:
    """A database as the fourth version left it, which had ordered all its runs: done, running, waiting; a sweep."""
    return loaded(home, FOURTH)


def loaded(home: Path, dump: Path) -> str:
    home.mkdir()
    path = home / "d2ft.db"
    with sqlite3.connect(path) as connection:
        connection.executescript(dump.read_text())
    connection.close()
    return f"sqlite:///{path}"


def test_an_older_database_keeps_its_jobs_keys_and_history(old_url: str) -> None:
    store = Store(old_url)
    caller = store.access.caller(OLD_KEY)
    assert caller and caller.user_id == FIRST_USER and caller.is_admin
    waiting, running, done = store.jobs.list(JobQuery(owner=FIRST_USER)).data
    assert (waiting.status, running.status, done.status) == ("queued", "running", "succeeded")
    assert done.metadata == {"team": "vision", "run": "7"} and done.owner == "admin"
    assert [event.seq for event in store.records.events(done.id).data] == list(range(1, 11))
    assert store.records.metrics(done.id, max_points=9).data[0]["loss"] == 2.0
    assert store.records.artifacts(done.id)[0].name == "model.safetensors"
    assert store.records.plan(done.id)["version"] == 1 and store.records.ledger(done.id) == {"rows": []}
    assert [job.id for job in store.jobs.list(JobQuery(metadata={"team": "vision"})).data] == [done.id]
    assert [job.id for job in store.jobs.list(JobQuery(search="WAITING")).data] == [waiting.id]
    store.close()


def test_what_ran_and_waited_goes_on_after_the_change(old_url: str) -> None:
    store = Store(old_url)
    (attempt,) = store.attempts.open()
    attempt = store.attempts.absorb(attempt, [{"seq": 99, "type": "outcome", "data": {"status": "succeeded"}}], 99)
    assert attempt.state == "ended"
    store.attempts.settle(attempt)
    second = store.queue.claim(1)
    assert second and second.spec.model == "vit_small_patch16_224"
    again, fresh = store.jobs.create(
        JobSpec(steps=4, name="old and done", metadata={"team": "vision", "run": "7"}),
        owner=store.access.make_user(UserBody(name="other")).id,
        idempotency_key="once",
    )
    assert fresh and again.status == "queued"
    store.close()


def test_what_ran_before_losses_were_counted_may_lose_as_much_as_any(second_url: str) -> None:
    store = Store(second_url)
    waiting, running, failed = store.jobs.list(JobQuery(owner=FIRST_USER)).data
    assert [job.status for job in (waiting, running, failed)] == ["queued", "running", "failed"]
    (attempt,) = store.attempts.open()
    error = {"code": "driver_died", "fault": "system", "message": "gone", "param": None}
    store.attempts.lose(attempt, error)
    assert store.jobs.get(running.id).status == "queued"
    lost = next(event for event in store.records.events(running.id).data if event.type == "attempt.lost")
    assert (lost.data["faults"], lost.data["next"]) == (1, "queued")
    assert store.actions.retry(failed.id).status == "queued"
    store.close()


def test_what_was_there_before_sweeps_are_plain_jobs_beside_them(third_url: str) -> None:
    store = Store(third_url)
    waiting, running, done = store.jobs.list(JobQuery(owner=FIRST_USER)).data
    assert [job.status for job in (waiting, running, done)] == ["queued", "running", "succeeded"]
    assert {job.sweep_id for job in (waiting, running, done)} == {None} and store.sweeps.list(JobQuery()).data == []
    spec = SweepSpec.model_validate({"space": {"seed": {"values": [1, 2]}}})
    sweep, fresh = store.sweeps.create(spec, owner=FIRST_USER)
    driving = store.queue.claim_sweep(1)
    assert fresh and driving and driving.job_id == sweep.id
    trial = store.sweeps.add_trial(driving, Place(sweep.id, "full", {}, "full"), spec.full())
    (attempt,) = [each for each in store.attempts.open() if each.kind == "job"]
    attempt = store.attempts.absorb(attempt, [{"seq": 99, "type": "outcome", "data": {"status": "succeeded"}}], 99)
    store.attempts.settle(attempt)
    assert [getattr(store.queue.claim(3), "job_id", None) for _ in range(3)] == [waiting.id, trial.job_id, None]
    store.close()


def test_what_was_there_before_runs_outside_is_all_our_own(fourth_url: str) -> None:
    store = Store(fourth_url)
    waiting, running, done = store.jobs.list(JobQuery(owner=FIRST_USER)).data
    assert [job.status for job in (waiting, running, done)] == ["queued", "running", "succeeded"]
    assert not any(job.outside or job.where for job in (waiting, running, done))
    attempt, _ = store.outside.begin(JobSpec(), RunPlace(run_dir="/out"), owner=FIRST_USER)
    assert store.jobs.get(attempt.job_id).outside and store.outside.end_silent(0) == []
    (ours,) = store.attempts.open()
    store.attempts.absorb(ours, [{"seq": 99, "type": "outcome", "data": {"status": "succeeded"}}], 99)
    store.attempts.settle(ours)
    claimed = store.queue.claim(1)
    assert ours.job_id == running.id and claimed and claimed.job_id == waiting.id
    store.close()


def test_opening_again_changes_nothing_and_a_newer_database_is_refused(old_url: str) -> None:
    Store(old_url).close()
    Store(old_url).close()
    engine = create_engine(old_url)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    engine.dispose()
    with pytest.raises(SystemFault, match=r"newer version.*9999"):
        Store(old_url)


def test_processes_that_start_together_change_the_tables_once(database: str) -> None:
    errors: list[Exception] = []

    def start() -> None:
        try:
            Store(database).close()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
