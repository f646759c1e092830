"""Leases: of several processes on one store, which one does what only one may do.

A lease is held for some seconds at a time, by the database's clock, and extended while its holder lives. Losing one is
no danger, since every write of an attempt is fenced by its token; it only saves double work.
"""

from __future__ import annotations

import time

from sqlalchemy import Double, cast, extract, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.store.database import Database
from service.tables import LeaseRow


class Leases:
    """The lease shelf of the store."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def hold(self, name: str, holder: str, seconds: float) -> bool:
        """Take or extend a lease; False while another has it."""
        try:
            return self._hold(name, holder, seconds)
        except IntegrityError:
            return False  # another took it for the first time, at the same moment

    def release(self, name: str, holder: str) -> None:
        """Give a lease back, so that another need not wait for its end."""
        with self._database.write() as session:
            row = session.get(LeaseRow, name, with_for_update=True)
            if row is not None and row.holder == holder:
                row.until = 0.0

    def _hold(self, name: str, holder: str, seconds: float) -> bool:
        with self._database.write() as session:
            now = self._now(session)
            row = session.get(LeaseRow, name, with_for_update=True)
            if row is None:
                session.add(LeaseRow(name=name, holder=holder, until=now + seconds))
                return True
            if row.holder != holder and row.until > now:
                return False
            row.holder, row.until = holder, now + seconds
            return True

    def _now(self, session: Session) -> float:
        if self._database.is_sqlite:
            return time.time()  # its clock is this machine's
        return float(session.scalar(select(cast(extract("epoch", func.clock_timestamp()), Double))) or 0.0)
