"""Users and their API keys. Of a key only its hash is kept.

A key is 256 random bits, so a plain SHA-256 hides it: there is nothing to guess that a slow hash would protect.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session
from ulid import ULID

from service.errors import ConflictError, NotFoundError
from service.schemas import Key, KeyBody, User, UserBody
from service.store.database import Database
from service.store.views import seconds
from service.tables import ApiKeyRow, UserRow

FIRST_USER = "user_first"  # the administrator that comes with the tables
ALL_SCOPES = ("read", "write", "admin")
PREFIX = "d2ft_"
_HINT_CHARS = len(PREFIX) + 4
_USED_EVERY_S = 60.0
_KNOWN_S = 1.0
_MAX_KNOWN = 1000
# Columns, not objects: every request asks this.
_CALLER = select(
    ApiKeyRow.id, ApiKeyRow.hash, ApiKeyRow.user_id, ApiKeyRow.scopes, ApiKeyRow.expires_at, ApiKeyRow.revoked_at,
    ApiKeyRow.used_at, UserRow.role, UserRow.disabled_at,
).join(UserRow, UserRow.id == ApiKeyRow.user_id)  # fmt: skip


@dataclass(frozen=True)
class Caller:
    """Who sends a request: the user behind a key, and what the key may do."""

    user_id: str
    key_id: str
    role: str
    scopes: frozenset[str]

    @property
    def is_admin(self) -> bool:
        """Whether this key reaches what is others'. A member's key never does, whatever its scopes."""
        return self.role == "admin" and "admin" in self.scopes

    @property
    def reach(self) -> str | None:
        """The owner that what the store shows is narrowed to; None for everybody's."""
        return None if self.is_admin else self.user_id


class Access:
    """The shelf of users and keys."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: dict[str, tuple[Caller, float]] = {}

    def known(self, key: str) -> Caller | None:
        """Who has this key, if that was asked within the last second, without asking the database.

        What is revoked by this process is forgotten at once; of another process it is heard after that second.
        """
        caller, until = self._known.get(_digest(key), (None, 0.0))
        return caller if time.time() < until else None

    def ensure(self, key: str, name: str) -> None:
        """Have the store know this key, as one of the first administrator."""
        with self._database.write() as session:
            if session.scalar(select(ApiKeyRow.id).where(ApiKeyRow.hash == _digest(key))) is None:
                session.add(_key_row(FIRST_USER, key, name, ALL_SCOPES, None))

    def caller(self, key: str) -> Caller | None:
        """Who has this key; None for one that is unknown, expired or revoked, or whose user is disabled."""
        digest, now = _digest(key), time.time()
        known = self._known  # another by the time that something is revoked meanwhile
        with self._database.read() as session:
            row = session.execute(_CALLER.where(ApiKeyRow.hash == digest)).first()
        if row is None or not hmac.compare_digest(row.hash, digest):
            return None
        caller = self._admitted(row, now)
        if caller is not None:
            if len(known) >= _MAX_KNOWN:
                known.clear()
            known[digest] = caller, min(now + _KNOWN_S, row.expires_at or now + _KNOWN_S)
        return caller

    def holder(self, key_id: str) -> Caller | None:
        """Who has the key of this id; None as for `caller`."""
        with self._database.read() as session:
            row = session.execute(_CALLER.where(ApiKeyRow.id == key_id)).first()
        return None if row is None else self._admitted(row, time.time())

    def _admitted(self, row: Any, now: float) -> Caller | None:
        is_over = row.revoked_at is not None or (row.expires_at is not None and row.expires_at <= now)
        if is_over or row.disabled_at is not None:
            return None
        if row.used_at is None or now - row.used_at > _USED_EVERY_S:
            self._note_use(row.id, now)
        return Caller(row.user_id, row.id, row.role, frozenset(row.scopes))

    def make_key(self, body: KeyBody, *, user_id: str) -> Key:
        """A new key; the answer is the only place where it is ever shown."""
        key = PREFIX + secrets.token_urlsafe(32)
        expires_at = None if body.expires_in_s is None else time.time() + body.expires_in_s
        with self._database.write() as session:
            user = session.get_one(UserRow, user_id)
            row = _key_row(user_id, key, body.name, tuple(dict.fromkeys(body.scopes)), expires_at)
            session.add(row)
            return _key_view(row, user, key)

    def keys(self, *, owner: str | None) -> Sequence[Key]:
        """All keys, newest first, revoked ones included."""
        with self._database.read() as session:
            wanted = select(ApiKeyRow, UserRow).join(UserRow, UserRow.id == ApiKeyRow.user_id)
            if owner is not None:
                wanted = wanted.where(ApiKeyRow.user_id == owner)
            rows = session.execute(wanted.order_by(ApiKeyRow.created_at.desc(), ApiKeyRow.id))
            return [_key_view(row, user) for row, user in rows]

    def revoke(self, key_id: str, *, owner: str | None) -> Key:
        """End a key at once; again is harmless. Raises NotFoundError for another user's, too."""
        with self._database.write() as session:
            row = session.get(ApiKeyRow, key_id, with_for_update=True)
            if row is None or owner not in (None, row.user_id):
                raise NotFoundError(f"There is no key {key_id[:60]}.", code="key_not_found", param="id")
            row.revoked_at = row.revoked_at or time.time()
            revoked = _key_view(row, session.get_one(UserRow, row.user_id))
        self._known = {}
        return revoked

    def make_user(self, body: UserBody) -> User:
        """Raises ConflictError when the name is taken."""
        row = UserRow(
            id=f"user_{ULID()}", usage_s=0.0, usage_at=time.time(), created_at=time.time(), **body.model_dump()
        )
        try:
            with self._database.write() as session:
                session.add(row)
                session.flush()
                return _user_view(row)
        except IntegrityError:
            message = f"There is a user {body.name} already."
            raise ConflictError(message, code="user_exists", param="name", remedy="Take another name.") from None

    def users(self) -> Sequence[User]:
        with self._database.read() as session:
            return [_user_view(row) for row in session.scalars(select(UserRow).order_by(UserRow.name))]

    def user(self, user_id: str) -> User:
        with self._database.read() as session:
            return _user_view(_user(session, user_id))

    def user_named(self, name: str) -> User:
        """Raises NotFoundError."""
        with self._database.read() as session:
            row = session.scalar(select(UserRow).where(UserRow.name == name))
            if row is None:
                raise NotFoundError(f"There is no user {name[:80]}.", code="user_not_found", param="user")
            return _user_view(row)

    def change_user(self, user_id: str, changes: dict[str, Any]) -> User:
        """Set what is given. Raises ConflictError when no administrator would be left."""
        with self._database.write() as session:
            admins = select(UserRow.id).where(UserRow.role == "admin", UserRow.disabled_at.is_(None))
            # All of them are locked, in one order: two who remove each other at once would each still see the other.
            session.execute(admins.order_by(UserRow.id).with_for_update())
            row = _user(session, user_id, lock=True)
            disabled = changes.pop("disabled", None)
            if disabled is not None:
                row.disabled_at = (row.disabled_at or time.time()) if disabled else None
            for name, value in changes.items():
                setattr(row, name, value)
            session.flush()
            if session.scalar(admins.limit(1)) is None:
                message = "This is the last administrator; without one nobody could undo this."
                raise ConflictError(message, code="last_admin", remedy="Make another user an administrator first.")
            changed = _user_view(row)
        self._known = {}
        return changed

    def _note_use(self, key_id: str, now: float) -> None:
        """A request that only reads does not wait for writers: when the store has some, the next one notes it."""
        noted = update(ApiKeyRow).where(ApiKeyRow.id == key_id).values(used_at=now)
        self._database.write_if_free(lambda session: session.execute(noted))


def _user(session: Session, user_id: str, *, lock: bool = False) -> UserRow:
    row = session.get(UserRow, user_id, with_for_update=lock or None)
    if row is None:
        raise NotFoundError(f"There is no user {user_id[:60]}.", code="user_not_found", param="id")
    return row


def _key_row(user_id: str, key: str, name: str, scopes: Sequence[str], expires_at: float | None) -> ApiKeyRow:
    return ApiKeyRow(
        id=f"key_{ULID()}",
        user_id=user_id,
        hash=_digest(key),
        name=name,
        hint=key[:_HINT_CHARS],
        scopes=list(scopes),
        created_at=time.time(),
        expires_at=expires_at,
    )


def _key_view(row: ApiKeyRow, user: UserRow, key: str | None = None) -> Key:
    return Key(
        id=row.id,
        name=row.name,
        user=user.name,
        hint=row.hint,
        scopes=row.scopes,
        created_at=int(row.created_at),
        expires_at=seconds(row.expires_at),
        revoked_at=seconds(row.revoked_at),
        used_at=seconds(row.used_at),
        key=key,
    )


def _user_view(row: UserRow) -> User:
    return User(
        id=row.id,
        name=row.name,
        role=row.role,
        max_queued=row.max_queued,
        max_running=row.max_running,
        max_priority=row.max_priority,
        share=row.share,
        disabled=row.disabled_at is not None,
        created_at=int(row.created_at),
    )


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
