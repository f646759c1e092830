"""Users and keys: what each scope opens, keys that end at once, and who may change what."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.auth import RUN_PREFIX, SIGN_IN, is_public
from service.errors import ConflictError
from service.schemas import KeyBody, UserBody
from service.store import Store
from service.store.access import FIRST_USER
from tests.service.test_auth import HOST, METHODS, all_paths
from tests.service.walk import UNSAFE, key_for, statuses, store_of, walk


def key_id(api: TestClient, headers: dict[str, str]) -> str:
    return str(api.get("/v1/me", headers=headers).json()["key_id"])


def user_id(api: TestClient, name: str) -> str:
    return next(str(user["id"]) for user in api.get("/v1/users").json()["data"] if user["name"] == name)


def answers(api: TestClient, headers: dict[str, str], asked: list[tuple[str, str]]) -> dict[tuple[str, str], int]:
    return asyncio.run(statuses(api.app, asked, {**HOST, **headers}))


def test_a_key_that_only_reads_changes_nothing_anywhere(api: TestClient) -> None:
    reader = key_for(api, "ann", "read")
    unsafe = [method for method in METHODS if method not in ("GET", "HEAD", "OPTIONS")]
    assert set(UNSAFE) <= set(unsafe)
    of_runs = {path for path in all_paths(api) if path.startswith(RUN_PREFIX)}
    asked = [(method, path) for path in all_paths(api) - of_runs - {SIGN_IN} for method in unsafe]
    assert set(answers(api, reader, asked).values()) == {403}
    assert set(answers(api, reader, [(method, path) for path in of_runs for method in METHODS]).values()) == {401}
    for path in ("/v1/jobs", "/v1/me", "/v1/keys", "/v1/devices", "/v1/models", "/v1/datasets", "/openapi.json"):
        assert api.get(path, headers=reader).status_code == 200
    assert api.post("/v1/jobs", json={}, headers=reader).json()["code"] == "scope_missing"


def test_a_key_that_only_writes_reads_nothing_anywhere(api: TestClient) -> None:
    writer = key_for(api, "ann", "write")
    of_runs = {path for path in all_paths(api) if path.startswith(RUN_PREFIX)}
    others = {path for path in all_paths(api) - of_runs if not is_public("GET", path)}
    asked = [(method, path) for path in others for method in ("GET", "HEAD")]
    assert set(answers(api, writer, asked).values()) == {403}
    assert api.post("/v1/jobs", json={}, headers=writer).status_code == 201


@pytest.mark.parametrize(("role", "scopes"), [("member", ("read", "write")), ("admin", ("read", "write"))])
def test_only_an_administrators_key_with_that_scope_opens_the_administrators_routes(
    api: TestClient, role: str, scopes: tuple[str, ...]
) -> None:
    weak = key_for(api, "ann", *scopes, role=role)
    theirs = [found.fill() for found in walk(api.app) if found.by_admin]
    assert {"/v1/users", "/users", "/v1/users/x", "/users/x"} == set(theirs)
    asked = [(method, f"{path}{end}") for path in theirs for method in METHODS for end in ("", "/", "/y/z")]
    assert set(answers(api, weak, asked).values()) == {403}
    assert api.get("/v1/users", headers=weak).json()["code"] == "admin_only"
    strong = key_for(api, "ann", "read", "write", "admin") if role == "admin" else dict(api.headers)
    assert api.get("/v1/users", headers=strong).status_code == 200


def test_a_key_is_shown_once_and_kept_nowhere(api: TestClient, home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made = api.post("/v1/keys", json={"name": "ci"}).json()
    key, headers = made["key"], {"Authorization": f"Bearer {made['key']}"}
    assert len(key) > 40 and key.startswith(made["hint"]) and len(made["hint"]) < 10
    answers = [api.get(path, headers=headers) for path in ("/v1/keys", "/v1/me", "/v1/jobs", "/metrics", "/v1/nothing")]
    answers += [api.delete(f"/v1/keys/{made['id']}"), api.get("/v1/keys"), api.get("/v1/users")]
    assert not [answer.url for answer in answers if key in answer.text or key in str(answer.headers)]
    assert all(each["key"] is None for each in api.get("/v1/keys").json()["data"])
    written = [path for path in home.rglob("*") if path.is_file() and key.encode() in path.read_bytes()]
    assert not written and key not in "".join(capfd.readouterr())


def test_a_key_ends_at_once_when_it_is_revoked(api: TestClient) -> None:
    ann = key_for(api, "ann")
    mine = key_id(api, ann)
    revoked = api.delete(f"/v1/keys/{mine}", headers=ann)
    assert revoked.status_code == 200 and revoked.json()["revoked_at"]
    for path in ("/v1/jobs", "/v1/me", f"/v1/keys/{mine}"):
        assert api.get(path, headers=ann).status_code == 401
    assert api.delete(f"/v1/keys/{mine}").json() == revoked.json(), "harmless when asked again"


def test_a_key_that_is_revoked_while_it_is_looked_up_is_not_remembered(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = store.access.make_key(KeyBody(), user_id=FIRST_USER)
    assert made.key
    monkeypatch.setattr(store.access, "_note_use", lambda *_: store.access.revoke(made.id, owner=None))
    assert store.access.caller(made.key), "it was looked up before"
    assert store.access.known(made.key) is None and store.access.caller(made.key) is None


def test_a_key_ends_by_itself_when_it_has_expired(api: TestClient, home: Path) -> None:
    made = api.post("/v1/keys", json={"expires_in_s": 60}).json()
    headers = {"Authorization": f"Bearer {made['key']}"}
    assert api.get("/v1/me", headers=headers).status_code == 200 and made["expires_at"] >= made["created_at"] + 59
    until = time.time() + 1.5
    with sqlite3.connect(home / "d2ft.db") as store:
        store.execute("UPDATE api_keys SET expires_at = ? WHERE id = ?", (until, made["id"]))
    store.close()
    store_of(api).access._known = {}
    while time.time() < until - 0.3:
        assert api.get("/v1/me", headers=headers).status_code == 200
        time.sleep(0.1)
    time.sleep(max(0.0, until - time.time()))
    assert api.get("/v1/me", headers=headers).status_code == 401


def test_keys_of_a_disabled_user_open_nothing_until_they_are_enabled(api: TestClient) -> None:
    keys = [key_for(api, "ann"), key_for(api, "ann", "read")]
    ann = f"/v1/users/{user_id(api, 'ann')}"
    assert api.patch(ann, json={"disabled": True}).json()["disabled"] is True
    assert [api.get("/v1/me", headers=key).status_code for key in keys] == [401, 401]
    assert api.patch(ann, json={"disabled": False}).json()["disabled"] is False
    assert [api.get("/v1/me", headers=key).status_code for key in keys] == [200, 200]


def test_an_administrator_who_is_none_any_more_has_lost_it_at_once(api: TestClient) -> None:
    bob = key_for(api, "bob", "read", "write", "admin", role="admin")
    assert api.get("/v1/users", headers=bob).status_code == 200
    assert api.patch(f"/v1/users/{user_id(api, 'bob')}", json={"role": "member"}).status_code == 200
    assert api.get("/v1/users", headers=bob).status_code == 403
    assert api.get("/v1/keys", headers=bob).json()["data"][0]["user"] == "bob"
    assert api.patch(f"/v1/users/{user_id(api, 'bob')}", json={"role": "admin"}, headers=bob).status_code == 403


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"scopes": ["admin"]}, 403, "scope_missing", "scopes"),
        ({"scopes": ["read", "write", "admin"]}, 403, "scope_missing", "scopes"),
        ({"scopes": ["read"]}, 403, "scope_missing", "scopes"),
        ({"user": "boss", "scopes": ["write"]}, 403, "admin_only", "user"),
        ({"user": "nobody", "scopes": ["write"]}, 403, "admin_only", "user"),
        ({"role": "admin"}, 422, "invalid_request", "role"),
        ({"user_id": "user_first"}, 422, "invalid_request", "user_id"),
        ({"scopes": []}, 422, "invalid_request", "scopes"),
        ({"scopes": ["root"]}, 422, "invalid_request", "scopes.0"),
        ({"expires_in_s": 0}, 422, "invalid_request", "expires_in_s"),
    ],
)
def test_a_key_gives_no_more_than_it_has(
    api: TestClient, body: dict[str, Any], status: int, code: str, param: str
) -> None:
    key_for(api, "boss", role="admin")
    ann = key_for(api, "ann", "write")
    before = api.get("/v1/keys").json()["data"]
    answer = api.post("/v1/keys", json=body, headers=ann)
    assert (answer.status_code, answer.json()["code"], answer.json()["param"]) == (status, code, param)
    assert [key["id"] for key in api.get("/v1/keys").json()["data"]] == [key["id"] for key in before]


def test_no_key_of_a_member_is_an_administrators(api: TestClient) -> None:
    key_for(api, "ann")
    answer = api.post("/v1/keys", json={"user": "ann", "scopes": ["admin"]})
    assert answer.status_code == 422 and answer.json()["code"] == "not_admin"
    assert api.post("/v1/keys", json={"user": "nobody"}).status_code == 404


def test_a_key_cannot_be_changed(api: TestClient) -> None:
    mine = key_id(api, dict(api.headers))
    for method in ("GET", "POST", "PUT", "PATCH"):
        answer = api.request(method, f"/v1/keys/{mine}", json={"scopes": ["read", "write", "admin"]})
        assert answer.status_code == 405 and answer.headers["allow"] == "DELETE"


def test_the_last_administrator_stays(api: TestClient) -> None:
    first = f"/v1/users/{api.get('/v1/me').json()['user']['id']}"
    for change in ({"role": "member"}, {"disabled": True}):
        answer = api.patch(first, json=change)
        assert answer.status_code == 409 and answer.json()["code"] == "last_admin"
    key_for(api, "bob", role="admin")
    bob = f"/v1/users/{user_id(api, 'bob')}"
    assert api.patch(bob, json={"disabled": True}).status_code == 200
    assert api.patch(first, json={"role": "member"}).status_code == 409, "a disabled one is none"
    assert api.patch(bob, json={"disabled": False}).status_code == 200
    assert api.patch(first, json={"role": "member"}).status_code == 200
    assert api.get("/v1/users").status_code == 403


@pytest.mark.parametrize("on", ["sqlite", "postgresql"])
def test_two_administrators_cannot_remove_each_other(on: str, home: Path, request: pytest.FixtureRequest) -> None:
    home.mkdir()
    url = f"sqlite:///{home / 'd2ft.db'}" if on == "sqlite" else request.getfixturevalue("database")
    store = Store(url)
    ids = ["user_first", store.access.make_user(UserBody(name="bob", role="admin")).id]
    try:
        for _ in range(10):
            start = threading.Barrier(2)

            def demote(each: str, start: threading.Barrier = start) -> None:
                start.wait()
                with suppress(ConflictError):
                    store.access.change_user(each, {"role": "member"})

            threads = [threading.Thread(target=demote, args=(each,)) for each in ids]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            left = [user.id for user in store.access.users() if user.role == "admin"]
            assert left
            for each in ids:
                store.access.change_user(each, {"role": "admin"})
    finally:
        store.close()


@pytest.mark.parametrize("name", ["role", "max_priority", "share", "disabled"])
def test_what_a_user_must_have_cannot_be_taken_away(api: TestClient, name: str) -> None:
    key_for(api, "ann")
    answer = api.patch(f"/v1/users/{user_id(api, 'ann')}", json={name: None})
    assert answer.status_code == 422 and answer.json()["param"] == name


def test_limits_are_changed_and_given_back_to_the_default(api: TestClient) -> None:
    key_for(api, "ann", max_queued=3)
    ann = f"/v1/users/{user_id(api, 'ann')}"
    assert api.patch(ann, json={"share": 2.5, "max_running": 0}).json()["max_queued"] == 3
    changed = api.patch(ann, json={"max_queued": None}).json()
    assert (changed["max_queued"], changed["max_running"], changed["share"]) == (None, 0, 2.5)
    assert api.patch(ann, json={}).json() == changed
    assert api.post("/v1/users", json={"name": "ann"}).json()["code"] == "user_exists"
    assert api.patch("/v1/users/nobody", json={}).status_code == 404
