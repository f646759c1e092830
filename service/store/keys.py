"""API keys: only their hashes are kept.

A key is 256 random bits, so a plain SHA-256 hides it: there is nothing to guess that a slow hash would protect.
"""

from __future__ import annotations

import hashlib
import hmac
import time

from sqlalchemy import select
from ulid import ULID

from service.store.database import Database
from service.tables import ApiKeyRow


class Keys:
    """Who may come in."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def ensure(self, key: str, name: str) -> None:
        """Have the store know this key."""
        digest = _digest(key)
        with self._database.write() as session:
            if session.scalar(select(ApiKeyRow).where(ApiKeyRow.hash == digest)) is None:
                session.add(ApiKeyRow(id=f"key_{ULID()}", hash=digest, name=name, created_at=time.time()))

    def owner_of(self, key: str) -> str | None:
        """The id of the key, or None; takes as long for a wrong key as for a right one."""
        digest, owner = _digest(key), None
        with self._database.read() as session:
            for row in session.scalars(select(ApiKeyRow)):
                if hmac.compare_digest(row.hash, digest):
                    owner = row.id
        return owner


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
