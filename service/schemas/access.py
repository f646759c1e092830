"""Users and their keys."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from service.schemas.base import Wire
from workers.method import Frozen

NotGiven = SkipJsonSchema[None]  # for what may be left away, but not null
Scope = Literal["read", "write", "admin"]
Name = Annotated[str, Field(min_length=1, max_length=80, pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]*$")]


class User(Wire):
    """Who owns jobs. Of the limits, null means the service's default."""

    id: str
    object: Literal["user"] = "user"
    name: str
    role: str
    max_queued: int | None = None
    max_running: int | None = None
    max_priority: int = 0
    share: float = 1.0
    disabled: bool = False
    created_at: int


class Me(Wire):
    """The caller: the user behind the key, and what the key may do."""

    object: Literal["me"] = "me"
    user: User
    scopes: list[str]
    key_id: str | None = None


class UserBody(Frozen):
    """A new user. Jobs of a user with twice the `share` go first twice as often."""

    name: Name
    role: Literal["admin", "member"] = "member"
    max_queued: Annotated[int, Field(ge=0, le=10**6)] | None = None
    max_running: Annotated[int, Field(ge=0, le=10**4)] | None = None
    max_priority: Annotated[int, Field(ge=-100, le=100)] = 0
    share: Annotated[float, Field(gt=0, le=1000)] = 1.0


class UserChange(Frozen):
    """What is to be different about a user; what is not given stays."""

    role: Literal["admin", "member"] | NotGiven = None
    max_queued: Annotated[int, Field(ge=0, le=10**6)] | None = None
    max_running: Annotated[int, Field(ge=0, le=10**4)] | None = None
    max_priority: Annotated[int, Field(ge=-100, le=100)] | NotGiven = None
    share: Annotated[float, Field(gt=0, le=1000)] | NotGiven = None
    disabled: bool | NotGiven = None


class Key(Wire):
    """An API key without the key: `hint` is its beginning. `key` is there once, in the answer that made it."""

    id: str
    object: Literal["key"] = "key"
    name: str
    user: str
    hint: str
    scopes: list[str]
    created_at: int
    expires_at: int | None = None
    revoked_at: int | None = None
    used_at: int | None = None
    key: str | None = Field(default=None, repr=False)


class KeyBody(Frozen):
    """A new key: for the caller, or, asked by an administrator, for `user`."""

    name: Name = "key"
    scopes: Annotated[list[Scope], Field(min_length=1, max_length=3)] = Field(default=["read", "write"])
    expires_in_s: Annotated[int, Field(ge=60, le=10 * 366 * 86400)] | None = None
    user: Name | None = None
