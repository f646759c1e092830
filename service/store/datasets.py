"""Registered datasets: a name, the address behind it, and what its last listing said.

Names are per user: a name means the caller's own dataset, also to an administrator; an id reaches as far as the caller.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, or_, select, tuple_
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session
from ulid import ULID

from service.errors import ConflictError, NotFoundError, TooManyError
from service.schemas import Dataset, DatasetBody, DatasetClass, Page
from service.store.access import Caller
from service.store.database import Database
from service.store.jobs import owner_name, page
from service.tables import DatasetRow
from workers.sources.address import parse_address

MAX_EACH = 1000  # a summary has a line for every class: what one user can store must have an end


@dataclass(frozen=True)
class DatasetQuery:
    """Which datasets to list, newest first, from the one after `after` on; `search` is part of name or address."""

    after: str | None = None
    limit: int = 20
    search: str | None = None


class Datasets:
    """The shelf of datasets."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def register(self, body: DatasetBody, summary: dict[str, Any], caller: Caller) -> tuple[Dataset, bool]:
        """(the dataset, whether it is new). Raises ConflictError when the name has another address, TooManyError."""
        try:
            return self._register(body, summary, caller)
        except IntegrityError:
            # Another process took the name at the same moment: what it made is there now.
            return self._register(body, summary, caller)

    def get(self, key: str, caller: Caller) -> Dataset:
        """By id or by name. Raises NotFoundError for another user's, too."""
        with self._database.read() as session:
            return _view(session, _row(session, key, caller))

    def list(self, query: DatasetQuery, caller: Caller) -> Page[Dataset]:
        """Without their classes, which may be thousands."""
        with self._database.read() as session:
            wanted = select(DatasetRow)
            if caller.reach is not None:
                wanted = wanted.where(DatasetRow.owner == caller.reach)
            if query.search:
                part = query.search.lower()
                places = (DatasetRow.name, DatasetRow.uri)
                wanted = wanted.where(or_(*(func.lower(place).contains(part, autoescape=True) for place in places)))
            if query.after:
                start = _row(session, query.after, caller)
                mark = tuple_(start.created_at, start.id)
                wanted = wanted.where(tuple_(DatasetRow.created_at, DatasetRow.id) < mark)
            wanted = wanted.order_by(DatasetRow.created_at.desc(), DatasetRow.id.desc()).limit(query.limit + 1)
            rows = list(session.scalars(wanted))
            data = [_view(session, row, brief=True) for row in rows[: query.limit]]
        return page(data, [each.id for each in data], more=len(rows) > query.limit)

    def update(self, dataset_id: str, summary: dict[str, Any], caller: Caller) -> Dataset:
        """Note a new listing. Raises NotFoundError."""
        with self._database.write() as session:
            row = _row(session, dataset_id, caller, lock=True)
            row.summary = summary
            return _view(session, row)

    def forget(self, key: str, caller: Caller) -> Dataset:
        """Drop the entry; the files stay, and jobs that were made with it keep its address. Raises NotFoundError."""
        with self._database.write() as session:
            row = _row(session, key, caller, lock=True)
            session.delete(row)
            return _view(session, row)

    def uris(self, owner: str) -> Mapping[str, str]:
        """The addresses of a user's datasets, by name."""
        with self._database.read() as session:
            wanted = select(DatasetRow.name, DatasetRow.uri).where(DatasetRow.owner == owner)
            return {row.name: row.uri for row in session.execute(wanted)}

    def _register(self, body: DatasetBody, summary: dict[str, Any], caller: Caller) -> tuple[Dataset, bool]:
        with self._database.write() as session:
            row = _named(session, body.name, caller.user_id, lock=True)
            if row is not None and parse_address(row.uri) != parse_address(body.uri):
                message = f"Your dataset {body.name} has another address, {row.uri}."
                remedy = "Take another name, or delete the old entry first."
                raise ConflictError(message, code="dataset_exists", param="name", remedy=remedy)
            if row is not None:
                row.summary = summary
                return _view(session, row), False
            _check_room(session, caller.user_id)
            row = DatasetRow(
                id=f"dataset_{ULID()}",
                owner=caller.user_id,
                name=body.name,
                uri=body.uri,
                summary=summary,
                created_at=time.time(),
            )
            session.add(row)
            session.flush()
            return _view(session, row), True


def _row(session: Session, key: str, caller: Caller, *, lock: bool = False) -> DatasetRow:
    row = session.get(DatasetRow, key, with_for_update=lock or None)
    if row is None or caller.reach not in (None, row.owner):
        row = _named(session, key, caller.user_id, lock=lock)
    if row is None:
        raise NotFoundError(f"There is no dataset {key[:80]}.", code="dataset_not_registered", param="id")
    return row


def _named(session: Session, name: str, owner: str, *, lock: bool) -> DatasetRow | None:
    wanted = select(DatasetRow).where(DatasetRow.owner == owner, DatasetRow.name == name)
    return session.scalar(wanted.with_for_update() if lock else wanted)


def _check_room(session: Session, owner: str) -> None:
    count = session.scalar(select(func.count()).select_from(DatasetRow).where(DatasetRow.owner == owner))
    if (count or 0) >= MAX_EACH:
        message = f"You have {count} datasets, as many as you may."
        raise TooManyError(message, code="too_many_datasets", remedy="Delete entries that you no longer need.")


def _view(session: Session, row: DatasetRow, *, brief: bool = False) -> Dataset:
    classes = [DatasetClass(**each) for each in row.summary["classes"]]
    seen = row.summary["inspected_at"] is not None
    return Dataset(
        id=row.id,
        owner=owner_name(session, row.owner),
        name=row.name,
        uri=row.uri,
        num_classes=len(classes) if seen else None,
        num_train=sum(each.num_train for each in classes) if seen else None,
        num_test=sum(each.num_test for each in classes) if seen else None,
        classes=[] if brief else classes,
        created_at=int(row.created_at),
        inspected_at=row.summary["inspected_at"],
    )
