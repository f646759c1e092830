"""A real PostgreSQL, and empty databases in it: for tests and benches."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import pgserver
from sqlalchemy import create_engine, make_url


@contextmanager
def running_postgres() -> Iterator[str]:
    """A server of its own; yields the URL of its maintenance database.

    Not under pytest's own directory: another session closes that to the server's user.
    """
    with tempfile.TemporaryDirectory(prefix="d2ft-postgres-", ignore_cleanup_errors=True) as data:
        server = pgserver.get_server(data)
        yield server.get_uri().replace("postgresql://", "postgresql+psycopg://")
        server.cleanup()


@contextmanager
def empty_database(postgres: str) -> Iterator[str]:
    """A database that is dropped again; yields its URL."""
    name = f"d2ft_{secrets.token_hex(6)}"
    engine = create_engine(postgres, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    yield make_url(postgres).set(database=name).render_as_string(hide_password=False)
    with engine.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
    engine.dispose()
