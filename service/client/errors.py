"""What can come instead of an answer, as one tree; which kind follows from the HTTP status.

ApiError                 `problem` is the server's own account, `status` the HTTP status, `request_id` for its logs
├── ApiInvalidError      422, 415, 413, 400: the request is wrong
├── ApiNotFoundError     404
├── ApiConflictError     409
├── ApiAuthError         401, 403
├── ApiBusyError         429, 503: try again, at the earliest after `retry_after_s`
├── ApiServerError       other 5xx, or an answer that cannot be read
├── ApiUnreachableError  no answer
├── ApiTimeoutError      the time given to wait or follow ran out
└── ApiCorruptError      a download is not what the server has
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from scheduler.errors import D2ftError
from service.schemas import Problem


class ApiError(D2ftError):
    """What the server answered instead of what was asked for."""

    def __init__(self, problem: Problem, *, retry_after_s: float | None = None) -> None:
        tag = f" (request {problem.request_id})" if problem.request_id else ""
        super().__init__(f"{problem.detail}{tag}", code=problem.code, param=problem.param)
        self.problem = problem
        self.status = problem.status
        self.request_id = problem.request_id
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.problem, self.retry_after_s)


class ApiInvalidError(ApiError):
    """The request is wrong."""


class ApiNotFoundError(ApiError):
    """There is no such thing, or not yet."""


class ApiConflictError(ApiError):
    """The thing's state does not allow this."""


class ApiAuthError(ApiError):
    """The key is missing, wrong or too weak, or the server does not answer to this name."""


class ApiBusyError(ApiError):
    """A part of the service is not ready, or a limit is reached."""


class ApiServerError(ApiError):
    """The service failed, or what answers is not the service."""


class ApiUnreachableError(ApiError):
    """Nobody answered."""


class ApiTimeoutError(ApiError):
    """What was waited for had not come in time."""


class ApiCorruptError(ApiError):
    """What was downloaded is not what the server has."""


_KINDS: dict[int, type[ApiError]] = {
    400: ApiInvalidError,
    401: ApiAuthError,
    403: ApiAuthError,
    404: ApiNotFoundError,
    409: ApiConflictError,
    413: ApiInvalidError,
    415: ApiInvalidError,
    422: ApiInvalidError,
    429: ApiBusyError,
    503: ApiBusyError,
}


def error_of(status: int, content: bytes, retry_after_s: float | None) -> ApiError:
    """The error that an answer stands for; one that is no problem document comes from something before the service."""
    try:
        told = Problem.model_validate_json(content)
    except ValidationError:
        told = problem(
            "unknown", f"The server answered {status} with something that is not a problem document.", status
        )
    kind = _KINDS.get(status, ApiServerError if status >= 500 else ApiError)
    return kind(told, retry_after_s=retry_after_s)


def unreadable(status: int) -> ApiServerError:
    detail = f"The answer ({status}) is not what was asked for; is this the address of the service?"
    return ApiServerError(problem("unreadable", detail, status))


def unreachable(url: str, error: Exception) -> ApiUnreachableError:
    reason = str(error).rstrip(".") or type(error).__name__
    detail = f"No answer from {url}: {reason}. Is it up? Start it with 'd2ft up'."
    return ApiUnreachableError(problem("unreachable", detail))


def timed_out(job_id: str) -> ApiTimeoutError:
    return ApiTimeoutError(problem("timeout", f"Job {job_id} had not ended in the time given; it goes on."))


def corrupt(name: str) -> ApiCorruptError:
    detail = f"What came of '{name}' does not have the SHA-256 that the server told; nothing was kept of it."
    return ApiCorruptError(problem("corrupt", detail))


def problem(code: str, detail: str, status: int = 0) -> Problem:
    return Problem(title=code, status=status, detail=detail, code=code)


def _rebuild(kind: type[ApiError], told: Problem, retry_after_s: float | None) -> ApiError:
    return kind(told, retry_after_s=retry_after_s)
