"""Which shape the tables of a store have, and which this version knows; looked at without changing anything."""

from __future__ import annotations

from importlib.resources import files

from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, make_url
from sqlalchemy.pool import NullPool


def read_revisions(url: str) -> tuple[str | None, str | None, set[str]]:
    """(of the tables, None where there are none; the newest that is known; all that are known)."""
    scripts = ScriptDirectory(str(files("service") / "migrations"))
    patience = {} if make_url(url).get_backend_name() == "sqlite" else {"connect_timeout": 5}
    engine = create_engine(url, poolclass=NullPool, connect_args=patience)
    with engine.connect() as connection:
        found = MigrationContext.configure(connection).get_current_revision()
    return found, scripts.get_current_head(), {script.revision for script in scripts.walk_revisions()}
