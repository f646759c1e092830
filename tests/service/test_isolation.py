"""Two users, every object: what is one's does not exist for the other, by any route, in any list, by any search.

The routes come from the application: one that is added with an id in its path and without a case here fails.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from scheduler.devices import DeviceRecord
from service.auth import RUN_PREFIX
from service.schemas import WebhookBody
from service.settings import Settings
from service.store import Attempt
from service.webhooks import Sender
from tests.service.conftest import write_book
from tests.service.fake_driver import chart
from tests.service.test_auth import METHODS
from tests.service.walk import Found, key_for, store_of, walk

MARK = "annsown"  # in everything of hers that has a text
# Paths whose ids name nothing that a user owns.
SHARED = {"/v1/models/{name}", "/v1/ui/static/{path:path}"}
ENDLESS = {"/ui/live"}  # tests/web has those
# What the others get: objects that are not theirs are not there, users are the administrators'.
REFUSED = {"job_id": 404, "sweep_id": 404, "key_id": 404, "dataset_id": 404, "webhook_id": 404, "user_id": 403}


@pytest.fixture
def settings(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """With webhooks, and nobody who sends what waits in them."""

    async def idle(sender: Sender) -> None:
        pass

    monkeypatch.setattr(Sender, "run", idle)
    return settings.model_copy(update={"webhooks": True})


@pytest.fixture
def ann(api: TestClient) -> dict[str, str]:
    return key_for(api, f"ann-{MARK}")


@pytest.fixture
def bob(api: TestClient) -> dict[str, str]:
    return key_for(api, "bob")


@pytest.fixture
def ids(api: TestClient, ann: dict[str, str], settings: Settings, record: DeviceRecord) -> dict[str, str]:
    """One of everything that Ann may have, by the name that it has in a path."""
    body = {"name": MARK, "metadata": {MARK: MARK}}
    job_id = api.post("/v1/jobs", json=body, headers=ann).json()["id"]
    attempt = store_of(api).queue.claim(1)
    assert attempt and attempt.job_id == job_id
    _run(api, attempt, settings)
    body = {"name": MARK, "metadata": {MARK: MARK}, "space": {"seed": {"values": [1, 2]}}}
    sweep_id = api.post("/v1/sweeps", json=body, headers=ann).json()["id"]
    driving = store_of(api).queue.claim_sweep(1)
    assert driving and driving.job_id == sweep_id
    _run(api, driving, settings)
    write_book(settings.devices_file, record)
    for label in ("cat", "dog"):
        folder = settings.home / MARK / "train" / label
        folder.mkdir(parents=True)
        (folder / "0.jpg").write_bytes(b"jpg")
    dataset = {"name": MARK, "uri": f"folder://{settings.home}/{MARK}"}
    me = api.get("/v1/me", headers=ann).json()
    hook = store_of(api).webhooks.make(WebhookBody(url=f"https://{MARK}.example"), owner=me["user"]["id"])
    store_of(api).webhooks.test(hook.id, owner=None)
    return {
        "job_id": job_id,
        "sweep_id": sweep_id,
        "name": f"{MARK}.bin",
        "dataset_id": api.post("/v1/datasets", json=dataset, headers=ann).json()["id"],
        "webhook_id": hook.id,
        "key_id": me["key_id"],
        "user_id": me["user"]["id"],
        "tab": "overview",
    }


def _run(api: TestClient, attempt: Attempt, settings: Settings) -> None:
    """Have a run leave everything that a run can leave."""
    directory = settings.attempt_dir(attempt.job_id, 1)
    (directory / "logs").mkdir(parents=True)
    (directory / "logs" / "driver.log").write_text(MARK)
    (directory / "result").mkdir()
    (directory / "result" / "x").write_text(MARK)
    artifact = {"name": f"{MARK}.bin", "path": str(directory / "result" / "x"), "bytes": 7, "sha256": "0" * 64}
    said: list[tuple[str, dict[str, Any]]] = [
        ("plan.created", {"version": 1, "devices": [{"name": "gpu-0"}], "mark": MARK}),
        ("timeline", {**chart(), "step": 3, "window": 1, "fields": [MARK]}),
        ("metrics", {"step": 1, MARK: 1.0}),
        ("checkpoint.saved", {**artifact, "name": MARK, "step": 1}),
        ("artifact.ready", artifact),
        ("ledger", {"rows": [MARK]}),
    ]
    lines = [{"seq": n, "at": 1.0, "type": type, "data": data} for n, (type, data) in enumerate(said, 1)]
    store_of(api).attempts.absorb(attempt, lines, len(lines))


def with_ids(api: TestClient) -> list[Found]:
    named = [found for found in walk(api.app) if found.names and not found.path.startswith(RUN_PREFIX)]
    return [found for found in named if found.case[1] not in SHARED]


def ask(api: TestClient, headers: dict[str, str], method: str, path: str) -> Any:
    return api.request(method, path, headers=headers, json={} if method in ("POST", "PUT", "PATCH") else None)


def test_every_id_in_a_path_has_an_owner(api: TestClient, ids: dict[str, str]) -> None:
    for found in with_ids(api):
        assert found.names[0] in REFUSED and set(found.names) <= set(ids), f"say here whose {found.path} is"
    assert {found.case[1] for found in walk(api.app)} >= SHARED


def test_what_is_anothers_is_not_there(
    api: TestClient, ids: dict[str, str], ann: dict[str, str], bob: dict[str, str]
) -> None:
    before = _all_of(api, ann, ids)
    for found in with_ids(api):
        theirs = found.fill(**ids)
        none = found.fill(**dict.fromkeys(ids, "none_x"))
        for method in METHODS:
            answer = ask(api, bob, method, theirs)
            if method != found.method and answer.status_code == 405:
                continue
            assert answer.status_code == REFUSED[found.names[0]], (method, theirs, answer.text)
            assert MARK not in answer.text.replace(theirs, ""), "not even in what is said of it"
            unknown = ask(api, bob, method, none)
            assert (unknown.status_code, _code(unknown)) == (answer.status_code, _code(answer))
    assert _all_of(api, ann, ids) == before, "and nothing has happened to it"


def test_the_owner_reaches_what_is_theirs_by_the_same_routes(
    api: TestClient, ids: dict[str, str], ann: dict[str, str]
) -> None:
    """Otherwise what the others are refused would prove nothing."""
    last = {"DELETE": 1}
    for found in sorted(with_ids(api), key=lambda each: (each.names[0] == "key_id", last.get(each.method, 0))):
        if not found.path.startswith("/v1") or found.names[0] == "user_id":
            continue
        answer = ask(api, ann, found.method, found.fill(**ids))
        assert answer.status_code in (200, 202, 409), (found, answer.text)


def test_an_administrators_key_without_that_scope_reaches_no_further(api: TestClient, ids: dict[str, str]) -> None:
    boss = key_for(api, "boss", "read", "write", role="admin")
    for found in with_ids(api):
        answer = ask(api, boss, found.method, found.fill(**ids))
        assert answer.status_code == REFUSED[found.names[0]], (found, answer.text)
    everything = dict(api.headers)
    for found in with_ids(api):
        if found.method == "GET" and found.path.startswith("/v1"):
            assert ask(api, everything, "GET", found.fill(**ids)).status_code == 200, found


def test_what_is_anothers_is_in_no_list(
    api: TestClient, ids: dict[str, str], ann: dict[str, str], bob: dict[str, str]
) -> None:
    lists = [found.path for found in walk(api.app) if not found.names and found.method == "GET"]
    lists = [path for path in lists if path not in ENDLESS]
    assert len(lists) > 15
    hers = [MARK, *ids.values()]
    for path in lists:
        text = api.get(path, headers=bob).text
        assert not [word for word in hers if word in text], path
    assert MARK in api.get("/v1/jobs", headers=ann).text and MARK in api.get("/v1/datasets", headers=ann).text
    assert MARK in api.get("/v1/webhooks", headers=ann).text and ids["key_id"] in api.get("/v1/keys", headers=ann).text
    for path in ("/v1/jobs", "/v1/datasets", "/v1/webhooks", "/v1/keys", "/v1/users"):
        assert any(word in api.get(path).text for word in hers), "an administrator sees everybody's"


@pytest.mark.parametrize(
    "params",
    [
        {"search": MARK},
        {"search": ""},
        {"search": "%"},
        {"owner": f"ann-{MARK}"},
        {"owner": "bob"},
        {"owner": ""},
        {"metadata[annsown]": MARK},
        {"status": "running"},
        {"limit": "100", "order": "asc"},
        {"created_after": "0"},
    ],
)
def test_no_question_finds_what_is_anothers(
    api: TestClient, ids: dict[str, str], bob: dict[str, str], params: dict[str, str]
) -> None:
    for path in ("/v1/jobs", "/v1/sweeps", "/v1/datasets"):
        assert api.get(path, params=params, headers=bob).json()["data"] == []


def test_no_cursor_tells_whether_anothers_object_is_there(
    api: TestClient, ids: dict[str, str], bob: dict[str, str]
) -> None:
    for path, name in (("/v1/jobs", "job_id"), ("/v1/sweeps", "sweep_id"), ("/v1/datasets", "dataset_id")):
        hers = api.get(path, params={"after": ids[name]}, headers=bob)
        none = api.get(path, params={"after": "none_x"}, headers=bob)
        assert (hers.status_code, hers.json()["code"]) == (none.status_code, none.json()["code"])


def test_devices_name_ones_own_jobs_alone(
    api: TestClient, ids: dict[str, str], ann: dict[str, str], bob: dict[str, str]
) -> None:
    def users(headers: dict[str, str]) -> list[str]:
        found: list[str] = api.get("/v1/devices", headers=headers).json()["data"][0]["used_by"]
        return found

    assert users(ann) == [ids["job_id"]] and users(bob) == []
    assert users(dict(api.headers)) == [ids["job_id"]]


def test_names_and_keys_of_another_are_free(
    api: TestClient, ids: dict[str, str], ann: dict[str, str], bob: dict[str, str], settings: Settings
) -> None:
    other = settings.home / "bobs"
    for label in ("cat", "dog"):
        (other / "train" / label).mkdir(parents=True)
        (other / "train" / label / "0.jpg").write_bytes(b"jpg")
    asked = {"dataset": f"dataset:{MARK}"}
    assert api.post("/v1/jobs", json=asked, headers=bob).json()["code"] == "dataset_not_registered"
    assert api.post("/v1/datasets", json={"name": MARK, "uri": f"folder://{other}"}, headers=bob).status_code == 201
    assert api.post("/v1/jobs", json=asked, headers=bob).json()["dataset"].endswith("/bobs")
    once = {"Idempotency-Key": "same"}
    answers = [api.post("/v1/jobs", json={"seed": seed}, headers={**who, **once}) for seed, who in ((1, ann), (2, bob))]
    assert [answer.status_code for answer in answers] == [201, 201]
    assert answers[0].json()["id"] != answers[1].json()["id"] and "idempotency-replayed" not in answers[1].headers


def test_the_token_of_one_run_tells_nothing_of_another(
    api: TestClient, ids: dict[str, str], bob: dict[str, str], submit: Callable[..., str]
) -> None:
    made = api.post("/v1/jobs", json={}, headers=bob).json()["id"]
    attempt = store_of(api).queue.claim(10)
    assert attempt and attempt.job_id == made
    failed = {"status": "failed", "error": {"fault": "user"}, "job_id": ids["job_id"]}
    line = {"seq": 99, "at": 1.0, "type": "outcome", "data": failed}
    body = {"attempt": 1, "job_id": ids["job_id"], "events": [{**line, "job_id": ids["job_id"]}]}
    run = {"Authorization": f"Bearer {attempt.token}"}
    assert api.post("/v1/runs/events", json=body, headers=run).status_code == 200
    assert api.get(f"/v1/jobs/{made}").json()["status"] == "failed"
    assert api.get(f"/v1/jobs/{ids['job_id']}").json()["status"] not in ("failed", "cancelled")


def _code(answer: Any) -> str | None:
    if answer.headers.get("content-type", "").startswith("text/html"):
        return "a page"
    return answer.json()["code"] if answer.text else None


def _all_of(api: TestClient, headers: dict[str, str], ids: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for each in with_ids(api):
        if each.method == "GET" and each.path.startswith("/v1"):
            answer = ask(api, headers, "GET", each.fill(**ids))
            assert answer.status_code == 200, (each, answer.text)
            found[each.path] = answer.text
    keys = api.get("/v1/keys", headers=headers).json()["data"]
    found["keys"] = [(key["id"], key["revoked_at"], key["scopes"]) for key in keys]
    found["me"] = api.get("/v1/me", headers=headers).json()
    return found
