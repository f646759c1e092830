"""The Python client: typed, sync and async, knows only the wire.

    with Client("http://127.0.0.1:7421", key) as client:
        job = client.submit(JobSpec(steps=200))
        for text in job.logs(follow=True): ...
        job.wait()
        job.download(Path("result"))

    sync, aio      Client and AsyncClient: thin shells over the same flows, so they cannot drift
    handles        a job in the hand
    live, fetch    following over broken connections; downloads that resume and are hashed
    flows          asking with retries, pages, waiting: generators of steps, no I/O
    calls          requests as values, and how answers are read; filters, what lists are narrowed by
    errors         what comes instead of an answer

What may be sent twice is retried with growing pauses, and `Retry-After` is heeded; see `calls`. Fields and states of a
newer service are passed over.
"""

from service.client.aio import AsyncClient
from service.client.errors import (
    ApiAuthError,
    ApiBusyError,
    ApiConflictError,
    ApiCorruptError,
    ApiError,
    ApiInvalidError,
    ApiNotFoundError,
    ApiServerError,
    ApiTimeoutError,
    ApiUnreachableError,
)
from service.client.filters import JobFilter, ModelFilter, SweepFilter
from service.client.handles import AsyncJobHandle, JobHandle
from service.client.sync import Client

__all__ = [
    "ApiAuthError",
    "ApiBusyError",
    "ApiConflictError",
    "ApiCorruptError",
    "ApiError",
    "ApiInvalidError",
    "ApiNotFoundError",
    "ApiServerError",
    "ApiTimeoutError",
    "ApiUnreachableError",
    "AsyncClient",
    "AsyncJobHandle",
    "Client",
    "JobFilter",
    "JobHandle",
    "ModelFilter",
    "SweepFilter",
]
