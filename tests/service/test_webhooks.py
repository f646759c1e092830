"""Webhooks: how messages are signed, when they are tried again, and what the API shows to whom."""

from __future__ import annotations

import base64
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from service.home import ensure_master_secret, read_secret
from service.settings import Settings
from service.store.webhooks import FAILED, PENDING, SENT, Outcome
from service.webhooks import Signer, judge, signed, verify
from tests.service.outbox import GOOD, LOOPBACK
from tests.service.receiver import receiving

SIGNER = Signer("master")
SECRET = SIGNER.secret("wh_1")


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"webhooks": True, "webhook_networks": LOOPBACK})


def test_the_signature_is_that_of_standard_webhooks() -> None:
    secret, body = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", b'{"test": 2432232314}'
    headers = signed(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", body, now=1614265330)
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert verify(secret, headers, body, now=1614265330)


@given(st.binary(min_size=1), st.text(min_size=1), st.binary(), st.integers(0, 10**11), st.floats(-300, 300))
def test_what_was_signed_verifies_and_nothing_else_does(
    key: bytes, id: str, body: bytes, now: int, skew: float
) -> None:
    secret = "whsec_" + base64.b64encode(key).decode()
    headers = signed(secret, id, body, now=now)
    assert verify(secret, headers, body, now=now + skew) is ("." not in id)
    assert verify(secret, {name.upper(): value for name, value in headers.items()}, body, now=now) is ("." not in id)
    assert not verify("whsec_" + base64.b64encode(key + b"x").decode(), headers, body, now=now)
    assert not verify(secret, headers, body + b" ", now=now)
    assert not verify(secret, {**headers, "webhook-id": id + "x"}, body, now=now)
    assert not verify(secret, {**headers, "webhook-timestamp": str(now + 1)}, body, now=now)
    assert not verify(secret, headers, body, now=now + 302) and not verify(secret, headers, body, now=now - 302)


_HEADERS = st.dictionaries(
    st.sampled_from(["webhook-id", "webhook-timestamp", "webhook-signature", "Webhook-Id", "x"]), st.text()
)


@given(_HEADERS, st.binary())
def test_whatever_a_stranger_sends_is_refused_without_a_fault(headers: dict[str, str], body: bytes) -> None:
    assert not verify(SECRET, headers, body)


def test_one_of_several_signatures_is_enough() -> None:
    headers = signed(SECRET, "evt_1", b"{}", now=5)
    headers["webhook-signature"] = f"v1,other v2,x {headers['webhook-signature']}"
    assert verify(SECRET, headers, b"{}", now=5)


def test_a_secret_that_is_none_is_said() -> None:
    with pytest.raises(ValueError):
        verify("whsec_€", signed(SECRET, "evt_1", b"", now=5), b"", now=5)


def test_secrets_follow_from_the_services_and_the_id(home: Path) -> None:
    home.mkdir()
    master = ensure_master_secret(home)
    assert Signer(master).secret("wh_1") == Signer(ensure_master_secret(home)).secret("wh_1")
    assert len({SECRET, SIGNER.secret("wh_2"), Signer(master).secret("wh_1")}) == 3
    assert (home / "secret").stat().st_mode & 0o777 == 0o600


def test_a_delay_doubles_up_to_an_hour() -> None:
    delays = [judge(tries, 500, now=100.0, jitter=0).next_at - 100 for tries in range(11)]
    assert delays == [5, 10, 20, 40, 80, 160, 320, 640, 1280, 2560, 3600]
    assert judge(0, 500, now=0, jitter=1).next_at == pytest.approx(6)
    assert judge(11, 500, now=0, jitter=0) == Outcome(FAILED, 0, "answered 500")


@pytest.mark.parametrize("status", [200, 204, 299])
def test_two_hundreds_are_an_arrival(status: int) -> None:
    assert judge(3, status, now=7, jitter=0) == Outcome(SENT, 7)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (404, "answered 404"),
        (307, "answered 307; redirects are not followed"),
        ("no answer within 10 s", "no answer within 10 s"),
        ("a\x1b[31m\nb\u202ec", "a\\x1b[31m\\x0ab\\x202ec"),
        ("x" * 500, "x" * 200),
    ],
)
def test_anything_else_is_tried_again_and_says_why(answer: int | str, words: str) -> None:
    outcome = judge(0, answer, now=0, jitter=0)
    assert (outcome.state, outcome.error, outcome.gone) == (PENDING, words, False)


def test_gone_means_gone() -> None:
    outcome = judge(0, 410, now=0, jitter=0)
    assert outcome.state == FAILED and outcome.gone


def test_off_means_off(api: TestClient, settings: Settings) -> None:
    object.__setattr__(api.app.state.world, "settings", settings.model_copy(update={"webhooks": False}))  # type: ignore[attr-defined]
    for path, body in (("/v1/webhooks", {"url": GOOD}), ("/v1/webhooks/wh_1/test", None)):
        answer = api.post(path, json=body)
        assert answer.status_code == 403 and answer.json()["code"] == "webhooks_off"
        assert "D2FT_WEBHOOKS=true" in answer.json()["detail"]
    assert api.get("/v1/webhooks").json()["data"] == []


def test_they_are_off_unless_asked_for() -> None:
    assert not Settings().webhooks and Settings().webhook_networks == ()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"url": "http://10.0.0.1/"}, "url"),
        ({"url": "https://user:word@example.com"}, "url"),
        ({"url": ""}, "url"),
        ({"url": "https://" + "a" * 3000}, "url"),
        ({"types": ["job.failed"]}, "url"),
        ({"url": GOOD, "types": []}, "types"),
        ({"url": GOOD, "types": ["job.queued"]}, "types.0"),
        ({"url": GOOD, "secret": "mine"}, "secret"),
    ],
)
def test_a_bad_body_names_its_field(api: TestClient, body: dict[str, Any], param: str) -> None:
    answer = api.post("/v1/webhooks", json=body)
    assert answer.status_code == 422 and answer.json()["param"] == param
    assert answer.json()["errors"][0]["pointer"] == "/" + param.replace(".", "/")


def test_the_secret_is_shown_once_and_kept_nowhere(
    api: TestClient, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with receiving(500) as receiver:
        made = api.post("/v1/webhooks", json={"url": receiver.url}).json()
        secret = made["secret"]
        assert secret.startswith("whsec_") and made["types"] == ["job.succeeded", "job.failed", "job.cancelled"]
        path = f"/v1/webhooks/{made['id']}"
        assert api.post(f"{path}/test").status_code == 202
        receiver.wait(1)
        _until(lambda: api.get(f"{path}/deliveries").json()["data"][0]["tries"] == 1)
        said = [api.get(path).text, api.get("/v1/webhooks").text, api.get(f"{path}/deliveries").text]
        said += [api.delete(path).text, caplog.text]
        assert verify(secret, receiver.hits[0].headers, receiver.hits[0].body)
    assert api.get(path).status_code == 404
    for word in (secret, secret.removeprefix("whsec_"), read_secret(home / "secret") or "?"):
        assert not [text for text in said if word in text]
        assert not [
            file.name
            for file in home.rglob("*")
            if file.name != "secret" and file.is_file() and word.encode() in file.read_bytes()
        ]


def test_another_users_webhook_is_not_there(api: TestClient) -> None:
    ann = _client_of(api, "ann")
    with receiving() as receiver:
        made = api.post("/v1/webhooks", json={"url": receiver.url}).json()
        own = ann("POST", "/v1/webhooks", json={"url": receiver.url}).json()
        path = f"/v1/webhooks/{made['id']}"
        for method, target in (
            ("GET", path),
            ("DELETE", path),
            ("GET", f"{path}/deliveries"),
            ("POST", f"{path}/test"),
        ):
            answer = ann(method, target)
            assert answer.status_code == 404 and answer.json()["code"] == "webhook_not_found"
        assert [one["id"] for one in ann("GET", "/v1/webhooks").json()["data"]] == [own["id"]]
        assert {one["user"] for one in api.get("/v1/webhooks").json()["data"]} == {"ann", made["user"]}
        assert receiver.hits == []


def test_a_cancelled_job_is_told_once_and_only_to_its_owner(api: TestClient, submit: Callable[..., str]) -> None:
    ann = _client_of(api, "ann")
    with receiving() as receiver, receiving() as other:
        secret = api.post("/v1/webhooks", json={"url": receiver.url}).json()["secret"]
        ann("POST", "/v1/webhooks", json={"url": other.url})
        job_id = submit(steps=4)
        api.post(f"/v1/jobs/{job_id}/cancel")
        api.post(f"/v1/jobs/{job_id}/cancel")
        receiver.wait(1)
        time.sleep(0.1)
        (hit,) = receiver.hits
        assert other.hits == []
    assert verify(secret, hit.headers, hit.body) and hit.headers["content-type"] == "application/json"
    body = json.loads(hit.body)
    assert body == {
        "id": hit.headers["webhook-id"],
        "object": "event",
        "created_at": body["created_at"],
        "type": "job.cancelled",
        "data": {"id": job_id},
    }


def test_a_job_that_runs_to_its_end_tells_of_it(server: str, settings: Settings) -> None:
    headers = {"Authorization": f"Bearer {read_secret(settings.home / 'key')}"}
    with receiving() as receiver, httpx2.Client(base_url=server, headers=headers, trust_env=False) as http:
        body = {"url": receiver.url, "types": ["job.running", "job.succeeded"]}
        webhook = http.post("/v1/webhooks", json=body).json()
        job_id = http.post("/v1/jobs", json={"steps": 3}).json()["id"]
        receiver.wait(2, patience_s=20)
        path = f"/v1/webhooks/{webhook['id']}/deliveries"
        _until(lambda: [one["state"] for one in http.get(path).json()["data"]] == ["sent", "sent"])
        told = [json.loads(hit.body) for hit in receiver.hits]
    assert sorted(one["type"] for one in told) == ["job.running", "job.succeeded"]
    assert {one["data"]["id"] for one in told} == {job_id}
    assert all(verify(webhook["secret"], hit.headers, hit.body) for hit in receiver.hits)


def _client_of(api: TestClient, name: str) -> Callable[..., Any]:
    """A user of that name; returns what sends requests with their key."""
    assert api.post("/v1/users", json={"name": name}).status_code == 201
    key = api.post("/v1/keys", json={"name": "k", "user": name, "scopes": ["read", "write"]}).json()["key"]
    return lambda method, path, **options: api.request(
        method, path, headers={"Authorization": f"Bearer {key}"}, **options
    )


def _until(holds: Callable[[], bool], patience_s: float = 10) -> None:
    end = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.02)
