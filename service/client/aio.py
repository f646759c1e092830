"""`AsyncClient`: what `Client` is, to be awaited."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import AsyncIterator, Mapping
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import httpx2

from service.client import calls, fetch, flows, live
from service.client.calls import Answer, Call
from service.client.connection import connection, request_of
from service.client.filters import JobFilter, ModelFilter, SweepFilter
from service.client.flows import RETRIES, TIMEOUT_S, Close, Done, Failed, Flow, Give, Open, Patience, Read, Send, Sleep
from service.client.handles import AsyncJobHandle
from service.schemas import (
    Artifact,
    Checkpoint,
    Dataset,
    Delivery,
    DeviceList,
    Event,
    Job,
    Key,
    KeyBody,
    Me,
    MetricsPage,
    Model,
    Page,
    PredictionList,
    Preview,
    PreviewBody,
    RunBegun,
    RunPlace,
    SampleList,
    Sweep,
    TimelineView,
    User,
    UserBody,
    UserChange,
    Webhook,
    WebhookBody,
)
from workers.contract import JobSpec
from workers.sweeps.contract import SweepSpec

Value = TypeVar("Value")


class AsyncClient:
    """One connection to one service, for one event loop."""

    def __init__(
        self,
        url: str,
        key: str | None,
        *,
        timeout_s: float = TIMEOUT_S,
        retries: int = RETRIES,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self._http = httpx2.AsyncClient(**connection(url, key, timeout_s), transport=transport)
        self._patience = Patience(url, retries)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def submit(self, spec: JobSpec | Mapping[str, Any], *, idempotency_key: str | None = None) -> AsyncJobHandle:
        """Put a job into the queue; sent again with the same key, it is the same job."""
        made, replayed = await self._ask(calls.submit(spec, idempotency_key))
        return AsyncJobHandle(self, made, replayed=replayed)

    async def job(self, job_id: str) -> AsyncJobHandle:
        """A job in the hand. Raises ApiNotFoundError."""
        return AsyncJobHandle(self, await self.get(job_id))

    async def get(self, job_id: str) -> Job:
        return await self._ask(calls.get_job(job_id))

    async def list(self, *, after: str | None = None, limit: int = 20, **wanted: Unpack[JobFilter]) -> Page[Job]:
        """One page of jobs, newest first."""
        return await self._ask(calls.list_jobs(after, limit, wanted))

    def jobs(self, **wanted: Unpack[JobFilter]) -> AsyncIterator[Job]:
        """All jobs, newest first, page by page."""
        return self._iterate(flows.pages(lambda after: calls.list_jobs(after, calls.MAX_PAGE, wanted), self._patience))

    async def cancel(self, job_id: str) -> Job:
        return await self._ask(calls.act(job_id, "cancel"))

    async def pause(self, job_id: str) -> Job:
        return await self._ask(calls.act(job_id, "pause"))

    async def resume(self, job_id: str) -> Job:
        return await self._ask(calls.act(job_id, "resume"))

    async def retry(self, job_id: str) -> Job:
        return await self._ask(calls.act(job_id, "retry"))

    async def begin_run(
        self,
        spec: JobSpec | Mapping[str, Any],
        where: RunPlace | Mapping[str, Any] | None = None,
        *,
        idempotency_key: str | None = None,
    ) -> RunBegun:
        """List a run that is started elsewhere; the answer has the token with which it posts its events."""
        return await self._ask(calls.begin_run(spec, where, idempotency_key))

    async def submit_sweep(self, spec: SweepSpec | Mapping[str, Any], *, idempotency_key: str | None = None) -> Sweep:
        """Put a sweep into the queue; sent again with the same key, it is the same sweep."""
        return (await self._ask(calls.submit_sweep(spec, idempotency_key)))[0]

    async def sweep(self, sweep_id: str) -> Sweep:
        """A sweep with its trials, points, fronts and knee. `events`, `logs` and `artifacts` take its id, too."""
        return await self._ask(calls.get_sweep(sweep_id))

    async def list_sweeps(
        self, *, after: str | None = None, limit: int = 20, **wanted: Unpack[SweepFilter]
    ) -> Page[Sweep]:
        """One page of sweeps, newest first, without their trials."""
        return await self._ask(calls.list_sweeps(after, limit, wanted))

    def sweeps(self, **wanted: Unpack[SweepFilter]) -> AsyncIterator[Sweep]:
        """All sweeps, newest first, page by page."""
        return self._iterate(
            flows.pages(lambda after: calls.list_sweeps(after, calls.MAX_PAGE, wanted), self._patience)
        )

    async def cancel_sweep(self, sweep_id: str) -> Sweep:
        """End a sweep and its trials."""
        return await self._ask(calls.act_on_sweep(sweep_id, "cancel"))

    async def retry_sweep(self, sweep_id: str) -> Sweep:
        return await self._ask(calls.act_on_sweep(sweep_id, "retry"))

    async def wait_sweep(self, sweep_id: str, *, timeout_s: float | None = None, poll_s: float = 1.0) -> Sweep:
        """The sweep once it has ended. Raises ApiTimeoutError."""
        return await self._run(flows.wait_sweep(sweep_id, timeout_s, poll_s, self._patience))

    async def wait(self, job_id: str, *, timeout_s: float | None = None, poll_s: float = 1.0) -> Job:
        """The job once it has ended; outages of up to a minute are borne. Raises ApiTimeoutError."""
        return await self._run(flows.wait(job_id, timeout_s, poll_s, self._patience))

    def events(
        self, job_id: str, *, after: int = 0, follow: bool = False, timeout_s: float | None = None
    ) -> AsyncIterator[Event]:
        """The job's history from `after` on; with `follow` live, over broken connections, until the job has ended.

        Raises ApiTimeoutError when following takes longer than `timeout_s`.
        """
        if follow:
            return self._iterate(live.follow_events(job_id, after, timeout_s, self._patience))
        return self._iterate(live.page_events(job_id, after, self._patience))

    def logs(
        self,
        job_id: str,
        *,
        attempt: int | None = None,
        rank: int | None = None,
        offset: int = 0,
        follow: bool = False,
        timeout_s: float | None = None,
    ) -> AsyncIterator[str]:
        """What the driver, or the worker `rank`, printed, in pieces: of the newest attempt, from byte `offset` on.

        With `follow` live, over broken connections, through later attempts until the job has ended; of one `attempt`
        until that has. Raises ApiTimeoutError when following takes longer than `timeout_s`.
        """
        if follow:
            return self._iterate(live.follow_log(job_id, attempt, rank, offset, timeout_s, self._patience))
        return self._iterate(live.read_log(job_id, attempt, rank, offset, self._patience))

    async def metrics(self, job_id: str, *, max_points: int = 2000) -> MetricsPage:
        return await self._ask(calls.metrics(job_id, max_points))

    async def plan(self, job_id: str) -> dict[str, Any]:
        """The newest plan of a job."""
        return await self._ask(calls.plan(job_id))

    async def timeline(self, job_id: str) -> TimelineView:
        """A step as the newest plan forecasts it, and one as it was measured last."""
        return await self._ask(calls.timeline(job_id))

    async def ledger(self, job_id: str) -> dict[str, Any]:
        return await self._ask(calls.ledger(job_id))

    async def checkpoints(self, job_id: str) -> Page[Checkpoint]:
        return await self._ask(calls.list_checkpoints(job_id))

    async def artifacts(self, job_id: str) -> Page[Artifact]:
        return await self._ask(calls.list_artifacts(job_id))

    async def download(self, job_id: str, name: str, directory: Path) -> Path:
        """Fetch one artifact into a directory; the file appears whole and with the server's SHA-256, or not at all."""
        return await self._run(fetch.download(job_id, name, directory, self._patience))

    async def predict(self, job_id: str, *images: Path | bytes, top: int = 5) -> PredictionList:
        """What the model of a job that has succeeded says of images: the most probable classes of each."""
        return await self._run(fetch.predict(job_id, images, top, self._patience))

    async def plans(self, body: PreviewBody | Mapping[str, Any]) -> Preview:
        """A dry run: the plan that a job would get, with its reasons; nothing is started."""
        return await self._ask(calls.preview(body))

    async def devices(self) -> DeviceList:
        """The devices that jobs have measured."""
        return await self._ask(calls.list_devices())

    def models(self, **wanted: Unpack[ModelFilter]) -> AsyncIterator[Model]:
        """The models that can be trained, or, by `supported`, the others and why they cannot; page by page."""
        return self._iterate(flows.pages(lambda after: calls.list_models(after, wanted), self._patience))

    async def model(self, name: str) -> Model:
        return await self._ask(calls.get_model(name))

    async def add_dataset(self, name: str, uri: str) -> Dataset:
        """Register an image folder, for `dataset: "dataset:NAME"` in jobs."""
        return await self._ask(calls.add_dataset(name, uri))

    def datasets(self, *, search: str | None = None) -> AsyncIterator[Dataset]:
        """Registered datasets, newest first, without their classes."""
        return self._iterate(flows.pages(lambda after: calls.list_datasets(after, search), self._patience))

    async def dataset(self, dataset_id: str) -> Dataset:
        """One dataset, by its id or its name."""
        return await self._ask(calls.get_dataset(dataset_id))

    async def inspect_dataset(self, dataset_id: str) -> Dataset:
        """Have the service list the folder again."""
        return await self._ask(calls.inspect_dataset(dataset_id))

    async def remove_dataset(self, dataset_id: str) -> Dataset:
        """Forget a dataset; its files stay."""
        return await self._ask(calls.remove_dataset(dataset_id))

    async def samples(
        self, dataset_id: str, *, split: str = "train", per_class: int | None = None, limit: int | None = None
    ) -> SampleList:
        """A few images of every class, small."""
        return await self._ask(calls.samples(dataset_id, split, per_class, limit))

    async def me(self) -> Me:
        """Who the key belongs to, and what it may do."""
        return await self._ask(calls.me())

    async def keys(self) -> builtins.list[Key]:
        return (await self._ask(calls.list_keys())).data

    async def make_key(self, body: KeyBody | Mapping[str, Any]) -> Key:
        """A new key; only this answer ever shows it."""
        return await self._ask(calls.make_key(body))

    async def revoke_key(self, key_id: str) -> Key:
        return await self._ask(calls.revoke_key(key_id))

    async def users(self) -> builtins.list[User]:
        return (await self._ask(calls.list_users())).data

    async def make_user(self, body: UserBody | Mapping[str, Any]) -> User:
        return await self._ask(calls.make_user(body))

    async def change_user(self, user_id: str, change: UserChange | Mapping[str, Any]) -> User:
        """Change what is given; the rest stays."""
        return await self._ask(calls.change_user(user_id, change))

    async def webhooks(self) -> builtins.list[Webhook]:
        return (await self._ask(calls.list_webhooks())).data

    async def add_webhook(self, body: WebhookBody | Mapping[str, Any]) -> Webhook:
        """A new webhook; only this answer ever shows its secret."""
        return await self._ask(calls.add_webhook(body))

    async def webhook(self, webhook_id: str) -> Webhook:
        return await self._ask(calls.get_webhook(webhook_id))

    async def remove_webhook(self, webhook_id: str) -> Webhook:
        return await self._ask(calls.remove_webhook(webhook_id))

    def deliveries(self, webhook_id: str) -> AsyncIterator[Delivery]:
        """The messages to a webhook, newest first, page by page."""
        return self._iterate(flows.pages(lambda after: calls.list_deliveries(webhook_id, after), self._patience))

    async def test_webhook(self, webhook_id: str) -> Delivery:
        """Have a message sent to a webhook now."""
        return await self._ask(calls.test_webhook(webhook_id))

    async def ready(self) -> dict[str, str]:
        """What each part of the service says of itself: "ok", or what is wrong."""
        return await self._ask(calls.ready())

    async def _ask(self, call: Call[Value]) -> Value:
        return await self._run(flows.ask(call, self._patience))

    async def _run(self, flow: Flow[Value]) -> Value:
        with closing(flow):
            async with _Hands(self._http) as hands:
                step = flows.advance(flow, None)
                while not isinstance(step, Done):
                    step = flows.advance(flow, await hands.carry_out(step))
        value: Value = step.value
        return value

    async def _iterate(self, flow: Flow[Any]) -> AsyncIterator[Any]:
        with closing(flow):
            async with _Hands(self._http) as hands:
                step = flows.advance(flow, None)
                while not isinstance(step, Done):
                    if isinstance(step, Give):
                        yield step.item
                    step = flows.advance(flow, await hands.carry_out(step))


class _Hands:
    """Carries out the steps of one flow; holds the stream that is open."""

    def __init__(self, http: httpx2.AsyncClient) -> None:
        self._http = http
        self._open: httpx2.Response | None = None
        self._chunks: AsyncIterator[bytes] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._close()

    async def carry_out(self, step: flows.Step) -> Any:
        """What comes of a step; an error as a value, for the flow to judge."""
        try:
            match step:
                case Send(call):
                    found = await self._http.send(self._http.build_request(**request_of(call)))
                    return Answer(found.status_code, found.headers, found.content)
                case Open(call):
                    return await self._begin(call)
                case Read():
                    return None if self._chunks is None else await anext(self._chunks, None)
                case Close():
                    return await self._close()
                case Sleep(seconds):
                    return await asyncio.sleep(seconds)
                case flows.Work(run):
                    return await asyncio.to_thread(run)
        except Exception as error:
            return Failed(error)
        return None

    async def _begin(self, call: Call[Any]) -> Answer:
        await self._close()
        found = self._open = await self._http.send(self._http.build_request(**request_of(call)), stream=True)
        if not found.is_success:
            await found.aread()
            await self._close()
            return Answer(found.status_code, found.headers, found.content)
        self._chunks = found.aiter_bytes()
        return Answer(found.status_code, found.headers)

    async def _close(self) -> None:
        if self._open is not None:
            self._chunks = None
            await self._open.aclose()
            self._open = None
