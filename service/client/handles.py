"""A job in the hand: the job as it was last seen, and what can be asked of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.schemas import Artifact, Checkpoint, Event, Job, Prediction, TimelineView

if TYPE_CHECKING:
    from service.client.aio import AsyncClient
    from service.client.sync import Client


class _Seen:
    """The job as the service last showed it; `replayed` says that its submit had been taken before."""

    def __init__(self, job: Job, replayed: bool) -> None:
        self.job = job
        self.replayed = replayed

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.job.id} {self.job.status}>"

    @property
    def id(self) -> str:
        return self.job.id

    @property
    def status(self) -> str:
        """As last seen; `refresh` looks again."""
        return self.job.status

    @property
    def is_final(self) -> bool:
        return self.job.is_final


class JobHandle(_Seen):
    """A job and the client to ask; `job` is the newest answer, which every method that gets one keeps."""

    def __init__(self, client: Client, job: Job, *, replayed: bool = False) -> None:
        super().__init__(job, replayed)
        self._client = client

    def refresh(self) -> Job:
        return self._keep(self._client.get(self.id))

    def wait(self, *, timeout_s: float | None = None, poll_s: float = 1.0) -> Job:
        """The job once it has ended. Raises ApiTimeoutError."""
        return self._keep(self._client.wait(self.id, timeout_s=timeout_s, poll_s=poll_s))

    def cancel(self) -> Job:
        return self._keep(self._client.cancel(self.id))

    def pause(self) -> Job:
        return self._keep(self._client.pause(self.id))

    def resume(self) -> Job:
        return self._keep(self._client.resume(self.id))

    def retry(self) -> Job:
        return self._keep(self._client.retry(self.id))

    def events(self, *, after: int = 0, follow: bool = False, timeout_s: float | None = None) -> Iterator[Event]:
        return self._client.events(self.id, after=after, follow=follow, timeout_s=timeout_s)

    def logs(
        self, *, attempt: int | None = None, rank: int | None = None, offset: int = 0, follow: bool = False
    ) -> Iterator[str]:
        return self._client.logs(self.id, attempt=attempt, rank=rank, offset=offset, follow=follow)

    def metrics(self, *, max_points: int = 2000) -> list[dict[str, Any]]:
        """What the steps measured, a row each: as `pandas.DataFrame` takes it."""
        return self._client.metrics(self.id, max_points=max_points).data

    def plan(self) -> dict[str, Any]:
        return self._client.plan(self.id)

    def timeline(self) -> TimelineView:
        return self._client.timeline(self.id)

    def ledger(self) -> dict[str, Any]:
        return self._client.ledger(self.id)

    def checkpoints(self) -> list[Checkpoint]:
        return self._client.checkpoints(self.id).data

    def artifacts(self) -> list[Artifact]:
        return self._client.artifacts(self.id).data

    def download(self, directory: Path, *names: str) -> list[Path]:
        """Fetch these artifacts, or all, into a directory."""
        wanted = names or [artifact.name for artifact in self.artifacts()]
        return [self._client.download(self.id, name, directory) for name in wanted]

    def predict(self, *images: Path | bytes, top: int = 5) -> list[Prediction]:
        """The most probable classes of each image, by the model that came of the job."""
        return self._client.predict(self.id, *images, top=top).data

    def _keep(self, job: Job) -> Job:
        self.job = job
        return job


class AsyncJobHandle(_Seen):
    """`JobHandle`, to be awaited."""

    def __init__(self, client: AsyncClient, job: Job, *, replayed: bool = False) -> None:
        super().__init__(job, replayed)
        self._client = client

    async def refresh(self) -> Job:
        return self._keep(await self._client.get(self.id))

    async def wait(self, *, timeout_s: float | None = None, poll_s: float = 1.0) -> Job:
        """The job once it has ended. Raises ApiTimeoutError."""
        return self._keep(await self._client.wait(self.id, timeout_s=timeout_s, poll_s=poll_s))

    async def cancel(self) -> Job:
        return self._keep(await self._client.cancel(self.id))

    async def pause(self) -> Job:
        return self._keep(await self._client.pause(self.id))

    async def resume(self) -> Job:
        return self._keep(await self._client.resume(self.id))

    async def retry(self) -> Job:
        return self._keep(await self._client.retry(self.id))

    def events(self, *, after: int = 0, follow: bool = False, timeout_s: float | None = None) -> AsyncIterator[Event]:
        return self._client.events(self.id, after=after, follow=follow, timeout_s=timeout_s)

    def logs(
        self, *, attempt: int | None = None, rank: int | None = None, offset: int = 0, follow: bool = False
    ) -> AsyncIterator[str]:
        return self._client.logs(self.id, attempt=attempt, rank=rank, offset=offset, follow=follow)

    async def metrics(self, *, max_points: int = 2000) -> list[dict[str, Any]]:
        """What the steps measured, a row each: as `pandas.DataFrame` takes it."""
        return (await self._client.metrics(self.id, max_points=max_points)).data

    async def plan(self) -> dict[str, Any]:
        return await self._client.plan(self.id)

    async def timeline(self) -> TimelineView:
        return await self._client.timeline(self.id)

    async def ledger(self) -> dict[str, Any]:
        return await self._client.ledger(self.id)

    async def checkpoints(self) -> list[Checkpoint]:
        return (await self._client.checkpoints(self.id)).data

    async def artifacts(self) -> list[Artifact]:
        return (await self._client.artifacts(self.id)).data

    async def download(self, directory: Path, *names: str) -> list[Path]:
        """Fetch these artifacts, or all, into a directory."""
        wanted = names or [artifact.name for artifact in await self.artifacts()]
        return [await self._client.download(self.id, name, directory) for name in wanted]

    async def predict(self, *images: Path | bytes, top: int = 5) -> list[Prediction]:
        """The most probable classes of each image, by the model that came of the job."""
        return (await self._client.predict(self.id, *images, top=top)).data

    def _keep(self, job: Job) -> Job:
        self.job = job
        return job
