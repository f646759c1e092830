"""Every error as RFC 9457 `application/problem+json`: one shape, whoever raised it, and never a traceback.

`code` is for programs, `param` names the field ("method.ratios"), `errors[].pointer` points into the body
("/method/ratios").
"""

from __future__ import annotations

import http
import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import iter_route_contexts
from starlette.exceptions import HTTPException

from scheduler.errors import CapacityError, D2ftError
from service.errors import InvalidRequestError, Issue, TooManyError, UnauthorisedError, http_status
from service.schemas import FieldProblem, PreviewBody, Problem
from workers.contract import JobSpec
from workers.sweeps.contract import SweepSpec

PROBLEM_JSON = "application/problem+json"
MAX_ERRORS = 50
MAX_DETAIL = 2000
RETRY_AFTER_S = "5"
log = logging.getLogger(__name__)
_FIELDS = frozenset({*JobSpec.model_fields, *PreviewBody.model_fields, *SweepSpec.model_fields})


class ProblemResponse(JSONResponse):
    """A problem as JSON of ASCII alone: what it quotes may be text that UTF-8 cannot carry."""

    media_type = PROBLEM_JSON

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode()


def install(app: FastAPI) -> None:
    """Answer every kind of failure with a problem."""
    app.add_exception_handler(D2ftError, _on_ours)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(Exception, _on_bug)


def problem_response(scope: Mapping[str, Any], error: D2ftError) -> JSONResponse:
    """The answer to one of our own errors."""
    status = http_status(error)
    issues = error.issues if isinstance(error, InvalidRequestError) else [Issue(error.param or "", error.message)]
    detail = " ".join(part for part in (error.message, error.remedy) if part)
    return _response(scope, status, error.code, detail, issues, _headers(error))


async def _on_ours(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, D2ftError)
    if http_status(error) >= 500:
        log.error("%s: %s", error.code, error)
    return problem_response(request.scope, error)


async def _on_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    issues = [_issue(each, error.body) for each in error.errors()[:MAX_ERRORS]]
    detail = "; ".join(_sentence(issue) for issue in issues[:5])
    return _response(request.scope, 422, "invalid_request", detail, issues)


async def _on_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = http.HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
    headers = {"Allow": _allowed(request)} if error.status_code == 405 else error.headers
    return _response(request.scope, error.status_code, code, str(error.detail), [], headers)


async def _on_bug(request: Request, error: Exception) -> JSONResponse:
    """A fault of ours. The server logs the traceback under this request's id; the client gets the id."""
    detail = "The service failed on this request; its log names the cause under the request_id."
    request_id = request.scope.get("state", {}).get("request_id")
    log.error("request %s failed", request_id, exc_info=error, extra={"request_id": request_id})
    return _response(request.scope, 500, "internal", detail, [])


def _response(
    scope: Mapping[str, Any],
    status: int,
    code: str,
    detail: str,
    issues: Sequence[Issue],
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    named = [issue for issue in issues if issue.field or issue.pointer][:MAX_ERRORS]
    fields = [
        FieldProblem(pointer=issue.pointer or _pointer(issue.field.split(".")), message=issue.message)
        for issue in named
    ]
    problem = Problem(
        title=http.HTTPStatus(status).phrase,
        status=status,
        detail=detail[:MAX_DETAIL],
        instance=scope.get("path"),
        code=code,
        param=issues[0].field or None if issues else None,
        errors=fields,
        request_id=scope.get("state", {}).get("request_id"),
    )
    return ProblemResponse(problem.model_dump(), status, headers=dict(headers or {}))


def _allowed(request: Request) -> str:
    """All methods that the path takes: the framework names those of the first route that it tried."""
    matching = [
        route for route in iter_route_contexts(request.app.routes) if route.path_regex.match(request.scope["path"])
    ]
    return ", ".join(sorted({method for route in matching for method in route.methods or ()}))


def _headers(error: D2ftError) -> dict[str, str]:
    if isinstance(error, UnauthorisedError):
        return {"WWW-Authenticate": "Bearer"}
    return {"Retry-After": RETRY_AFTER_S} if isinstance(error, CapacityError | TooManyError) else {}


def _issue(error: Mapping[str, Any], body: Any) -> Issue:
    """One of pydantic's errors; a message about the whole body names its field itself, at its start."""
    source, *path = error["loc"] or ("body",)
    message = error["msg"].removeprefix("Value error, ")
    # A parameter that is given several times is one parameter.
    path = _within(body, path, error["type"] == "missing") if source == "body" else path[:1]
    field = ".".join(map(str, path))
    return Issue(field or _leading_field(message), message, pointer=_pointer(path) if path else "")


def _within(body: Any, loc: Sequence[str | int], missing: bool) -> list[str | int]:
    """Where in the body that is. Pydantic also names which of several types it tried: that is no part of the body."""
    path: list[str | int] = []
    for number, part in enumerate(loc, 1):
        is_there = part in body if isinstance(body, dict) else isinstance(body, list) and part in range(len(body))
        if is_there:
            body = body[part]
        if is_there or (missing and number == len(loc)):
            path.append(part)
    return path


def _sentence(issue: Issue) -> str:
    return issue.message if issue.message.startswith(issue.field) else f"{issue.field}: {issue.message}"


def _leading_field(message: str) -> str:
    found = re.match(r"[a-z_]+(\.[a-z_]+)*", message)
    return found.group() if found and found.group().split(".")[0] in _FIELDS else ""


def _pointer(path: Sequence[str | int]) -> str:
    return "".join(f"/{str(part).replace('~', '~0').replace('/', '~1')}" for part in path)
