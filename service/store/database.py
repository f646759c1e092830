"""Opening the store: engine, pragmas, migrations and transactions.

SQLite runs with a write-ahead log and synchronous=FULL, and every writing transaction begins IMMEDIATE: one that first
reads and then writes would otherwise fail at once when another writer got in between, whatever the busy timeout. Its
writers of one process take turns at a lock: the database's own would make them sleep and look again. PostgreSQL by URL
needs none of this: what is SQLite's own is in this file alone. There, rows that a transaction changes after reading are
read `FOR UPDATE` (SQLite passes over that), and waiting has an end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.resources import files
from typing import Any, TypeVar

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import IntegrityError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session

from scheduler import failpoints
from scheduler.errors import SystemFault
from service.errors import UnavailableError
from service.meters import Meters

BUSY_TIMEOUT_MS = 10_000
POOL_SIZE = 10
CLASHES = 8
Answer = TypeVar("Answer")
_MIGRATION_LOCK = 0xD2F7
_WRITES, _HASTY = "d2ft_writes", "d2ft_hasty"
_CHANGED = "d2ft_changed"


class Database:
    """One engine and its two kinds of transaction; tells `on_change` which jobs a committed one touched."""

    def __init__(self, url: str, meters: Meters | None = None) -> None:
        self.engine = _make_engine(url)
        self._writer = self.engine.execution_options(**{_WRITES: True})
        self._hasty = self.engine.execution_options(**{_WRITES: True, _HASTY: True})
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        self._lock = threading.Lock()
        self._meters = meters or Meters()
        self.on_change: Callable[[str], None] = lambda job_id: None
        migrate(self.engine)

    @contextmanager
    def read(self) -> Iterator[Session]:
        with self._meters.transaction("read"), _named_outage(), Session(self.engine) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that commits at the end, or not at all."""
        metered = self._meters.transaction("write")
        turn = self._turn(BUSY_TIMEOUT_MS / 1000)
        with metered, _named_outage(), turn, Session(self._writer) as session, ExitStack() as commit, session.begin():
            yield session
            changed: set[str] = session.info.setdefault(_CHANGED, set())
            commit.enter_context(failpoints.passing("store.commit"))
        for job_id in changed:
            self.on_change(job_id)

    def write_if_free(self, work: Callable[[Session], object]) -> bool:
        """Work in a transaction where no other writer is at it, otherwise not at all; whether it was done."""
        try:
            with _named_outage(), self._turn(0), Session(self._hasty) as session, session.begin():
                work(session)
        except UnavailableError:
            return False
        return True

    def write_again(self, work: Callable[[Session], Answer]) -> Answer:
        """Work in a transaction of its own, and again where another process wrote at the same time what it would write.

        Such a clash shows as a broken unique key; the next time the work finds what is there and can see to it.
        """
        for _ in range(CLASHES - 1):
            with suppress(IntegrityError), self.write() as session:
                return work(session)
        with self.write() as session:
            return work(session)

    def close(self) -> None:
        """Close all connections; one at which a thread is still busy is closed when that has ended."""
        event.listen(self.engine, "checkin", lambda _, record: record.invalidate())
        self.engine.dispose()

    @contextmanager
    def _turn(self, seconds: float) -> Iterator[None]:
        """Of the writers of this process, one. Raises UnavailableError where those before take longer than that."""
        if not self.is_sqlite:
            yield
            return
        if not self._lock.acquire(timeout=seconds):
            raise UnavailableError("The store does not answer: others are writing.", code="store_unavailable")
        try:
            yield
        finally:
            self._lock.release()


@contextmanager
def _named_outage() -> Iterator[None]:
    try:
        yield
    except (OperationalError, InterfaceError, PoolTimeoutError) as error:
        reason = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
        raise UnavailableError(f"The store does not answer: {reason}.", code="store_unavailable") from error


def mark_changed(session: Session, job_id: str) -> None:
    """Have the transaction ring for this job once it is committed."""
    session.info.setdefault(_CHANGED, set()).add(job_id)


def migrate(engine: Engine) -> None:
    """Bring the tables to this version's shape. Raises SystemFault for a store that a newer version has changed."""
    config = Config()
    config.set_main_option("script_location", str(files("service") / "migrations").replace("%", "%%"))
    with _named_outage(), engine.execution_options(**{_WRITES: True}).begin() as connection:
        if engine.dialect.name == "postgresql":  # processes that start together change the tables one after another
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})")
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            message = f"The store was written by a newer version of this service: {error}."
            remedy = "Use that version, or a copy of the database from before."
            raise SystemFault(message, code="store_newer", remedy=remedy) from error


def _make_engine(url: str) -> Engine:
    if make_url(url).get_backend_name() != "sqlite":
        patience = f"-c lock_timeout={BUSY_TIMEOUT_MS} -c statement_timeout={3 * BUSY_TIMEOUT_MS}"
        given = {"options": patience, "connect_timeout": 5}
        return create_engine(
            url, pool_size=POOL_SIZE, max_overflow=POOL_SIZE, pool_timeout=10, pool_pre_ping=True, connect_args=given
        )
    engine = create_engine(url)
    event.listen(engine, "connect", _set_pragmas)
    event.listen(engine, "begin", _begin)
    return engine


def _set_pragmas(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # the driver would begin transactions itself, deferred
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", f"busy_timeout={BUSY_TIMEOUT_MS}"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin(connection: Connection) -> None:
    options = connection.get_execution_options()
    begin = "BEGIN IMMEDIATE" if options.get(_WRITES, False) else "BEGIN"
    if not options.get(_HASTY, False):
        connection.exec_driver_sql(begin)
        return
    connection.exec_driver_sql("PRAGMA busy_timeout=0")
    try:
        connection.exec_driver_sql(begin)
    finally:
        connection.exec_driver_sql(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
