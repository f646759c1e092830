"""Keys and users: who the caller is, keys made and revoked, users with their limits."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from service.errors import ForbiddenError, InvalidRequestError, Issue
from service.routes.world import PROBLEM, ByAdmin, ByCaller, InWorld
from service.schemas import Key, KeyBody, Me, Page, User, UserBody, UserChange
from service.store.jobs import page

router = APIRouter(tags=["access"], responses=PROBLEM)


@router.get("/me", response_model=Me)
def read_me(world: InWorld, caller: ByCaller) -> Me:
    """The user behind the key, and what the key may do."""
    return Me(user=world.store.access.user(caller.user_id), scopes=sorted(caller.scopes), key_id=caller.key_id)


@router.get("/keys", response_model=Page[Key])
def list_keys(world: InWorld, caller: ByCaller) -> Page[Key]:
    """The caller's keys, an administrator everybody's; never the keys themselves."""
    found = world.store.access.keys(owner=caller.reach)
    return page(list(found), [key.id for key in found], more=False)


@router.post("/keys", status_code=201, response_model=Key)
def make_key(body: KeyBody, world: InWorld, caller: ByCaller) -> Key:
    """A new key. The answer shows it, and nothing ever will again."""
    user = world.store.access.user(caller.user_id)
    if body.user is not None and body.user != user.name:
        if not caller.is_admin:
            raise ForbiddenError("Only an administrator makes keys for others.", code="admin_only", param="user")
        user = world.store.access.user_named(body.user)
    elif not caller.is_admin and not set(body.scopes) <= caller.scopes:
        raise ForbiddenError("A key cannot give what it lacks itself.", code="scope_missing", param="scopes")
    if "admin" in body.scopes and user.role != "admin":
        message = f"{user.name} is no administrator; leave the scope 'admin' away."
        raise InvalidRequestError([Issue("scopes", message, "not_admin")])
    return world.store.access.make_key(body, user_id=user.id)


@router.delete("/keys/{key_id}", response_model=Key)
def revoke_key(key_id: str, world: InWorld, caller: ByCaller) -> Key:
    """End a key at once; harmless when asked again."""
    return world.store.access.revoke(key_id, owner=caller.reach)


@router.get("/users", response_model=Page[User])
def list_users(world: InWorld, caller: ByAdmin) -> Page[User]:
    """All users and their limits."""
    found = world.store.access.users()
    return page(list(found), [user.id for user in found], more=False)


@router.post("/users", status_code=201, response_model=User)
def make_user(body: UserBody, world: InWorld, caller: ByAdmin) -> User:
    """A new user, who has no key yet."""
    return world.store.access.make_user(body)


@router.patch("/users/{user_id}", response_model=User)
def change_user(user_id: str, body: UserChange, world: InWorld, caller: ByAdmin) -> User:
    """Change a user's role or limits, or disable them: their keys open nothing then, their jobs go on."""
    given: dict[str, Any] = body.model_dump(exclude_unset=True)
    missing = [name for name, value in given.items() if value is None and name not in ("max_queued", "max_running")]
    if missing:
        raise InvalidRequestError([Issue(missing[0], f"{missing[0]} cannot be null.")])
    return world.store.access.change_user(user_id, given)
