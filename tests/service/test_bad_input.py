"""What no well-meaning client sends: every field wrong, bodies that are none, ids that are paths, hostile names.

The answer is a problem document with a 4xx that names what is wrong, never a 500; on both databases.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import jsonschema_rs
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import BaseModel
from starlette.testclient import TestClient

from service.auth import RUN_PREFIX
from service.bodies import MAX_DEPTH
from service.lifecycle import JobState
from service.schemas import DatasetBody, KeyBody, PreviewBody, RunBody, UserBody, UserChange, WebhookBody
from service.settings import Settings
from tests.service.test_routes import problem
from tests.service.walk import UNSAFE, Found, store_of, walk
from workers.contract import JobSpec
from workers.sweeps.contract import SweepSpec

JSON = {"Content-Type": "application/json"}
# Every route that takes a body, with one that it takes: a new one without a line here fails.
BODIES: dict[tuple[str, str], tuple[type[BaseModel], dict[str, Any]]] = {
    ("POST", "/v1/jobs"): (JobSpec, {}),
    ("POST", "/v1/sweeps"): (SweepSpec, {"space": {"seed": {"values": [1]}}}),
    ("POST", "/v1/plans"): (PreviewBody, {"devices": ["fast"]}),
    ("POST", "/v1/keys"): (KeyBody, {}),
    ("POST", "/v1/users"): (UserBody, {"name": "ann"}),
    ("PATCH", "/v1/users/{user_id}"): (UserChange, {}),
    ("POST", "/v1/datasets"): (DatasetBody, {"name": "x", "uri": "folder:///x"}),
    ("POST", "/v1/runs"): (RunBody, {"spec": {}}),
    ("POST", "/v1/webhooks"): (WebhookBody, {"url": "https://x.example"}),
}
BY_RUNS = {("POST", "/v1/runs/events"), ("POST", "/v1/runs/trials")}
PLAIN = [
    None, True, False, 0, -1, 1.5, 2**63, -(2**63), 1e308, "", "5", "x", "x" * 5000, [], [0], [None], [[]],
    {}, {"a": 1}, ["x"] * 2000,
]  # fmt: skip
NO_TEXT = ("a\x00b", "\ud800")
IN_OTHERS = [*([text] for text in NO_TEXT), *({text: 1} for text in NO_TEXT)]
NEVER = [float("nan"), float("inf"), -float("inf"), *NO_TEXT, *IN_OTHERS]
HOSTILE = [
    "\x1b[31mred\x1b[0m\x07\x9b2J",
    "\r\nSet-Cookie: a=b\r\n\r\n<html>",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "\u202egnp.exe\u2066\u200f\ufeff",
    "'; DROP TABLE jobs; -- %_\\",
    "=1+1 @cmd {{7*7}} ${jndi:ldap://x} ../../etc/passwd",
    "e\u0301\U0001f525\uffff\u0001\x7f\u2028",
    "é" * 200,
]
ODD = [
    "", "0", "-1", "1e3", "9" * 30, "1.5", "NaN", "true", "null", "%00", "%ff", "%ed%a0%80", "é", "\u202e", "a" * 9000,
    "[]", "{}", "'--", "%", "_", "\\", "٣",
]  # fmt: skip
FILTERS = [
    "metadata[]=x", "metadata[=x", "metadata]=x", "metadata[a", "metadata[a][b]=1", "metadata[%ff]=%ff",
    "metadata[a%5D]=1", "metadata['--]='", "metadata[*]=%25", "metadata[" + "a" * 9000 + "]=" + "b" * 9000,
]  # fmt: skip
IDS = [
    "..%2f..%2fetc%2fpasswd", "%2e%2e%2f", "..%5c..%5cwindows", "%252e%252e%252f", "%00", "x%00.json", "%0d%0aX-A:%20b",
    "%ff%fe", "%c0%ae%c0%ae", "%ed%a0%80", "%F0%9F%94%A5", "%u002e", "*", "'%20OR%20'1'='1", "-1", "null", "~root",
    "a" * 10_000, "%25" * 3000, "ftjob_" + "0" * 26, "%20", "a;b=c", "a?b", "{job_id}",
]  # fmt: skip


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def settings(settings: Settings, request: pytest.FixtureRequest) -> Settings:
    url = None if request.param == "sqlite" else request.getfixturevalue("database")
    return settings.model_copy(update={"webhooks": True, "database_url": url})


@pytest.fixture
def user_id(api: TestClient) -> str:
    return str(api.post("/v1/users", json={"name": "bob"}).json()["id"])


def send(api: TestClient, found: tuple[str, str], body: Any, user_id: str) -> Any:
    method, path = found
    return api.request(method, path.format(user_id=user_id), content=json.dumps(body), headers=JSON)


def test_every_route_with_a_body_has_a_case(api: TestClient) -> None:
    described = api.get("/openapi.json").json()["paths"]
    with_body = {
        (method.upper(), path)
        for path, methods in described.items()
        for method, operation in methods.items()
        if "application/json" in operation.get("requestBody", {}).get("content", {})
    }
    assert with_body == set(BODIES) | BY_RUNS


def fields(schema: dict[str, Any], part: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where in the body a field may stand, down into objects in objects."""
    for name, inner in part.get("properties", {}).items():
        yield (*path, name)
        for branch in (inner, *inner.get("anyOf", ())):
            if "$ref" in branch:
                yield from fields(schema, schema["$defs"][branch["$ref"].split("/")[-1]], (*path, name))


def put(body: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    name, *rest = path
    return {**body, name: put(body.get(name, {}), tuple(rest), value) if rest else value}


@pytest.mark.parametrize("case", BODIES, ids=" ".join)
def test_every_field_of_the_wrong_type_range_or_size_is_named(
    api: TestClient, user_id: str, case: tuple[str, str]
) -> None:
    model, good = BODIES[case]
    schema = model.model_json_schema()
    fits = jsonschema_rs.validator_for(schema)
    places = list(fields(schema, schema))
    assert set(model.model_fields) <= {path[0] for path in places}
    tried = 0
    for path in places:
        wrong = [value for value in PLAIN if not fits.is_valid(put(good, path, value))]
        for value in [*wrong, *NEVER]:
            found = problem(send(api, case, put(good, path, value), user_id), 422)
            pointers = [each["pointer"] for each in found["errors"]]
            assert any(f"{pointer}/".startswith(f"/{path[0]}/") for pointer in pointers), (path, value, found)
            assert (found["param"] or "").split(".")[0] == path[0], (path, value, found)
            tried += 1
    assert tried > 15 * len(places)


def test_a_field_that_nobody_knows_is_refused_at_every_level(api: TestClient, user_id: str) -> None:
    for case, (model, good) in BODIES.items():
        schema = model.model_json_schema()
        inner = {path[:-1] for path in fields(schema, schema) if len(path) > 1}
        for path in ((), *inner):
            found = problem(send(api, case, put(good, (*path, "colour"), 1), user_id), 422)
            assert "/".join(("", *path, "colour")) in [each["pointer"] for each in found["errors"]], (case, path, found)
    many = problem(send(api, ("POST", "/v1/jobs"), {f"x{n}": n for n in range(20_000)}, user_id), 422)
    assert len(many["errors"]) == 50, "the answer is no larger than the question"


def test_pointers_lead_to_the_value_even_through_odd_names(api: TestClient) -> None:
    for body, pointer in (
        ({"metadata": {"a.b/c~d": 1}}, "/metadata/a.b~1c~0d"),
        ({"method": {"schedule": [{"share": 1}, {"share": 2}]}}, "/method/schedule/1/share"),
        ({"optimiser": {"betas": [0.9, 1.5]}}, "/optimiser/betas/1"),
        ({"model_args": {"depth": []}}, "/model_args/depth"),
        ({"": 1}, "/"),
    ):
        found = problem(api.post("/v1/jobs", json=body), 422)
        assert found["errors"][0]["pointer"] == pointer, found
    found = problem(api.post("/v1/plans", json={"devices": ["fast", {"kind": "fast", "count": 0}]}), 422)
    assert "/devices/1/count" in [each["pointer"] for each in found["errors"]], "not by which type it was tried as"


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30) | st.sampled_from(HOSTILE),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize("case", BODIES, ids=" ".join)
def test_whatever_is_in_a_body_no_request_fails_by_our_fault(
    api: TestClient, user_id: str, case: tuple[str, str]
) -> None:
    model, good = BODIES[case]
    names = st.sampled_from(sorted(model.model_fields)) | st.text(max_size=5)

    @hypothesis_settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(body=st.dictionaries(names, values, max_size=4), keep=st.booleans())
    def sent(body: dict[str, Any], keep: bool) -> None:
        answer = send(api, case, {**good, **body} if keep else body, user_id)
        assert answer.status_code < 500, (body, answer.text)
        if answer.status_code >= 400:
            problem(answer, answer.status_code)

    sent()


NO_BODIES: list[tuple[bytes, bytes]] = [
    *(
        (text, b"application/json")
        for text in (b"", b"{", b"[]", b"null", b'"x"', b"1", b"{\xff}", b"\x00", b"{}{}", b"{,}")
    ),
    *(('{"name": "é"}'.encode(code), b"application/json") for code in ("utf-16", "utf-16-le", "utf-32", "latin-1")),
    ('{"name": "é"}'.encode("utf-16"), b"application/json; charset=utf-16"),
    (b"\xef\xbb\xbf{}", b"application/json"),
    (b'{"seed": 1, "seed": 2}', b"application/json"),
    (b'{"method": {"type": "d2ft", "type": "d2ft"}}', b"application/merge-patch+json"),
    (b"[" * 5000 + b"]" * 5000, b"application/json"),
    (b'{"a":' * 5000 + b"1" + b"}" * 5000, b"application/json"),
    (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), b"application/json"),
    (b'{"metadata": ' + b"[" * 900 + b"]" * 900 + b"}", b"application/json"),
    (b"[" + b"[]," * 300_000 + b"[]]", b"application/json"),
    (b"[" + b"1," * 500_000 + b"1]", b"application/json"),
    (b'["' + b"[" * 60_000 + b'"]', b"application/json"),
    (b'{"seed": 1' + b"0" * 5000 + b"}", b"application/json"),
    (b'{"epochs": NaN}', b"application/json"),
    (b'{"epochs": -Infinity}', b"application/json"),
    (b"{}", b"text/plain"),
    (b"{}", b""),
    (b"{}", b"application/xml"),
    (b"a=1&b=2", b"application/x-www-form-urlencoded"),
    (b"--x\r\nContent-Disposition: form-data; name=a\r\n\r\n1\r\n--x--", b"multipart/form-data; boundary=x"),
    (b"\x1f\x8b\x08\x00", b"application/json"),
]


@pytest.mark.parametrize("body", NO_BODIES, ids=lambda body: f"{body[0][:24]!r} {body[1].decode()}")
def test_a_body_that_cannot_be_read_is_refused_by_every_route(
    api: TestClient, user_id: str, body: tuple[bytes, bytes]
) -> None:
    content, kind = body
    for method, path in (*BODIES, *BY_RUNS):
        answer = api.request(
            method, path.format(user_id=user_id), content=content, headers=[(b"content-type", kind)] if kind else []
        )
        problem(answer, answer.status_code)
        assert answer.status_code in ((401,) if (method, path) in BY_RUNS else (422,)), (
            method,
            path,
            answer.text[:300],
        )
    assert api.get("/v1/jobs").json()["data"] == []


def with_ids(api: TestClient) -> list[Found]:
    named = [found for found in walk(api.app) if found.names and found.path.startswith("/v1/")]
    return [found for found in named if not found.path.startswith(RUN_PREFIX)]


def test_an_id_is_looked_up_and_never_followed(api: TestClient) -> None:
    job_id = api.post("/v1/jobs", json={}).json()["id"]
    for found in with_ids(api):
        for name in found.names:
            for hostile in IDS:
                path = found.fill(**{"job_id": job_id, **dict.fromkeys(found.names[1:], "x"), name: hostile})
                answer = api.request(found.method, path, json={} if found.method in UNSAFE else None)
                assert answer.status_code in (404, 405, 422), (found, path[:200], answer.text[:300])
                problem(answer, answer.status_code)
                assert "root:" not in answer.text and len(answer.content) < 60_000


def test_no_value_of_a_parameter_fails_by_our_fault(api: TestClient) -> None:
    job_id = api.post("/v1/jobs", json={"metadata": {"a": "b"}}).json()["id"]
    tried = 0
    for path, methods in api.get("/openapi.json").json()["paths"].items():
        parameters = [each for each in methods.get("get", {}).get("parameters", []) if each["in"] == "query"]
        for name in [each["name"] for each in parameters if each["name"] not in ("metadata", "follow")]:
            for value in ODD:
                written = value if value.startswith("%") and len(value) > 1 else quote(value)
                url = f"{path.replace('{job_id}', job_id)}?{name}={written}"
                answer = api.get(url)
                assert answer.status_code in (200, 404, 422, 503), (url[:200], answer.text[:300])
                if answer.status_code == 422:
                    assert problem(answer, 422)["param"] in (name, None), (url[:200], answer.text)
                assert api.get(f"{url}&{name}={written}").status_code < 500
                tried += 1
    assert tried > 400
    assert problem(api.get("/v1/jobs?limit=101"), 422)["param"] == "limit"


def test_odd_filters_by_metadata_find_nothing_and_break_nothing(api: TestClient) -> None:
    api.post("/v1/jobs", json={"metadata": {"a]b": "c", "é": "%", "": "x"} | {"k": "v"}})
    for query in FILTERS:
        answer = api.get(f"/v1/jobs?{query}")
        assert answer.status_code in (200, 422), (query[:100], answer.text)
    many = "&".join(f"metadata[k{n}]=v" for n in range(9))
    assert problem(api.get(f"/v1/jobs?{many}"), 422)["param"] == "metadata"
    assert problem(api.get("/v1/jobs?metadata[k]=%00"), 422)["code"] == "invalid_request"


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_name_comes_back_as_it_was_and_nowhere_else(api: TestClient, name: str) -> None:
    body = {"name": name, "metadata": {name[:64]: name, "plain": "x"}}
    made = api.post("/v1/jobs", json=body, headers={"Idempotency-Key": "k" + quote(name)[:200]})
    assert made.status_code == 201, made.text
    for answer in (made, api.get(made.headers["location"]), api.get("/v1/jobs", params={"search": name})):
        job = answer.json()["data"][0] if "data" in answer.json() else answer.json()
        assert (job["name"], job["metadata"], job["spec"]["name"]) == (name, body["metadata"], name)
        _check_headers(answer)
        assert "charset" not in answer.headers["content-type"] and answer.content.decode("utf-8")
    with api.stream("GET", f"{made.headers['location']}/events") as answer:
        answer.read()
        assert name not in answer.text
    store = store_of(api)
    attempt = store.queue.claim(100)
    assert attempt
    data = {"name": name[:200], "path": "/x", "bytes": 1, "sha256": "0" * 64}
    line = {"seq": 1, "at": 1.0, "type": "artifact.ready", "data": data, "message": name}
    store.attempts.absorb(attempt, [line], 1)
    for answer in (
        api.get(f"{made.headers['location']}/artifacts"),
        api.get(f"{made.headers['location']}/artifacts/{quote(name, safe='')}"),
        api.get(f"{made.headers['location']}/events"),
    ):
        _check_headers(answer)
        assert answer.status_code in (200, 404)


def _check_headers(answer: Any) -> None:
    for name, value in answer.headers.raw:
        assert all(0x20 <= byte < 0x7F for byte in name + value), (name, value)
    assert "set-cookie" not in answer.headers


def test_ids_that_the_service_makes_are_plain(api: TestClient) -> None:
    made = api.post("/v1/jobs", json={}).json()["id"]
    assert set(made) <= set(string.ascii_letters + string.digits + "_")


def test_what_a_run_tells_can_be_kept_and_streamed_whatever_it_is(api: TestClient) -> None:
    job_id = api.post("/v1/jobs", json={}).json()["id"]
    attempt = store_of(api).queue.claim(1)
    assert attempt
    run = {"Authorization": f"Bearer {attempt.token}"}

    def tell(**event: Any) -> int:
        body = {"attempt": 1, "events": [{"at": 1.0, "type": "odd", **event}]}
        return api.post("/v1/runs/events", content=json.dumps(body), headers={**JSON, **run}).status_code

    for seq, text in enumerate([*HOSTILE, *NO_TEXT], 1):
        assert tell(seq=seq, message=text, data={text: [text, float("nan"), {"a": text}]}) == 200
    for kind in ("a\nid: 99\ndata: x", "a\r", "a b", "é", "", "x" * 41, "\x00"):
        assert tell(seq=90, type=kind) == 422, "it stands on a line of its own in a stream"
    deep: Any = 1
    for _ in range(MAX_DEPTH):
        deep = [deep]
    assert tell(seq=91, data={"deep": deep}) == 422
    kept = [event["message"] for event in api.get(f"/v1/jobs/{job_id}/events").json()["data"] if event["type"] == "odd"]
    assert kept == [*HOSTILE, "a\\x00b", "\\ud800"]
    api.post(f"/v1/jobs/{job_id}/cancel")
    store_of(api).attempts.finish(attempt, JobState.CANCELLED)
    streamed = api.get(f"/v1/jobs/{job_id}/events", headers={"Accept": "text/event-stream"})
    lines = streamed.content.decode().split("\n")
    assert all(line.partition(":")[0] in ("event", "data", "id", "retry", "") for line in lines)
    told = [json.loads(line.removeprefix("data: "))["message"] for line in lines if line.startswith("data: ")]
    assert set(kept) <= set(told)
