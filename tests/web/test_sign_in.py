"""Signing in: what a cookie is worth, and what it is not."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from service.home import read_secret
from service.sessions import AGE_S, COOKIE, Sessions
from service.settings import Settings
from tests.web.conftest import HTML, OURS, sign_in


def test_a_key_becomes_a_cookie_that_scripts_and_other_sites_do_not_get(api: TestClient, settings: Settings) -> None:
    key = read_secret(settings.home / "key") or ""
    answer = api.post("/ui/sign-in", data={"key": f" {key}\n", "next": "/ui/devices"}, follow_redirects=False)
    assert answer.status_code == 303 and answer.headers["location"] == "/ui/devices"
    told = answer.headers["set-cookie"].lower()
    assert "httponly" in told and "samesite=strict" in told and "path=/" in told and f"max-age={AGE_S}" in told
    assert key not in answer.headers["set-cookie"] and key not in answer.text


def test_a_wrong_key_is_said_to_be_wrong_and_is_not_shown(api: TestClient) -> None:
    answer = api.post("/ui/sign-in", data={"key": "d2ft_wrong"}, follow_redirects=False)
    assert answer.status_code == 401 and "no key of this service" in answer.text
    assert "d2ft_wrong" not in answer.text and "set-cookie" not in answer.headers


@pytest.mark.parametrize("to", ["//evil.example", "https://evil.example", "/\\evil.example", "javascript:x", "/a\r\nb"])
def test_who_signs_in_stays_here(api: TestClient, settings: Settings, to: str) -> None:
    key = read_secret(settings.home / "key") or ""
    answer = api.post("/ui/sign-in", data={"key": key, "next": to}, follow_redirects=False)
    assert answer.headers["location"] == "/"


def test_nobody_is_shown_where_to_sign_in_and_programs_are_told(api: TestClient) -> None:
    del api.headers["Authorization"]
    visit = api.get("/?search=a%26b", headers=HTML, follow_redirects=False)
    assert visit.status_code == 303 and visit.headers["location"] == "/ui/sign-in?next=/%3Fsearch%3Da%2526b"
    assert api.get("/", headers={"Accept": "*/*"}).status_code == 401
    assert api.get("/v1/jobs", headers=HTML).status_code == 401


def test_a_link_on_another_site_leads_here_by_way_of_a_visit_of_our_own(api: TestClient) -> None:
    del api.headers["Authorization"]
    linked = api.get('/?search="><b>', headers={**HTML, "Sec-Fetch-Site": "cross-site"}, follow_redirects=False)
    assert linked.status_code == 200 and 'http-equiv="refresh"' in linked.text and "<b>" not in linked.text
    framed = {**HTML, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"}
    assert api.get("/", headers=framed).status_code == 403
    assert "frame-ancestors 'none'" in linked.headers["content-security-policy"]


def test_changes_by_cookie_come_from_our_pages_alone(visitor: TestClient, submit: object) -> None:
    body = {"steps": 2}
    assert visitor.post("/v1/jobs", json=body, headers={"Sec-Fetch-Site": "same-origin"}).status_code == 201
    assert visitor.post("/v1/jobs", json=body, headers=OURS).status_code == 201
    assert visitor.post("/v1/jobs", json=body).json()["code"] == "foreign_origin"
    foreign = {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"}
    assert visitor.post("/v1/jobs", json=body, headers=foreign).json()["code"] == "foreign_origin"


def test_a_cookie_ends_with_its_key_and_at_its_age(api: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    made = api.post("/v1/keys", json={"name": "laptop", "scopes": ["read"]}).json()
    first = api.headers["Authorization"]
    sign_in(api, made["key"])
    assert api.get("/", headers=HTML).status_code == 200
    refused = api.post("/v1/jobs", json={}, headers=OURS)
    assert refused.status_code == 403 and refused.json()["code"] == "scope_missing"
    with monkeypatch.context() as later:
        later.setattr(time, "time", lambda now=time.time: now() + AGE_S + 5)
        assert api.get("/", headers=HTML, follow_redirects=False).status_code == 303
    api.delete(f"/v1/keys/{made['id']}", headers={"Authorization": first})
    assert api.get("/", headers=HTML, follow_redirects=False).status_code == 303


def test_signing_out_takes_the_cookie_away(visitor: TestClient) -> None:
    assert visitor.post("/ui/sign-out", headers=OURS, follow_redirects=False).status_code == 303
    assert visitor.get("/", headers=HTML, follow_redirects=False).status_code == 303


def test_a_cookie_opens_nothing_for_runs(visitor: TestClient) -> None:
    assert visitor.post("/v1/runs/events", json={"attempt": 1}, headers=OURS).json()["code"] == "run_unknown"


@given(st.text(max_size=200))
def test_no_other_cookie_is_taken(text: str) -> None:
    ours = Sessions("secret")
    assert ours.key_id(text) is None and ours.key_id(f"{COOKIE}={text}") is None
    made = ours.cookie_of("key_1")
    assert ours.key_id(f"a=b; {COOKIE}={made}") == "key_1"
    assert Sessions("another").key_id(f"{COOKIE}={made}") is None
    assert ours.key_id(f"{COOKIE}={made[:-1]}") is None
