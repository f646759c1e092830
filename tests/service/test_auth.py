"""The door: closed unless opened by name, for every route and method there is."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi.routing import APIRoute
from starlette.testclient import TestClient

from service.auth import PUBLIC
from service.home import read_secret
from service.settings import Settings

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")


def paths(api: TestClient) -> list[str]:
    found = {"/openapi.json", "/docs", "/nothing", "/v1/nothing", "/"}
    for schema_path in api.get("/openapi.json").json()["paths"]:
        found.add(schema_path)
        found.add(schema_path.removeprefix("/v1"))
    return sorted(path.format(job_id="ftjob_x", name="a") for path in found)


def test_the_walk_sees_every_route(api: TestClient) -> None:
    def leaves(routes):  # type: ignore[no-untyped-def]
        for route in routes:
            if isinstance(route, APIRoute):
                yield route.path
            elif hasattr(route, "routes"):
                yield from leaves(route.routes)

    walked = set(paths(api))
    for path in leaves(api.app.routes):  # type: ignore[attr-defined]
        assert path.replace("{name:path}", "a").format(job_id="ftjob_x", name="a") in walked or path == ""


def test_without_a_key_every_route_and_method_is_closed_but_health(api: TestClient) -> None:
    walked = paths(api)
    assert len(walked) > 15
    del api.headers["Authorization"]
    for path in walked:
        for method in METHODS:
            answer = api.request(method, path)
            if (method, path) in PUBLIC:
                assert answer.status_code in (200, 405)
                continue
            assert answer.status_code == 401, (method, path)
            assert answer.headers["www-authenticate"] == "Bearer"
            if method != "HEAD":
                assert answer.json()["code"] == "unauthorised"


@pytest.mark.parametrize("given", ["", "Bearer", "Bearer ", "Bearer wrong", "Basic a2V5", "d2ft_x", "Bearer \xff"])
def test_a_wrong_key_is_refused(api: TestClient, given: str) -> None:
    assert api.get("/v1/jobs", headers={"Authorization": given.encode("latin-1")}).status_code == 401  # type: ignore[dict-item]


def test_a_bad_body_without_a_key_is_still_only_unauthorised(api: TestClient) -> None:
    del api.headers["Authorization"]
    assert api.post("/v1/jobs", content=b"{not json").status_code == 401


def test_another_host_name_is_refused(api: TestClient) -> None:
    answer = api.get("/healthz", headers={"Host": "evil.example"})
    assert answer.status_code == 403 and answer.json()["code"] == "unknown_host"
    for name in ("127.0.0.1:7421", "localhost", "[::1]:7421"):
        assert api.get("/healthz", headers={"Host": name}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}],
)
def test_changes_from_other_sites_are_refused(api: TestClient, headers: dict[str, str]) -> None:
    answer = api.post("/v1/jobs", json={}, headers=headers)
    assert answer.status_code == 403 and answer.json()["code"] == "foreign_origin"


def test_a_change_from_our_own_origin_is_taken(api: TestClient) -> None:
    assert api.post("/v1/jobs", json={}, headers={"Origin": "http://127.0.0.1:7421"}).status_code == 201


def test_a_body_over_the_limit_is_refused_with_and_without_its_length(api: TestClient) -> None:
    big = b" " * ((1 << 20) + 1)
    assert api.post("/v1/jobs", content=big).status_code == 413
    answer = api.post("/v1/jobs", content=(big[i : i + 65536] for i in range(0, len(big), 65536)))
    assert answer.status_code == 413 and answer.json()["code"] == "body_too_large"


def test_every_answer_carries_a_request_id(api: TestClient) -> None:
    assert api.get("/healthz").headers["x-request-id"].startswith("req_")
    answer = api.get("/v1/jobs/none", headers={"X-Request-ID": "mine-1"})
    assert answer.json()["request_id"] == answer.headers["x-request-id"] == "mine-1"
    assert api.get("/healthz", headers={"X-Request-ID": "a b\tc"}).headers["x-request-id"].startswith("req_")


def test_key_and_home_are_private(api: TestClient, home: Path) -> None:
    assert home.stat().st_mode & 0o077 == 0 or (home / "key").stat().st_mode & 0o077 == 0
    assert (home / "key").stat().st_mode & 0o777 == 0o600
    assert (read_secret(home / "key") or "").startswith("d2ft_")


def test_any_name_is_answered_only_where_the_host_is_not_loopback() -> None:
    assert Settings(host="0.0.0.0").host_names == ()
    assert "gpu.lan" in Settings(host="0.0.0.0", allowed_hosts=("gpu.lan",)).host_names
