"""What `/openapi.json` says beyond what the framework finds out by itself: who may ask, how it fails, which headers.

Every way in which an operation fails is named, all with the same document: a client can rely on that no other comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute

from service.auth import PUBLIC, RUN_PREFIX
from service.problems import PROBLEM_JSON
from service.scrape import OPENMETRICS

Operation = dict[str, Any]
SAFE = ("get", "head")
TEXTS = ("text/plain", "text/event-stream", OPENMETRICS)
ABOUT = """Fine-tunes timm's vision transformers over unlike devices.

Every error is a problem document (RFC 9457). Lists are paged by `after` and `limit`. Times are Unix seconds. Fields and
states may be added: pass over those that you do not know."""
SCHEMES = {
    "key": {"type": "http", "scheme": "bearer", "description": "An API key, as POST /v1/keys makes them."},
    "run": {"type": "http", "scheme": "bearer", "description": "The token of an attempt, which only its run has."},
}
# Beside what holds for all operations of a kind: see `_failures`.
FAILS: dict[str, tuple[int, ...]] = {
    "create_job": (429, 503),
    "list_jobs": (404,),
    "cancel_job": (409,),
    "pause_job": (409,),
    "resume_job": (409,),
    "retry_job": (409,),
    "create_sweep": (429, 503),
    "list_sweeps": (404,),
    "cancel_sweep": (409,),
    "retry_sweep": (409,),
    "read_sweep_events": (429,),
    "read_sweep_logs": (429,),
    "download_sweep_artifact": (416,),
    "read_events": (429,),
    "read_logs": (429,),
    "download_artifact": (416,),
    "preview_plan": (404, 409, 429),
    "predict": (409, 415, 429),
    "make_key": (404,),
    "make_user": (409,),
    "change_user": (409,),
    "register_dataset": (409, 429),
    "list_datasets": (404,),
    "inspect_dataset": (409,),
    "list_samples": (409, 429),
    "make_webhook": (429,),
    "test_webhook": (409, 429),
    "post_events": (409,),
    "add_trial": (409, 429),
    "begin_run": (429,),
}
HEADERS: dict[str, dict[str, dict[str, str]]] = {
    "create_job": {
        "201": {
            "Location": "Where the job is",
            "Idempotency-Replayed": "true where the key was used before, and this is the answer of then",
        }
    },
    "create_sweep": {
        "201": {
            "Location": "Where the sweep is",
            "Idempotency-Replayed": "true where the key was used before, and this is the answer of then",
        }
    },
    "begin_run": {
        "201": {
            "Location": "Where the job is",
            "Idempotency-Replayed": "true where the key was used before, and this is the answer of then",
        }
    },
    "register_dataset": {"201": {"Location": "Where the dataset is"}, "200": {"Location": "Where the dataset is"}},
    "read_sweep_logs": {"200": {"X-Log-Offset": "Where to go on; not with `follow`", "X-Log-Size": "The log's length"}},
    "read_logs": {"200": {"X-Log-Offset": "Where to go on; not with `follow`", "X-Log-Size": "The log's length"}},
    "download_sweep_artifact": {"200": {"Repr-Digest": "SHA-256 of the whole file"}},
    "download_artifact": {"200": {"Repr-Digest": "SHA-256 of the whole file"}},
}
IDS = {
    "create_job": "job_id",
    "create_sweep": "sweep_id",
    "make_key": "key_id",
    "make_user": "user_id",
    "register_dataset": "dataset_id",
    "make_webhook": "webhook_id",
}
LATER = (  # not there yet when a job or sweep has been made
    "read_plan", "read_ledger", "read_logs", "download_artifact", "read_sweep_logs", "download_sweep_artifact",
)  # fmt: skip
FILTER = {
    "name": "metadata",
    "in": "query",
    "style": "deepObject",
    "explode": True,
    "description": "`metadata[KEY]=VALUE`: those whose metadata have exactly this; several narrow further",
    "schema": {"type": "object", "additionalProperties": {"type": "string"}, "maxProperties": 8},
}


def describe(app: FastAPI) -> None:
    """Have the application describe itself completely."""
    plain: Callable[[], dict[str, Any]] = app.openapi

    def complete() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _completed(plain())
        return app.openapi_schema

    app.openapi = complete  # type: ignore[method-assign]


def name_of(route: APIRoute) -> str:
    """The name of an operation: that of its function."""
    return route.name


def _completed(document: dict[str, Any]) -> dict[str, Any]:
    document["info"]["description"] = ABOUT
    components = document["components"]
    components["securitySchemes"] = SCHEMES
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    used: set[int] = set()
    for path, method, operation in _operations(document):
        used |= _complete(path, method, operation)
    _link(document)
    components["responses"] = {str(status): _problem(status) for status in sorted(used)}
    return document


def _operations(document: dict[str, Any]) -> Iterator[tuple[str, str, Operation]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def _complete(path: str, method: str, operation: Operation) -> set[int]:
    """Fill in one operation; returns the statuses with which it may fail."""
    name, public = operation["operationId"], (method.upper(), path) in PUBLIC
    scheme = "run" if path.startswith(RUN_PREFIX) else "key"
    operation["security"] = [] if public else [{scheme: []}]
    responses: dict[str, Any] = operation["responses"]
    responses.pop("default", None)
    responses.pop("422", None)
    failures = set() if public else _failures(path, method, operation) | {*FAILS.get(name, ())}
    for status in sorted(failures):
        responses[str(status)] = {"$ref": f"#/components/responses/{status}"}
    if name == "register_dataset":
        responses["200"] = {**responses["201"], "description": "It was there already, and has been listed anew"}
    if name == "metrics":
        responses["200"]["content"][OPENMETRICS] = {}
    if name in ("list_jobs", "list_sweeps"):
        operation["parameters"].append(FILTER)
    for response in responses.values():
        for media_type, content in response.get("content", {}).items():
            if media_type != "application/json":
                content["schema"] = (
                    {"type": "string"} if media_type in TEXTS else {"type": "string", "format": "binary"}
                )
    for answer, headers in HEADERS.get(name, {}).items():
        told = {header: {"description": text, "schema": {"type": "string"}} for header, text in headers.items()}
        responses[answer]["headers"] = told
    return failures


def _link(document: dict[str, Any]) -> None:
    """Say which operations take the id of what another has made."""
    operations = [(path, operation) for path, _, operation in _operations(document)]
    for _, operation in operations:
        taken = IDS.get(operation["operationId"])
        if taken is None:
            continue
        parameters = {taken: "$response.body#/id"}
        found = [each["operationId"] for path, each in operations if f"{{{taken}}}" in path]
        takers = [name for name in found if name not in LATER]
        operation["responses"]["201"]["links"] = {
            name: {"operationId": name, "parameters": parameters} for name in takers
        }


def _failures(path: str, method: str, operation: Operation) -> set[int]:
    """What holds for all operations of a kind."""
    found = {401, 403, 503}
    if "parameters" in operation or "requestBody" in operation:
        found.add(422)
    if "{" in path:
        found.add(404)
    if method not in SAFE:
        found |= {408, 413}
    return found


def _problem(status: int) -> dict[str, Any]:
    content = {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    told = {401: ("WWW-Authenticate", "Bearer"), 429: ("Retry-After", "Seconds"), 503: ("Retry-After", "Seconds")}
    made: dict[str, Any] = {"description": f"{HTTPStatus(status).phrase}: a problem (RFC 9457)", "content": content}
    if status in told:
        header, text = told[status]
        made["headers"] = {header: {"description": text, "schema": {"type": "string"}}}
    return made
