"""Commands about who one is: log in to a service, its keys, its users."""

from __future__ import annotations

import sys
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from service.cli import talk
from service.cli.frame import Json, Url, Yes, command, confirm, connected, group
from service.cli.profile import Profile, forget_profile, profile_path, write_profile
from service.client import Client
from service.errors import NotFoundError
from service.schemas import User
from service.settings import LOOPBACK

_DAY_S = 86400
_STANDARD = "default"

keys_app = group(__name__, "keys", "API keys: list, add, revoke.")
users_app = group(__name__, "users", "Users and their limits; for administrators.")

Role = Annotated[str | None, typer.Option(help="member or admin.")]
MaxQueued = Annotated[str | None, typer.Option(help="Jobs that may wait: a number, or 'default'.")]
MaxRunning = Annotated[str | None, typer.Option(help="Jobs that may run at once: a number, or 'default'.")]
MaxPriority = Annotated[int | None, typer.Option(help="Highest priority of a job.")]
Share = Annotated[float | None, typer.Option(help="With twice the share, jobs go first twice as often.")]


@command()
def login(
    url: Annotated[str, typer.Argument(metavar="URL", help="The service, like https://gpu.example:7421.")],
    json_: Json = False,
) -> None:
    """Keep a service and its key for this user; the key is asked for, or read from stdin."""
    key = _read_key()
    with Client(url, key) as client:
        me = client.me()
    path = write_profile(Profile(url, key))
    if urlsplit(url).scheme == "http" and urlsplit(url).hostname not in LOOPBACK:
        talk.complain("warning: over http the key travels in clear; use https.")
    if json_:
        talk.put_json(me)
    else:
        talk.say(f"Logged in as {me.user.name} ({', '.join(me.scopes)}); kept in {path}")


@command()
def logout(json_: Json = False) -> None:
    """Forget what `login` kept; the key itself stays valid."""
    was_there = forget_profile()
    if json_:
        talk.put_json({"path": str(profile_path()), "was_there": was_there})
    talk.say("Forgotten." if was_there else "Nothing was kept.")


@command("list", of=keys_app)
def list_keys(url: Url = None, json_: Json = False) -> None:
    """List keys, newest first; never the keys themselves."""
    with connected(url) as client:
        found = client.keys()
    if json_:
        talk.put_json_list(found)
        return
    rows = (
        (key.id, key.name, key.user, f"{key.hint}…", " ".join(key.scopes), _validity(key), talk.moment(key.used_at))
        for key in found
    )
    talk.put_rows(("id", "name", "user", "key", "scopes", "state", "used"), rows)


@command("add", of=keys_app)
def add_key(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What it is for.")] = "key",
    scope: Annotated[
        list[str] | None, typer.Option(help="read, write or admin; may be repeated (read and write).")
    ] = None,
    days: Annotated[float | None, typer.Option(help="Valid for so many days (for ever).")] = None,
    user: Annotated[str | None, typer.Option(help="For this user; for administrators.")] = None,
    url: Url = None,
    json_: Json = False,
) -> None:
    """Make a key, and print it: nothing shows it again."""
    expires_in_s = None if days is None else round(days * _DAY_S)
    body = {"name": name, "scopes": scope, "expires_in_s": expires_in_s, "user": user}
    with connected(url) as client:
        made = client.make_key(_given(body))
    if json_:
        talk.put_json(made)
        return
    talk.say(f"{made.id}, a key of {made.user} for {' and '.join(made.scopes)}:")
    talk.put(made.key or "")


@command("revoke", of=keys_app)
def revoke_key(
    key: Annotated[str, typer.Argument(metavar="KEY_ID", help="The key's id, as `keys list` shows it.")],
    yes: Yes = False,
    url: Url = None,
    json_: Json = False,
) -> None:
    """End a key at once, for good."""
    confirm(f"Revoke {key}? Whoever uses it is locked out.", yes=yes)
    with connected(url) as client:
        found = client.revoke_key(key)
    talk.put_json(found) if json_ else talk.put(f"{found.id}  revoked")


@command("list", of=users_app)
def list_users(url: Url = None, json_: Json = False) -> None:
    """List users and their limits."""
    with connected(url) as client:
        found = client.users()
    talk.put_json_list(found) if json_ else _put_users(found)


@command("add", of=users_app)
def add_user(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Letters, digits and . _ @ -")],
    role: Role = None,
    max_queued: MaxQueued = None,
    max_running: MaxRunning = None,
    max_priority: MaxPriority = None,
    share: Share = None,
    url: Url = None,
    json_: Json = False,
) -> None:
    """Make a user, who has no key yet."""
    limits = _limits(role, max_queued, max_running, max_priority, share)
    with connected(url) as client:
        made = client.make_user({"name": name, **limits})
    talk.put_json(made) if json_ else talk.put(made.id)
    talk.say(f"Make a key with: d2ft keys add --user {made.name}")


@command("set", of=users_app)
def set_user(
    user: Annotated[str, typer.Argument(metavar="USER", help="Name or id.")],
    role: Role = None,
    max_queued: MaxQueued = None,
    max_running: MaxRunning = None,
    max_priority: MaxPriority = None,
    share: Share = None,
    disabled: Annotated[
        bool | None, typer.Option("--disable/--enable", help="Whether the user's keys open nothing; jobs go on.")
    ] = None,
    url: Url = None,
    json_: Json = False,
) -> None:
    """Change a user's role or limits, or lock them out."""
    change = _limits(role, max_queued, max_running, max_priority, share)
    if disabled is not None:
        change["disabled"] = disabled
    if not change:
        raise typer.BadParameter("say what is to change", param_hint="USER")
    with connected(url) as client:
        found = client.change_user(_user_id(client, user), change)
    talk.put_json(found) if json_ else _put_users([found])


def _read_key() -> str:
    """From a person without showing it, or the first line of stdin; an argument would be seen by everybody."""
    asked = sys.stdin.isatty()
    key = str(typer.prompt("API key", hide_input=True, err=True) if asked else sys.stdin.readline()).strip()
    if not key or not key.isascii() or not key.isprintable():
        raise typer.BadParameter("no key came; type it, or send it to stdin", param_hint="URL")
    return key


def _user_id(client: Client, user: str) -> str:
    found = next((each.id for each in client.users() if user in (each.id, each.name)), None)
    if found is None:
        raise NotFoundError(f"There is no user {user}.", code="user_not_found", param="user")
    return found


def _limits(
    role: str | None, max_queued: str | None, max_running: str | None, max_priority: int | None, share: float | None
) -> dict[str, Any]:
    limits: dict[str, Any] = _given({"role": role, "max_priority": max_priority, "share": share})
    for name, text in (("max_queued", max_queued), ("max_running", max_running)):
        if text is not None:
            limits[name] = _number(text, f"--{name.replace('_', '-')}")
    return limits


def _number(text: str, flag: str) -> int | None:
    if text == _STANDARD:
        return None
    if not text.isdecimal():
        raise typer.BadParameter(f"'{text}' is neither a number nor '{_STANDARD}'", param_hint=flag)
    return int(text)


def _given(body: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if value not in (None, [])}


def _validity(key: Any) -> str:
    if key.revoked_at is not None:
        return "revoked"
    return "valid" if key.expires_at is None else f"until {talk.moment(key.expires_at)}"


def _put_users(users: list[User]) -> None:
    rows = (
        (
            user.id,
            user.name,
            user.role,
            _STANDARD if user.max_queued is None else user.max_queued,
            _STANDARD if user.max_running is None else user.max_running,
            user.max_priority,
            user.share,
            "disabled" if user.disabled else "",
        )
        for user in users
    )
    talk.put_rows(("id", "name", "role", "queued", "running", "priority", "share", ""), rows)
