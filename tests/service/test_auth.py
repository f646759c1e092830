"""The door: closed unless opened by name, for every route and method there is, and for every way to write its path."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from service.auth import ADMIN_PATHS, PUBLIC, PUBLIC_PREFIX, RUN_PATH, SIGN_IN, is_public
from service.home import read_secret
from service.settings import Settings
from tests.service.conftest import FakeRay, create_app
from tests.service.walk import NOTHING, head, raw, status_of, statuses, walk

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "get", "X-NEW")
HOST = {"Host": "127.0.0.1:7421"}
FOREIGN_HOSTS = (
    "evil.example",
    "evil.example:7421",
    "127.0.0.1.evil.example",
    "localhost.evil.example:7421",
    "localhost.",
    "evil.example@127.0.0.1",
    "127.0.0.1@evil.example",
    "127.0.0.1/evil.example",
    "127.0.0.1:7421:80",
    "127.1",
    "2130706433",
    "0.0.0.0:7421",
    "[::ffff:7f00:1]",
    "[::1",
    "169.254.169.254",
    "",
)


def written(path: str) -> set[str]:
    """Ways to write a path that a server, a proxy or a file system may take for the same."""
    return {path, f"{path}/", f"/{path}", path.replace("/", "//"), path.upper(), f"{path}%2f", f"{path};x", f"{path}/."}


def all_paths(api: TestClient) -> set[str]:
    return {found.fill() for found in walk(api.app)} | set(NOTHING)


def test_the_walk_sees_every_route(api: TestClient) -> None:
    walked = {(found.method.lower(), found.path.replace(":path", "")) for found in walk(api.app)}
    described = api.get("/openapi.json").json()["paths"]
    assert {(method, path) for path, methods in described.items() for method in methods} <= walked
    assert ("get", "/openapi.json") in walked and ("post", "/jobs") in walked, "those that the description leaves out"
    assert len(walked) > 80


def test_without_a_key_every_route_and_method_is_closed(api: TestClient) -> None:
    asked = [(method, way) for path in all_paths(api) for way in written(path) for method in METHODS]
    found = asyncio.run(statuses(api.app, [each for each in asked if not is_public(*each)], HOST))
    assert len(found) > 5000
    assert {each: status for each, status in found.items() if status != 401} == {}


def test_a_refusal_says_what_is_needed_and_nothing_else(api: TestClient) -> None:
    del api.headers["Authorization"]
    for path in ("/v1/jobs", "/v1/jobs/x", "/v1/nothing", "/openapi.json", "/metrics"):
        answer = api.get(path)
        assert answer.status_code == 401 and answer.json()["code"] == "unauthorised"
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.headers["content-type"] == "application/problem+json"


def test_what_is_public_is_there_and_answers_without_a_key(api: TestClient) -> None:
    del api.headers["Authorization"]
    assert {path for _, path in PUBLIC} == {"/healthz", "/readyz", SIGN_IN}, "think twice before this list grows"
    for method, path in PUBLIC - {("POST", SIGN_IN)}:
        assert api.request(method, path).status_code == 200, "an entry that opens nothing is to go"
    assert api.get(f"{PUBLIC_PREFIX}d2ft.css").status_code == 200
    assert api.get(f"{PUBLIC_PREFIX}..%2f..%2frender.py").status_code == 404


def test_the_doors_paths_are_those_of_the_routes(api: TestClient) -> None:
    found = walk(api.app)
    assert RUN_PATH in {each.path for each in found}
    for each in found:
        named = any(each.path == prefix or each.path.startswith(f"{prefix}/") for prefix in ADMIN_PATHS)
        assert named == each.by_admin, each
    assert all(any(each.path == prefix for each in found) for prefix in ADMIN_PATHS), "an entry that closes nothing"


@pytest.mark.parametrize(
    "given",
    ["", "Bearer", "Bearer ", "Bearer wrong", "Basic a2V5", "d2ft_x", "Bearer \xff", "Bearer d2ft_" + "x" * 9000],
)
def test_a_wrong_key_is_refused(api: TestClient, given: str) -> None:
    assert api.get("/v1/jobs", headers={"Authorization": given.encode("latin-1")}).status_code == 401  # type: ignore[dict-item]


@pytest.mark.parametrize("change", [str.upper, str.lower, lambda key: key[:-1], lambda key: key + "x", lambda key: "%"])
def test_a_key_that_is_nearly_right_is_refused(api: TestClient, home: Path, change) -> None:  # type: ignore[no-untyped-def]
    key = read_secret(home / "key") or ""
    assert api.get("/v1/jobs", headers={"Authorization": f"Bearer {change(key)}"}).status_code == 401
    assert api.get("/v1/jobs", headers={"Authorization": f"bearer {key}"}).status_code == 200


def test_a_key_in_the_url_or_in_a_cookie_opens_nothing(api: TestClient, home: Path) -> None:
    key = read_secret(home / "key") or ""
    del api.headers["Authorization"]
    assert api.get("/v1/jobs", params={"key": key, "access_token": key}).status_code == 401
    assert api.get("/v1/jobs", headers={"Cookie": f"key={key}; Authorization=Bearer {key}"}).status_code == 401


def test_a_bad_body_without_a_key_is_still_only_unauthorised(api: TestClient) -> None:
    del api.headers["Authorization"]
    assert api.post("/v1/jobs", content=b"{not json").status_code == 401


def test_no_websocket_is_opened(api: TestClient) -> None:
    for path in ("/v1/jobs", "/healthz", "/nothing"):
        with pytest.raises(WebSocketDisconnect), api.websocket_connect(path):
            pass


WAYS_AROUND = [
    head("GET", "//v1/jobs"),
    head("GET", "/v1/%6aobs"),
    head("GET", "/v1/jobs%2f"),
    head("GET", "/healthz/../v1/jobs"),
    head("GET", "/healthz%2f..%2fv1%2fjobs"),
    head("GET", "/healthz%00"),
    head("GET", "/healthz;/v1/jobs"),
    head("GET", "/v1/jobs?/healthz"),
    head("GET", "/v1/jobs#/healthz"),
    head("GET", "http://localhost/v1/jobs"),
    head("GET", "http://localhost/healthz"),
    head("OPTIONS", "*"),
    head("CONNECT", "localhost:80"),
    head("POST", "/healthz"),
    head("GET", "/v1/jobs", {"X-Original-URL": "/healthz", "X-Rewrite-URL": "/healthz"}),
    head("GET", "/v1/jobs", {"X-HTTP-Method-Override": "GET", "X-Forwarded-For": "127.0.0.1"}),
    head("GET", "/v1/jobs", {"X-Forwarded-Prefix": "/healthz", "X-Forwarded-User": "first", "Remote-User": "first"}),
    b"GET /v1/jobs HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade, close\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n",
    b"GET /v1/jobs HTTP/1.1\r\nHost: localhost\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n"
    b"Connection: Upgrade, HTTP2-Settings, close\r\n\r\n",
    b"GET /v1/jobs HTTP/1.0\r\nHost: localhost\r\n\r\n",
    b"GET /v1/jobs HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer \r\nauthorization: x\r\n"
    b"Connection: close\r\n\r\n",
]


@pytest.mark.filterwarnings("ignore:.*")
def test_no_way_to_write_a_request_leads_around_the_door(server: str) -> None:
    for request in WAYS_AROUND:
        answer = raw(server, request)
        assert status_of(answer) in (400, 401), (request, answer[:200])
        assert b"first_id" not in answer and b'"ok"' not in answer


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /healthz HTTP/1.1\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 50\r\n\r\nhello",
        b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n"
        b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nbad header\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 500 + b"\r\n\r\n",
    ],
)
def test_a_request_that_can_be_read_in_two_ways_is_refused(server: str, request_: bytes) -> None:
    assert status_of(raw(server, request_)) in (400, 401, 403, 413, 501)
    assert status_of(raw(server, head("GET", "/healthz"))) == 200


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        *(({"Host": name}, "unknown_host") for name in FOREIGN_HOSTS),
        ({"Origin": "https://evil.example"}, "foreign_origin"),
        ({"Origin": "null"}, "foreign_origin"),
        ({"Origin": ""}, "foreign_origin"),
        ({"Origin": "http://["}, "foreign_origin"),
        ({"Origin": "http://127.0.0.1:7422"}, "foreign_origin"),
        ({"Origin": "http://127.0.0.1:7421.evil.example"}, "foreign_origin"),
        ({"Origin": "http://evil.example@127.0.0.1:7421"}, "foreign_origin"),
        ({"Origin": "http://localhost:7421"}, "foreign_origin"),
        ({"Sec-Fetch-Site": "cross-site"}, "foreign_origin"),
        ({"Sec-Fetch-Site": "same-site"}, "foreign_origin"),
        ({"Sec-Fetch-Site": "whatever"}, "foreign_origin"),
    ],
)
def test_no_route_and_method_answers_a_foreign_page(api: TestClient, headers: dict[str, str], code: str) -> None:
    """Even with a valid key, and where none is needed: a page may have had its own name resolve to us."""
    answer = api.get("/healthz", headers=headers)
    assert answer.status_code == 403 and answer.json()["code"] == code
    given = {**HOST, "Authorization": api.headers["authorization"], **headers}
    found = asyncio.run(statuses(api.app, [(method, path) for path in all_paths(api) for method in METHODS], given))
    assert set(found.values()) == {403}


@pytest.mark.parametrize("name", ["127.0.0.1:7421", "localhost", "LOCALHOST:80", "[::1]:7421", "[::1]"])
def test_our_own_names_are_answered(api: TestClient, name: str) -> None:
    assert api.get("/healthz", headers={"Host": name}).status_code == 200


def test_names_that_are_allowed_are_answered_whatever_their_case(home: Path, ray: FakeRay) -> None:
    settings = Settings(home=home, allowed_hosts=("GPU.lan",))
    app = create_app(settings, ray_transport=ray.transport(), supervise=False)
    with TestClient(app, base_url="http://gpu.LAN") as client:
        assert client.get("/healthz").status_code == 200
        assert client.get("/healthz", headers={"Host": "other.lan"}).status_code == 403


@pytest.mark.parametrize("site", ["same-origin", "none"])
def test_a_request_from_our_own_origin_is_taken(api: TestClient, site: str) -> None:
    headers = {"Origin": "http://127.0.0.1:7421", "Sec-Fetch-Site": site}
    assert api.post("/v1/jobs", json={}, headers=headers).status_code == 201
    assert api.get("/v1/jobs", headers=headers).status_code == 200


def test_no_answer_opens_the_api_to_other_sites(api: TestClient) -> None:
    origins = ("http://127.0.0.1:7421", "https://evil.example", "null")
    for path in ("/v1/jobs", "/healthz", "/openapi.json", "/v1/nothing"):
        for origin in origins:
            asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            for method in ("GET", "POST", "OPTIONS"):
                answer = api.request(method, path, headers=asked)
                assert not [name for name in answer.headers if name.startswith("access-control")], (method, path)


def test_every_answer_carries_a_request_id_and_is_not_to_be_sniffed_or_kept(api: TestClient) -> None:
    assert api.get("/healthz").headers["x-request-id"].startswith("req_")
    answer = api.get("/v1/jobs/none", headers={"X-Request-ID": "mine-1"})
    assert answer.json()["request_id"] == answer.headers["x-request-id"] == "mine-1"
    for given in ("a b\tc", "x" * 65, "a;b", "<b>"):
        assert api.get("/healthz", headers={"X-Request-ID": given}).headers["x-request-id"].startswith("req_")
    for path in ("/healthz", "/v1/jobs", "/v1/nothing", "/openapi.json"):
        answer = api.get(path)
        assert (answer.headers["x-content-type-options"], answer.headers["cache-control"]) == ("nosniff", "no-store")


def test_slashes_lead_nowhere_else(api: TestClient) -> None:
    """A redirect behind a proxy with a certificate would lead to http, and take the key along."""
    for found in walk(api.app):
        answer = api.request(found.method, f"{found.fill()}/", follow_redirects=False)
        assert not 300 <= answer.status_code < 400, found


def test_key_and_home_are_private(api: TestClient, home: Path) -> None:
    assert home.stat().st_mode & 0o077 == 0 or (home / "key").stat().st_mode & 0o077 == 0
    assert (home / "key").stat().st_mode & 0o777 == 0o600
    assert (read_secret(home / "key") or "").startswith("d2ft_")


def test_any_name_is_answered_only_where_the_host_is_not_loopback() -> None:
    assert Settings(host="0.0.0.0").host_names == ()
    assert "gpu.lan" in Settings(host="0.0.0.0", allowed_hosts=("gpu.lan",)).host_names
