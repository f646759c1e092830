"""Ray's Jobs API over plain HTTP: no Ray import, a fraction of its client's memory.

| call | Ray 2.60 |
|---|---|
| submit | POST /api/jobs/; a known submission_id is HTTP 500 that says "already exists", which here counts as success |
| status | GET /api/jobs/ID; 404 when unknown |
| stop | POST /api/jobs/ID/stop; SIGTERM, then SIGKILL after the job's own RAY_JOB_STOP_WAIT_TIME_S |
| logs | GET /api/jobs/ID/logs |
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar

import httpx2

from service.errors import UnavailableError
from service.meters import Meters

RUNNING = frozenset({"PENDING", "RUNNING"})
_TIMEOUT = httpx2.Timeout(10.0, connect=3.0)
P = ParamSpec("P")
T = TypeVar("T")
Answer = Coroutine[Any, Any, T]


@dataclass(frozen=True)
class RayJob:
    """One job as Ray knows it. Status: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""

    submission_id: str
    status: str
    message: str
    metadata: dict[str, str]

    @property
    def is_over(self) -> bool:
        return self.status not in RUNNING


def _metered(call: Callable[Concatenate[RayJobs, P], Answer[T]]) -> Callable[Concatenate[RayJobs, P], Answer[T]]:
    @functools.wraps(call)
    async def metered(self: RayJobs, /, *given: P.args, **named: P.kwargs) -> T:
        with self._meters.ray_call(call.__name__):
            return await call(self, *given, **named)

    return metered


class RayJobs:
    """The calls that the supervisor makes. Every one raises UnavailableError when Ray does not answer as it should."""

    def __init__(
        self,
        address: str,
        token: str | None,
        transport: httpx2.AsyncBaseTransport | None = None,
        meters: Meters | None = None,
    ) -> None:
        self._meters = meters or Meters()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        # trust_env off: a proxy from the environment has no business between us and Ray.
        self._http = httpx2.AsyncClient(
            base_url=address, headers=headers, timeout=_TIMEOUT, transport=transport, trust_env=False
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def ping(self) -> None:
        """Raise unless the Jobs API answers."""
        await self.list()

    @_metered
    async def submit(
        self, submission_id: str, entrypoint: str, env_vars: dict[str, str], metadata: dict[str, str]
    ) -> None:
        """Start a driver, at most once for an id however often it is asked."""
        body = {
            "submission_id": submission_id,
            "entrypoint": entrypoint,
            "runtime_env": {"env_vars": env_vars},
            "metadata": metadata,
        }
        answer = await self._send("POST", "/api/jobs/", json=body)
        if answer.status_code == 500 and "already exists" in answer.text:
            return
        _check(answer)

    @_metered
    async def get(self, submission_id: str) -> RayJob | None:
        """The job, or None when Ray does not know it."""
        answer = await self._send("GET", f"/api/jobs/{submission_id}")
        return None if answer.status_code == 404 else _job(_check(answer).json())

    @_metered
    async def list(self) -> list[RayJob]:
        return [_job(item) for item in _check(await self._send("GET", "/api/jobs/")).json()]

    @_metered
    async def stop(self, submission_id: str) -> None:
        answer = await self._send("POST", f"/api/jobs/{submission_id}/stop")
        if answer.status_code != 404:
            _check(answer)

    @_metered
    async def logs(self, submission_id: str) -> str | None:
        """What the driver printed, or None when Ray does not know it."""
        answer = await self._send("GET", f"/api/jobs/{submission_id}/logs")
        if answer.status_code == 404:
            return None
        return str(_check(answer).json().get("logs") or "")

    @_metered
    async def resources(self) -> dict[str, float]:
        """What all nodes together offer, used or not; empty where Ray does not say."""
        answer = _check(await self._send("GET", "/api/cluster_status"))
        report = ((answer.json().get("data") or {}).get("clusterStatus") or {}).get("loadMetricsReport") or {}
        return {name: float(total) for name, (_, total) in (report.get("usage") or {}).items()}

    async def _send(self, method: str, path: str, **options: Any) -> httpx2.Response:
        try:
            return await self._http.request(method, path, **options)
        except httpx2.TransportError as error:
            message = f"Ray at {self._http.base_url} does not answer: {error or type(error).__name__}."
            raise UnavailableError(message, code="ray_unreachable", remedy="See logs/ray.log in D2FT_HOME.") from error


def _check(answer: httpx2.Response) -> httpx2.Response:
    if answer.is_success:
        return answer
    if answer.status_code in (401, 403):
        message = "Ray refuses our token."
        raise UnavailableError(message, code="ray_refused", remedy="Set D2FT_RAY_TOKEN_PATH to the cluster's token.")
    raise UnavailableError(f"Ray answered {answer.status_code}: {answer.text[-300:]}", code="ray_error")


def _job(item: dict[str, Any]) -> RayJob:
    return RayJob(
        submission_id=item.get("submission_id") or "",
        status=str(item.get("status") or "PENDING"),
        message=str(item.get("message") or ""),
        metadata=item.get("metadata") or {},
    )
