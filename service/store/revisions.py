"""Which shape the tables of a store have, and which this version knows; looked at without changing anything."""

from __future__ import annotations

from importlib.resources import files

from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool


def read_revisions(url: str) -> tuple[str | None, str | None, set[str]]:
    """(of the tables, None where there are none; the newest that is known; all that are known)."""
    scripts = ScriptDirectory(str(files("service") / "migrations"))
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        found = MigrationContext.configure(connection).get_current_revision()
    return found, scripts.get_current_head(), {script.revision for script in scripts.walk_revisions()}
