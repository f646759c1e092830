"""`Client`: one connection to one service; each method a flow, carried out here step by step."""

from __future__ import annotations

import builtins
import time
from collections.abc import Iterator, Mapping
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
from service.client.handles import JobHandle
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


class Client:
    """One connection to one service; may be shared between threads."""

    def __init__(
        self,
        url: str,
        key: str | None,
        *,
        timeout_s: float = TIMEOUT_S,
        retries: int = RETRIES,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        self._http = httpx2.Client(**connection(url, key, timeout_s), transport=transport)
        self._patience = Patience(url, retries)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def submit(self, spec: JobSpec | Mapping[str, Any], *, idempotency_key: str | None = None) -> JobHandle:
        """Put a job into the queue; sent again with the same key, it is the same job."""
        made, replayed = self._ask(calls.submit(spec, idempotency_key))
        return JobHandle(self, made, replayed=replayed)

    def job(self, job_id: str) -> JobHandle:
        """A job in the hand. Raises ApiNotFoundError."""
        return JobHandle(self, self.get(job_id))

    def get(self, job_id: str) -> Job:
        return self._ask(calls.get_job(job_id))

    def list(self, *, after: str | None = None, limit: int = 20, **wanted: Unpack[JobFilter]) -> Page[Job]:
        """One page of jobs, newest first."""
        return self._ask(calls.list_jobs(after, limit, wanted))

    def jobs(self, **wanted: Unpack[JobFilter]) -> Iterator[Job]:
        """All jobs, newest first, page by page."""
        return self._iterate(flows.pages(lambda after: calls.list_jobs(after, calls.MAX_PAGE, wanted), self._patience))

    def cancel(self, job_id: str) -> Job:
        return self._ask(calls.act(job_id, "cancel"))

    def pause(self, job_id: str) -> Job:
        return self._ask(calls.act(job_id, "pause"))

    def resume(self, job_id: str) -> Job:
        return self._ask(calls.act(job_id, "resume"))

    def retry(self, job_id: str) -> Job:
        return self._ask(calls.act(job_id, "retry"))

    def begin_run(
        self,
        spec: JobSpec | Mapping[str, Any],
        where: RunPlace | Mapping[str, Any] | None = None,
        *,
        idempotency_key: str | None = None,
    ) -> RunBegun:
        """List a run that is started elsewhere; the answer has the token with which it posts its events."""
        return self._ask(calls.begin_run(spec, where, idempotency_key))

    def submit_sweep(self, spec: SweepSpec | Mapping[str, Any], *, idempotency_key: str | None = None) -> Sweep:
        """Put a sweep into the queue; sent again with the same key, it is the same sweep."""
        return (self._ask(calls.submit_sweep(spec, idempotency_key)))[0]

    def sweep(self, sweep_id: str) -> Sweep:
        """A sweep with its trials, points, fronts and knee. `events`, `logs` and `artifacts` take its id, too."""
        return self._ask(calls.get_sweep(sweep_id))

    def list_sweeps(self, *, after: str | None = None, limit: int = 20, **wanted: Unpack[SweepFilter]) -> Page[Sweep]:
        """One page of sweeps, newest first, without their trials."""
        return self._ask(calls.list_sweeps(after, limit, wanted))

    def sweeps(self, **wanted: Unpack[SweepFilter]) -> Iterator[Sweep]:
        """All sweeps, newest first, page by page."""
        return self._iterate(
            flows.pages(lambda after: calls.list_sweeps(after, calls.MAX_PAGE, wanted), self._patience)
        )

    def cancel_sweep(self, sweep_id: str) -> Sweep:
        """End a sweep and its trials."""
        return self._ask(calls.act_on_sweep(sweep_id, "cancel"))

    def retry_sweep(self, sweep_id: str) -> Sweep:
        return self._ask(calls.act_on_sweep(sweep_id, "retry"))

    def wait_sweep(self, sweep_id: str, *, timeout_s: float | None = None, poll_s: float = 1.0) -> Sweep:
        """The sweep once it has ended. Raises ApiTimeoutError."""
        return self._run(flows.wait_sweep(sweep_id, timeout_s, poll_s, self._patience))

    def wait(self, job_id: str, *, timeout_s: float | None = None, poll_s: float = 1.0) -> Job:
        """The job once it has ended; outages of up to a minute are borne. Raises ApiTimeoutError."""
        return self._run(flows.wait(job_id, timeout_s, poll_s, self._patience))

    def events(
        self, job_id: str, *, after: int = 0, follow: bool = False, timeout_s: float | None = None
    ) -> Iterator[Event]:
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
    ) -> Iterator[str]:
        """What the driver, or the worker `rank`, printed, in pieces: of the newest attempt, from byte `offset` on.

        With `follow` live, over broken connections, through later attempts until the job has ended; of one `attempt`
        until that has. Raises ApiTimeoutError when following takes longer than `timeout_s`.
        """
        if follow:
            return self._iterate(live.follow_log(job_id, attempt, rank, offset, timeout_s, self._patience))
        return self._iterate(live.read_log(job_id, attempt, rank, offset, self._patience))

    def metrics(self, job_id: str, *, max_points: int = 2000) -> MetricsPage:
        return self._ask(calls.metrics(job_id, max_points))

    def plan(self, job_id: str) -> dict[str, Any]:
        """The newest plan of a job."""
        return self._ask(calls.plan(job_id))

    def timeline(self, job_id: str) -> TimelineView:
        """A step as the newest plan forecasts it, and one as it was measured last."""
        return self._ask(calls.timeline(job_id))

    def ledger(self, job_id: str) -> dict[str, Any]:
        return self._ask(calls.ledger(job_id))

    def checkpoints(self, job_id: str) -> Page[Checkpoint]:
        return self._ask(calls.list_checkpoints(job_id))

    def artifacts(self, job_id: str) -> Page[Artifact]:
        return self._ask(calls.list_artifacts(job_id))

    def download(self, job_id: str, name: str, directory: Path) -> Path:
        """Fetch one artifact into a directory; the file appears whole and with the server's SHA-256, or not at all."""
        return self._run(fetch.download(job_id, name, directory, self._patience))

    def predict(self, job_id: str, *images: Path | bytes, top: int = 5) -> PredictionList:
        """What the model of a job that has succeeded says of images: the most probable classes of each."""
        return self._run(fetch.predict(job_id, images, top, self._patience))

    def plans(self, body: PreviewBody | Mapping[str, Any]) -> Preview:
        """A dry run: the plan that a job would get, with its reasons; nothing is started."""
        return self._ask(calls.preview(body))

    def devices(self) -> DeviceList:
        """The devices that jobs have measured."""
        return self._ask(calls.list_devices())

    def models(self, **wanted: Unpack[ModelFilter]) -> Iterator[Model]:
        """The models that can be trained, or, by `supported`, the others and why they cannot; page by page."""
        return self._iterate(flows.pages(lambda after: calls.list_models(after, wanted), self._patience))

    def model(self, name: str) -> Model:
        return self._ask(calls.get_model(name))

    def add_dataset(self, name: str, uri: str) -> Dataset:
        """Register an image folder, for `dataset: "dataset:NAME"` in jobs."""
        return self._ask(calls.add_dataset(name, uri))

    def datasets(self, *, search: str | None = None) -> Iterator[Dataset]:
        """Registered datasets, newest first, without their classes."""
        return self._iterate(flows.pages(lambda after: calls.list_datasets(after, search), self._patience))

    def dataset(self, dataset_id: str) -> Dataset:
        """One dataset, by its id or its name."""
        return self._ask(calls.get_dataset(dataset_id))

    def inspect_dataset(self, dataset_id: str) -> Dataset:
        """Have the service list the folder again."""
        return self._ask(calls.inspect_dataset(dataset_id))

    def remove_dataset(self, dataset_id: str) -> Dataset:
        """Forget a dataset; its files stay."""
        return self._ask(calls.remove_dataset(dataset_id))

    def samples(
        self, dataset_id: str, *, split: str = "train", per_class: int | None = None, limit: int | None = None
    ) -> SampleList:
        """A few images of every class, small."""
        return self._ask(calls.samples(dataset_id, split, per_class, limit))

    def me(self) -> Me:
        """Who the key belongs to, and what it may do."""
        return self._ask(calls.me())

    def keys(self) -> builtins.list[Key]:
        return self._ask(calls.list_keys()).data

    def make_key(self, body: KeyBody | Mapping[str, Any]) -> Key:
        """A new key; only this answer ever shows it."""
        return self._ask(calls.make_key(body))

    def revoke_key(self, key_id: str) -> Key:
        return self._ask(calls.revoke_key(key_id))

    def users(self) -> builtins.list[User]:
        return self._ask(calls.list_users()).data

    def make_user(self, body: UserBody | Mapping[str, Any]) -> User:
        return self._ask(calls.make_user(body))

    def change_user(self, user_id: str, change: UserChange | Mapping[str, Any]) -> User:
        """Change what is given; the rest stays."""
        return self._ask(calls.change_user(user_id, change))

    def webhooks(self) -> builtins.list[Webhook]:
        return self._ask(calls.list_webhooks()).data

    def add_webhook(self, body: WebhookBody | Mapping[str, Any]) -> Webhook:
        """A new webhook; only this answer ever shows its secret."""
        return self._ask(calls.add_webhook(body))

    def webhook(self, webhook_id: str) -> Webhook:
        return self._ask(calls.get_webhook(webhook_id))

    def remove_webhook(self, webhook_id: str) -> Webhook:
        return self._ask(calls.remove_webhook(webhook_id))

    def deliveries(self, webhook_id: str) -> Iterator[Delivery]:
        """The messages to a webhook, newest first, page by page."""
        return self._iterate(flows.pages(lambda after: calls.list_deliveries(webhook_id, after), self._patience))

    def test_webhook(self, webhook_id: str) -> Delivery:
        """Have a message sent to a webhook now."""
        return self._ask(calls.test_webhook(webhook_id))

    def ready(self) -> dict[str, str]:
        """What each part of the service says of itself: "ok", or what is wrong."""
        return self._ask(calls.ready())

    def _ask(self, call: Call[Value]) -> Value:
        return self._run(flows.ask(call, self._patience))

    def _run(self, flow: Flow[Value]) -> Value:
        with closing(flow), _Hands(self._http) as hands:
            step = flows.advance(flow, None)
            while not isinstance(step, Done):
                step = flows.advance(flow, hands.carry_out(step))
        value: Value = step.value
        return value

    def _iterate(self, flow: Flow[Any]) -> Iterator[Any]:
        with closing(flow), _Hands(self._http) as hands:
            step = flows.advance(flow, None)
            while not isinstance(step, Done):
                if isinstance(step, Give):
                    yield step.item
                step = flows.advance(flow, hands.carry_out(step))


class _Hands:
    """Carries out the steps of one flow; holds the stream that is open."""

    def __init__(self, http: httpx2.Client) -> None:
        self._http = http
        self._open: httpx2.Response | None = None
        self._chunks: Iterator[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def carry_out(self, step: flows.Step) -> Any:
        """What comes of a step; an error as a value, for the flow to judge."""
        try:
            match step:
                case Send(call):
                    found = self._http.send(self._http.build_request(**request_of(call)))
                    return Answer(found.status_code, found.headers, found.content)
                case Open(call):
                    return self._begin(call)
                case Read():
                    return None if self._chunks is None else next(self._chunks, None)
                case Close():
                    return self._close()
                case Sleep(seconds):
                    return time.sleep(seconds)
                case flows.Work(run):
                    return run()
        except Exception as error:
            return Failed(error)
        return None

    def _begin(self, call: Call[Any]) -> Answer:
        self._close()
        found = self._open = self._http.send(self._http.build_request(**request_of(call)), stream=True)
        if not found.is_success:
            found.read()
            self._close()
            return Answer(found.status_code, found.headers, found.content)
        self._chunks = found.iter_bytes()
        return Answer(found.status_code, found.headers)

    def _close(self) -> None:
        if self._open is not None:
            self._chunks = None
            self._open.close()
            self._open = None
