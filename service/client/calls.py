"""Calls as values: what is sent, whether it may be sent twice, and how its answer is read. No I/O here.

Reads, dry runs, cancel, pause, resume and revoke change nothing when they come twice, and a submit carries an
Idempotency-Key always: these are `ALWAYS` repeated when an answer is lost. Others are sent again only where it is sure
that they did not arrive, or were refused for now.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import quote

from pydantic import BaseModel
from ulid import ULID

from service.client.filters import JobFilter, ModelFilter, SweepFilter
from service.schemas import (
    Artifact,
    Checkpoint,
    Dataset,
    DatasetBody,
    Delivery,
    DeviceList,
    Event,
    Health,
    Job,
    Key,
    KeyBody,
    LedgerView,
    Me,
    MetricsPage,
    Model,
    Page,
    PlanView,
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
Answered = TypeVar("Answered", bound=BaseModel)

SUBMIT_TIMEOUT_S = 90.0  # a first submit may wait for the model catalogue
MAX_PAGE = 100
SSE = "text/event-stream"


class Repeat(enum.Enum):
    """When a call may be sent again."""

    ALWAYS = "always"
    UNSENT = "unsent"


@dataclass(frozen=True)
class Answer:
    """A response; `content` is empty where the body of a success is streamed. Header names are lower case."""

    status: int
    headers: Mapping[str, str]
    content: bytes = b""

    @property
    def is_success(self) -> bool:
        return 200 <= self.status < 300


@dataclass(frozen=True)
class Call(Generic[Value]):
    """One request; `read` makes its value of a successful answer. `good` are other statuses that are answers, too.

    The body is JSON, or a form of `files`: their names and contents.
    """

    method: str
    path: str
    read: Callable[[Answer], Value]
    params: tuple[tuple[str, str], ...] = ()
    body: Any = None
    files: tuple[tuple[str, bytes], ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float | None = None
    repeat: Repeat = Repeat.ALWAYS
    good: tuple[int, ...] = ()


def new_key() -> str:
    """An Idempotency-Key that nobody has used."""
    return str(ULID())


# Jobs


def submit(spec: JobSpec | Mapping[str, Any], idempotency_key: str | None) -> Call[tuple[Job, bool]]:
    """The job, and whether the key had made it before."""
    return _submit("/v1/jobs", Job, spec, idempotency_key)


def get_job(job_id: str) -> Call[Job]:
    return Call("GET", f"/v1/jobs/{quote(job_id, safe='')}", _as(Job))


def look(job_id: str) -> Call[Job | Sweep]:
    """A job or a sweep, as its id says."""
    return Call("GET", _job(job_id), _as(Sweep) if is_sweep(job_id) else _as(Job))


def list_jobs(after: str | None, limit: int, wanted: JobFilter) -> Call[Page[Job]]:
    return Call("GET", "/v1/jobs", _as(Page[Job]), _filters(after, limit, wanted))


def act(job_id: str, action: str) -> Call[Job]:
    """Cancel, pause and resume are harmless when asked again; a second retry might begin a second attempt."""
    repeat = Repeat.UNSENT if action == "retry" else Repeat.ALWAYS
    return Call("POST", f"/v1/jobs/{quote(job_id, safe='')}/{action}", _as(Job), repeat=repeat)


# Runs that the service has not ordered


def begin_run(
    spec: JobSpec | Mapping[str, Any], where: RunPlace | Mapping[str, Any] | None, idempotency_key: str | None
) -> Call[RunBegun]:
    body = {"spec": _body(spec), "where": {name: told for name, told in _body(where or {}).items() if told}}
    headers = {"Idempotency-Key": idempotency_key or new_key()}
    return Call("POST", "/v1/runs", _as(RunBegun), body=body, headers=headers)


# Sweeps


def is_sweep(job_id: str) -> bool:
    return job_id.startswith("sweep_")


def submit_sweep(spec: SweepSpec | Mapping[str, Any], idempotency_key: str | None) -> Call[tuple[Sweep, bool]]:
    """The sweep, and whether the key had made it before."""
    return _submit("/v1/sweeps", Sweep, spec, idempotency_key)


def get_sweep(sweep_id: str) -> Call[Sweep]:
    return Call("GET", _sweep(sweep_id), _as(Sweep))


def list_sweeps(after: str | None, limit: int, wanted: SweepFilter) -> Call[Page[Sweep]]:
    return Call("GET", "/v1/sweeps", _as(Page[Sweep]), _filters(after, limit, wanted))


def act_on_sweep(sweep_id: str, action: str) -> Call[Sweep]:
    repeat = Repeat.UNSENT if action == "retry" else Repeat.ALWAYS
    return Call("POST", f"{_sweep(sweep_id)}/{action}", _as(Sweep), repeat=repeat)


# What belongs to a job, or to a sweep: events, logs, artifacts


def list_events(job_id: str, after: int) -> Call[Page[Event]]:
    return Call("GET", f"{_job(job_id)}/events", _as(Page[Event]), _params(after=after, limit=MAX_PAGE))


def stream_events(job_id: str, after: int, patience_s: float) -> Call[None]:
    headers = {"Accept": SSE, "Last-Event-ID": str(after), "Cache-Control": "no-store"}
    return Call("GET", f"{_job(job_id)}/events", _nothing, headers=headers, timeout_s=patience_s)


def read_log(job_id: str, attempt: int | None, rank: int | None, offset: int) -> Call[Answer]:
    return Call("GET", f"{_job(job_id)}/logs", _whole, _params(attempt=attempt, rank=rank, offset=offset))


def stream_log(job_id: str, attempt: int, rank: int | None, offset: int, patience_s: float) -> Call[None]:
    params = _params(attempt=attempt, rank=rank, offset=offset, follow="true")
    return Call("GET", f"{_job(job_id)}/logs", _nothing, params, headers=_PLAIN, timeout_s=patience_s)


def metrics(job_id: str, max_points: int) -> Call[MetricsPage]:
    return Call("GET", f"{_job(job_id)}/metrics", _as(MetricsPage), _params(max_points=max_points))


def plan(job_id: str) -> Call[dict[str, Any]]:
    return Call("GET", f"{_job(job_id)}/plan", lambda answer: _as(PlanView)(answer).plan)


def timeline(job_id: str) -> Call[TimelineView]:
    return Call("GET", f"{_job(job_id)}/timeline", _as(TimelineView))


def ledger(job_id: str) -> Call[dict[str, Any]]:
    return Call("GET", f"{_job(job_id)}/ledger", lambda answer: _as(LedgerView)(answer).ledger)


def list_checkpoints(job_id: str) -> Call[Page[Checkpoint]]:
    return Call("GET", f"{_job(job_id)}/checkpoints", _as(Page[Checkpoint]))


def list_artifacts(job_id: str) -> Call[Page[Artifact]]:
    return Call("GET", f"{_job(job_id)}/artifacts", _as(Page[Artifact]))


def download(job_id: str, name: str, begin: int, etag: str | None) -> Call[None]:
    """The bytes of an artifact from `begin` on; all where the file is no longer the one of this etag."""
    part = {"Range": f"bytes={begin}-", "If-Range": etag} if begin and etag else {}
    return Call("GET", f"{_job(job_id)}/artifacts/{quote(name)}", _nothing, headers={**_PLAIN, **part})


def predict(job_id: str, images: Sequence[tuple[str, bytes]], top: int) -> Call[PredictionList]:
    """`images` are names and contents."""
    params, files = _params(top=top), tuple(images)
    return Call("POST", f"{_job(job_id)}/predict", _as(PredictionList), params, files=files, timeout_s=SUBMIT_TIMEOUT_S)


# Plans, devices, models, datasets


def preview(body: PreviewBody | Mapping[str, Any]) -> Call[Preview]:
    return Call("POST", "/v1/plans", _as(Preview), body=_body(body), timeout_s=SUBMIT_TIMEOUT_S)


def list_devices() -> Call[DeviceList]:
    return Call("GET", "/v1/devices", _as(DeviceList))


def list_models(after: str | None, wanted: ModelFilter) -> Call[Page[Model]]:
    params = _params(after=after, limit=MAX_PAGE, **wanted)
    return Call("GET", "/v1/models", _as(Page[Model]), params, timeout_s=SUBMIT_TIMEOUT_S)


def get_model(name: str) -> Call[Model]:
    return Call("GET", f"/v1/models/{quote(name, safe='')}", _as(Model), timeout_s=SUBMIT_TIMEOUT_S)


def add_dataset(name: str, uri: str) -> Call[Dataset]:
    body = _body(DatasetBody(name=name, uri=uri))
    return Call("POST", "/v1/datasets", _as(Dataset), body=body, timeout_s=SUBMIT_TIMEOUT_S)


def list_datasets(after: str | None, search: str | None) -> Call[Page[Dataset]]:
    return Call("GET", "/v1/datasets", _as(Page[Dataset]), _params(after=after, limit=MAX_PAGE, search=search))


def get_dataset(dataset_id: str) -> Call[Dataset]:
    return Call("GET", _dataset(dataset_id), _as(Dataset))


def inspect_dataset(dataset_id: str) -> Call[Dataset]:
    return Call("POST", f"{_dataset(dataset_id)}/inspect", _as(Dataset), timeout_s=SUBMIT_TIMEOUT_S)


def remove_dataset(dataset_id: str) -> Call[Dataset]:
    return Call("DELETE", _dataset(dataset_id), _as(Dataset), repeat=Repeat.UNSENT)


def samples(dataset_id: str, split: str, per_class: int | None, limit: int | None) -> Call[SampleList]:
    params = _params(split=split, per_class=per_class, limit=limit)
    return Call("GET", f"{_dataset(dataset_id)}/samples", _as(SampleList), params, timeout_s=SUBMIT_TIMEOUT_S)


# Keys and users


def me() -> Call[Me]:
    return Call("GET", "/v1/me", _as(Me))


def list_keys() -> Call[Page[Key]]:
    return Call("GET", "/v1/keys", _as(Page[Key]))


def make_key(body: KeyBody | Mapping[str, Any]) -> Call[Key]:
    return Call("POST", "/v1/keys", _as(Key), body=_body(body), repeat=Repeat.UNSENT)


def revoke_key(key_id: str) -> Call[Key]:
    return Call("DELETE", f"/v1/keys/{quote(key_id, safe='')}", _as(Key))


def list_users() -> Call[Page[User]]:
    return Call("GET", "/v1/users", _as(Page[User]))


def make_user(body: UserBody | Mapping[str, Any]) -> Call[User]:
    return Call("POST", "/v1/users", _as(User), body=_body(body), repeat=Repeat.UNSENT)


def change_user(user_id: str, change: UserChange | Mapping[str, Any]) -> Call[User]:
    body = change.model_dump(mode="json", exclude_unset=True) if isinstance(change, UserChange) else dict(change)
    return Call("PATCH", f"/v1/users/{quote(user_id, safe='')}", _as(User), body=body)


# Webhooks


def list_webhooks() -> Call[Page[Webhook]]:
    return Call("GET", "/v1/webhooks", _as(Page[Webhook]))


def add_webhook(body: WebhookBody | Mapping[str, Any]) -> Call[Webhook]:
    return Call("POST", "/v1/webhooks", _as(Webhook), body=_body(body), repeat=Repeat.UNSENT)


def get_webhook(webhook_id: str) -> Call[Webhook]:
    return Call("GET", _webhook(webhook_id), _as(Webhook))


def remove_webhook(webhook_id: str) -> Call[Webhook]:
    return Call("DELETE", _webhook(webhook_id), _as(Webhook), repeat=Repeat.UNSENT)


def list_deliveries(webhook_id: str, after: str | None) -> Call[Page[Delivery]]:
    params = _params(after=after, limit=MAX_PAGE)
    return Call("GET", f"{_webhook(webhook_id)}/deliveries", _as(Page[Delivery]), params)


def test_webhook(webhook_id: str) -> Call[Delivery]:
    return Call("POST", f"{_webhook(webhook_id)}/test", _as(Delivery), repeat=Repeat.UNSENT)


def ready() -> Call[dict[str, str]]:
    """What `/readyz` says of each part; its 503 is an answer, too."""
    return Call("GET", "/readyz", lambda answer: _as(Health)(answer).checks, good=(503,))


_PLAIN = {"Accept-Encoding": "identity"}  # offsets count the bytes of the file, not those of a packed one


def _as(kind: type[Answered]) -> Callable[[Answer], Answered]:
    return lambda answer: kind.model_validate_json(answer.content)


def _submit(path: str, kind: type[Answered], spec: Any, key: str | None) -> Call[tuple[Answered, bool]]:
    def read(answer: Answer) -> tuple[Answered, bool]:
        return _as(kind)(answer), answer.headers.get("idempotency-replayed") == "true"

    headers = {"Idempotency-Key": key or new_key()}
    return Call("POST", path, read, body=_body(spec), headers=headers, timeout_s=SUBMIT_TIMEOUT_S)


def _whole(answer: Answer) -> Answer:
    return answer


def _nothing(answer: Answer) -> None:
    return None


def _body(value: BaseModel | Mapping[str, Any]) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else dict(value)


def _params(**given: Any) -> tuple[tuple[str, str], ...]:
    """Query parameters without those that are None; of a list, one for each."""
    found = []
    for name, value in given.items():
        values = [value] if isinstance(value, str) or not isinstance(value, Iterable) else list(value)
        found += [(name, str(each)) for each in values if each is not None]
    return tuple(found)


def _filters(after: str | None, limit: int, wanted: JobFilter | SweepFilter) -> tuple[tuple[str, str], ...]:
    given: dict[str, Any] = dict(wanted)
    labels = {f"metadata[{key}]": value for key, value in (given.pop("metadata", None) or {}).items()}
    return _params(after=after, limit=limit, **given, **labels)


def _job(job_id: str) -> str:
    """The path of a job or a sweep."""
    return _sweep(job_id) if is_sweep(job_id) else f"/v1/jobs/{quote(job_id, safe='')}"


def _sweep(sweep_id: str) -> str:
    return f"/v1/sweeps/{quote(sweep_id, safe='')}"


def _dataset(dataset_id: str) -> str:
    return f"/v1/datasets/{quote(dataset_id, safe='')}"


def _webhook(webhook_id: str) -> str:
    return f"/v1/webhooks/{quote(webhook_id, safe='')}"
