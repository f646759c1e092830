"""The description of the API is whole, and the API keeps to it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.auth import PUBLIC, RUN_PREFIX, is_page
from service.routes import description
from tests.fuzz.api import fuzz, fuzzed
from tests.service.walk import UNSAFE, walk

PROBLEM = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
FUZZ = ("--max-examples", "2", "--max-time", "15")


@pytest.fixture
def document(api: TestClient) -> dict[str, Any]:
    found: dict[str, Any] = api.get("/openapi.json").json()
    return found


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def named(document: dict[str, Any], name: str) -> dict[str, Any]:
    return next(each for _, _, each in operations(document) if each["operationId"] == name)


def test_it_has_a_name_a_version_and_every_route_once(api: TestClient, document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1") and document["info"]["title"] == "d2ft"
    assert document["info"]["version"] == "1" and "RFC 9457" in document["info"]["description"]
    routes = {(found.method, re.sub(":path", "", found.path)) for found in walk(api.app)}
    described = {(method, path) for method, path, _ in operations(document)}
    aliases = {(method, path) for method, path in routes if (method, f"/v1{path}") in routes}
    pages = {(method, path) for method, path in routes if is_page(path)}
    assert described == routes - aliases - pages - {("GET", "/openapi.json"), ("HEAD", "/openapi.json")}


def test_every_operation_says_what_it_does_under_a_name_of_its_own(document: dict[str, Any]) -> None:
    found = [each for _, _, each in operations(document)]
    names = [each["operationId"] for each in found]
    assert len(set(names)) == len(names) and all(re.fullmatch("[a-z_]+", name) for name in names)
    assert all(each["summary"] and each["description"] and each["tags"] for each in found)


def test_every_operation_but_the_public_ones_asks_for_a_key(document: dict[str, Any]) -> None:
    schemes = document["components"]["securitySchemes"]
    assert {name: (each["type"], each["scheme"]) for name, each in schemes.items()} == {
        "key": ("http", "bearer"),
        "run": ("http", "bearer"),
    }
    for method, path, operation in operations(document):
        if (method, path) in PUBLIC:
            assert operation["security"] == []
        else:
            assert operation["security"] == [{"run" if path.startswith(RUN_PREFIX) else "key": []}]
            assert {"401", "403", "503"} <= set(operation["responses"])


def test_every_failure_is_a_problem(document: dict[str, Any]) -> None:
    for method, path, operation in operations(document):
        for status, answer in operation["responses"].items():
            if status < "400" or (path, status) == ("/readyz", "503"):
                continue
            shared = answer["$ref"].removeprefix("#/components/responses/")
            assert shared == status and document["components"]["responses"][status]["content"] == PROBLEM
        failures = set(operation["responses"])
        assert ("{" not in path or "404" in failures) and (method not in UNSAFE or {"408", "413"} <= failures)
        assert "requestBody" not in operation or "422" in failures
    assert "default" not in str(sorted(document["components"]["responses"]))
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_every_answer_and_every_body_has_a_schema(document: dict[str, Any]) -> None:
    for _, path, operation in operations(document):
        good = [answer for status, answer in operation["responses"].items() if status < "300"]
        assert good and all(content["schema"] for answer in good for content in answer["content"].values()), path
        if body := operation.get("requestBody"):
            assert body["required"] and all(content["schema"] for content in body["content"].values()), path
        for parameter in operation.get("parameters", []):
            assert parameter["schema"] and (
                parameter["in"] == "query" or parameter.get("required") or parameter["in"] == "header"
            )


def test_what_is_no_json_is_named(document: dict[str, Any]) -> None:
    def types(name: str, status: str = "200") -> set[str]:
        return set(named(document, name)["responses"][status]["content"])

    assert types("read_events") == {"application/json", "text/event-stream"}
    taken = named(document, "predict")["requestBody"]["content"]
    assert {"image/jpeg", "image/png", "multipart/form-data"} <= set(taken) and "application/json" not in taken
    assert types("read_logs") == {"text/plain"} and types("download_artifact") == {"application/octet-stream"}
    assert types("download_artifact", "206") == {"application/octet-stream"}
    assert types("metrics") == {"text/plain", "application/openmetrics-text"}


def test_filters_headers_and_links_are_described(document: dict[str, Any]) -> None:
    asked = {parameter["name"]: parameter for parameter in named(document, "list_jobs")["parameters"]}
    assert asked["metadata"]["style"] == "deepObject" and "metadata[KEY]" in asked["metadata"]["description"]
    assert {"status", "model", "search", "owner", "created_after", "created_before"} <= set(asked)
    made = named(document, "create_job")
    assert [each["name"] for each in made["parameters"]] == ["Idempotency-Key"]
    assert set(made["responses"]["201"]["headers"]) == {"Location", "Idempotency-Replayed"}
    assert "cancel_job" in made["responses"]["201"]["links"]
    assert set(named(document, "read_logs")["responses"]["200"]["headers"]) == {"X-Log-Offset", "X-Log-Size"}


def test_what_is_said_of_an_operation_is_said_of_one_that_there_is(document: dict[str, Any]) -> None:
    names = {each["operationId"] for _, _, each in operations(document)}
    said = {*description.FAILS, *description.HEADERS, *description.IDS, *description.LATER}
    assert said <= names


@pytest.mark.filterwarnings("ignore:.*")
def test_the_api_keeps_to_its_description_whatever_it_is_sent(tmp_path: Path) -> None:
    """All checks of Schemathesis, for less than a minute; `make fuzz` takes longer."""
    with fuzzed(tmp_path / "home") as (url, env):
        code, text = fuzz(url, env, tmp_path, "run", *FUZZ)
    assert code == 0, text[-20_000:]
    assert int(re.findall(r"Tested: (\d+)", text)[0]) >= 55
    assert all(f"✅ {phase}" in text for phase in ("Coverage", "Fuzzing", "Stateful")), text[-3000:]
