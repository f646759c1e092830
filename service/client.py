"""The Python client: typed, synchronous, knows only the wire.

    with Client("http://127.0.0.1:7421", key) as client:
        job = client.submit(JobSpec(steps=200))
        for event in client.events(job.id, follow=True): ...
        client.download(job.id, "model.safetensors", Path("."))

    ApiError                 `problem` is the server's own account, `status` the HTTP status
    ├── ApiInvalidError      422, 413: the request is wrong
    ├── ApiNotFoundError     404
    ├── ApiConflictError     409
    ├── ApiAuthError         401, 403
    ├── ApiBusyError         429, 503: try again later
    ├── ApiServerError       other 5xx
    ├── ApiUnreachableError  no answer
    └── ApiTimeoutError      `wait` ran out of time

What may be sent twice is retried: reads, dry runs, cancels, and submits, which carry an Idempotency-Key always.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, urlsplit

import httpx2
from pydantic import ValidationError
from ulid import ULID

from scheduler.errors import D2ftError
from service.schemas import (
    Artifact,
    DeviceList,
    Event,
    Health,
    Job,
    LedgerView,
    MetricsPage,
    Page,
    PlanView,
    Preview,
    PreviewBody,
    Problem,
)
from workers.contract import JobSpec

RETRIES = 3
RETRY_STATUS = frozenset({429, 502, 503, 504})
SUBMIT_TIMEOUT_S = 90.0  # a first submit may wait for the model catalogue
FOLLOW_PATIENCE_S = 60.0
_CHUNK = 1 << 20


class ApiError(D2ftError):
    """What the server answered instead of what was asked for."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.detail, code=problem.code, param=problem.param)
        self.problem = problem
        self.status = problem.status

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problem,)


class ApiInvalidError(ApiError):
    """The request is wrong."""


class ApiNotFoundError(ApiError):
    """There is no such thing, or not yet."""


class ApiConflictError(ApiError):
    """The job's state does not allow this."""


class ApiAuthError(ApiError):
    """The key is missing or wrong, or the server does not answer to this name."""


class ApiBusyError(ApiError):
    """A part of the service is not ready, or a limit is reached."""


class ApiServerError(ApiError):
    """The service failed."""


class ApiUnreachableError(ApiError):
    """Nobody answered."""


class ApiTimeoutError(ApiError):
    """The job had not ended in time."""


_KINDS: dict[int, type[ApiError]] = {
    401: ApiAuthError,
    403: ApiAuthError,
    404: ApiNotFoundError,
    409: ApiConflictError,
    413: ApiInvalidError,
    422: ApiInvalidError,
    429: ApiBusyError,
    503: ApiBusyError,
}


class Client:
    """One connection to one service."""

    def __init__(
        self, url: str, key: str | None, *, timeout_s: float = 30.0, transport: httpx2.BaseTransport | None = None
    ) -> None:
        headers = {"User-Agent": "d2ft-client/1"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        local = urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
        self._http = httpx2.Client(
            base_url=url, headers=headers, timeout=timeout_s, transport=transport, trust_env=not local
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def submit(self, spec: JobSpec | dict[str, Any], *, idempotency_key: str | None = None) -> Job:
        """Put a job into the queue."""
        body = spec.model_dump(mode="json") if isinstance(spec, JobSpec) else spec
        headers = {"Idempotency-Key": idempotency_key or str(ULID())}
        return Job.model_validate(self._call("POST", "/v1/jobs", json=body, headers=headers, timeout=SUBMIT_TIMEOUT_S))

    def get(self, job_id: str) -> Job:
        return Job.model_validate(self._call("GET", _path(job_id)))

    def list(self, *, after: str | None = None, limit: int = 20, status: str | None = None) -> Page[Job]:
        """One page of jobs, newest first."""
        params = {"after": after, "limit": limit, "status": status}
        asked = {name: value for name, value in params.items() if value is not None}
        return Page[Job].model_validate(self._call("GET", "/v1/jobs", params=asked))

    def cancel(self, job_id: str) -> Job:
        return Job.model_validate(self._call("POST", f"{_path(job_id)}/cancel"))

    def events(
        self, job_id: str, *, after: int = 0, follow: bool = False, timeout_s: float | None = None
    ) -> Iterator[Event]:
        """The job's history from `after` on; with `follow` live, over broken connections, until the job has ended.

        Raises ApiTimeoutError when following takes longer than `timeout_s`.
        """
        return self._follow(job_id, after, timeout_s) if follow else self._page_events(job_id, after)

    def wait(self, job_id: str, *, timeout_s: float | None = None, poll_s: float = 1.0) -> Job:
        """The job once it has ended. Raises ApiTimeoutError."""
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while not (job := self.get(job_id)).is_final:
            _check_deadline(job_id, deadline)
            time.sleep(poll_s)
        return job

    def metrics(self, job_id: str, *, max_points: int = 2000) -> MetricsPage:
        return MetricsPage.model_validate(
            self._call("GET", f"{_path(job_id)}/metrics", params={"max_points": max_points})
        )

    def plan(self, job_id: str) -> dict[str, Any]:
        return PlanView.model_validate(self._call("GET", f"{_path(job_id)}/plan")).plan

    def plans(self, body: PreviewBody | dict[str, Any]) -> Preview:
        """A dry run: the plan that a job would get, with its reasons; nothing is started."""
        asked = body.model_dump(mode="json") if isinstance(body, PreviewBody) else body
        return Preview.model_validate(self._call("POST", "/v1/plans", json=asked, timeout=SUBMIT_TIMEOUT_S))

    def devices(self) -> DeviceList:
        """The devices that jobs have measured."""
        return DeviceList.model_validate(self._call("GET", "/v1/devices"))

    def ledger(self, job_id: str) -> dict[str, Any]:
        return LedgerView.model_validate(self._call("GET", f"{_path(job_id)}/ledger")).ledger

    def logs(self, job_id: str) -> str:
        """What the newest attempt's driver printed."""
        return self._request("GET", f"{_path(job_id)}/logs").text

    def artifacts(self, job_id: str) -> Page[Artifact]:
        return Page[Artifact].model_validate(self._call("GET", f"{_path(job_id)}/artifacts"))

    def download(self, job_id: str, name: str, directory: Path) -> Path:
        """Fetch one artifact into a directory; the file appears whole or not at all."""
        target = directory / Path(name).name
        draft = target.with_name(f".{target.name}.part")
        directory.mkdir(parents=True, exist_ok=True)
        with self._opened(f"{_path(job_id)}/artifacts/{quote(name)}") as answer, draft.open("wb") as file:
            for chunk in answer.iter_bytes(_CHUNK):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        return draft.replace(target)

    def ready(self) -> dict[str, str]:
        """What `/readyz` says of each part; its 503 is an answer, too."""
        try:
            answer = self._http.get("/readyz")
            return Health.model_validate_json(answer.content).checks
        except httpx2.TransportError as error:
            raise _unreachable(self._http, error) from error
        except ValidationError:
            raise _error(answer) from None

    def _page_events(self, job_id: str, after: int) -> Iterator[Event]:
        while True:
            page = Page[Event].model_validate(
                self._call("GET", f"{_path(job_id)}/events", params={"after": after, "limit": 100})
            )
            yield from page.data
            if not page.has_more:
                return
            after = page.data[-1].seq

    def _follow(self, job_id: str, after: int, timeout_s: float | None) -> Iterator[Event]:
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        lost_at: float | None = None
        while True:
            try:
                for event in self._stream(job_id, after, deadline):
                    after, lost_at = event.seq, None
                    yield event
                if self.get(job_id).is_final:
                    return
            except (httpx2.TransportError, ApiUnreachableError, ApiBusyError, ApiServerError) as error:
                _check_deadline(job_id, deadline)
                lost_at = lost_at or time.monotonic()
                if time.monotonic() - lost_at > FOLLOW_PATIENCE_S:
                    raise _unreachable(self._http, error) from error
            time.sleep(0.5)

    def _stream(self, job_id: str, after: int, deadline: float) -> Iterator[Event]:
        # A heartbeat comes every 15 s; twice that without one, and the connection is dead.
        patience = min(30.0, max(0.1, deadline - time.monotonic()))
        path, headers = f"{_path(job_id)}/events", {"Last-Event-ID": str(after)}
        with self._http.sse(path, headers=headers, timeout=httpx2.Timeout(patience, connect=5.0)) as source:
            if not source.response.is_success:
                source.response.read()
                raise _error(source.response)
            for sent in source:
                if sent.data:
                    yield Event.model_validate_json(sent.data)
                _check_deadline(job_id, deadline)

    def _call(self, method: str, path: str, **options: Any) -> Any:
        return self._request(method, path, **options).json()

    def _request(self, method: str, path: str, **options: Any) -> httpx2.Response:
        for tries in range(RETRIES + 1):
            try:
                answer = self._http.request(method, path, **options)
            except httpx2.TransportError as error:
                if tries == RETRIES or isinstance(error, httpx2.ReadTimeout):
                    raise _unreachable(self._http, error) from error
            else:
                if answer.is_success:
                    return answer
                if answer.status_code not in RETRY_STATUS or tries == RETRIES:
                    raise _error(answer)
            time.sleep(0.2 * 2**tries)
        raise AssertionError("the last try returns or raises")

    @contextmanager
    def _opened(self, path: str) -> Iterator[httpx2.Response]:
        """A streamed answer. Raises ApiError."""
        try:
            with self._http.stream("GET", path) as answer:
                if not answer.is_success:
                    answer.read()
                    raise _error(answer)
                yield answer
        except httpx2.TransportError as error:
            raise _unreachable(self._http, error) from error


def _path(job_id: str) -> str:
    return f"/v1/jobs/{quote(job_id, safe='')}"


def _error(answer: httpx2.Response) -> ApiError:
    try:
        problem = Problem.model_validate_json(answer.content)
    except ValidationError:
        detail = f"The server answered {answer.status_code} with something that is not a problem document."
        problem = _problem(answer.status_code, "unknown", detail)
    kind = _KINDS.get(answer.status_code, ApiServerError if answer.status_code >= 500 else ApiError)
    return kind(problem)


def _unreachable(http: httpx2.Client, error: Exception) -> ApiUnreachableError:
    detail = f"No answer from {http.base_url}: {error or type(error).__name__}. Is it up? Start it with 'd2ft up'."
    return ApiUnreachableError(_problem(0, "unreachable", detail))


def _check_deadline(job_id: str, deadline: float) -> None:
    if time.monotonic() >= deadline:
        raise _timed_out(job_id)


def _timed_out(job_id: str) -> ApiTimeoutError:
    return ApiTimeoutError(_problem(0, "timeout", f"Job {job_id} had not ended in the time given; it goes on."))


def _problem(status: int, code: str, detail: str) -> Problem:
    return Problem(title=code, status=status, detail=detail, code=code)
