"""The tables of the store. Only `service.store` may import them; `migrations/` builds them.

| table | a row is | written by |
|---|---|---|
| users, api_keys | who may come in, and the hash of one key | first start, administrators, users |
| jobs, job_labels | one job or sweep, its place in the queue; one entry of its metadata | POST, supervisor, actions |
| attempts | one run of a job; `token` fences its writes | the supervisor, POST of a run outside |
| events | one line of a job's history; append-only, numbered from 1 within its job | whoever moves the job |
| metrics, artifacts, checkpoints | one optimiser step, one file, one checkpoint of a run | the run's events |
| datasets | one registered image folder | users |
| webhooks, deliveries | one address that is told of jobs; one message to it | users; whoever moves the job |
| leases | which process does what only one may do | the supervisor |

Times are Unix seconds.
"""

from __future__ import annotations

from typing import Any, ClassVar

from sqlalchemy import JSON, BigInteger, Boolean, Float, ForeignKey, Index, Integer, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        dict[str, Any]: JSON(none_as_null=True),
        list[str]: JSON(none_as_null=True),
        str: Text,
    }


class UserRow(Base):
    """Who owns jobs. `role` is admin or member; of the limits, None means the service's default.

    `usage_s` are device-seconds used, halved every `FAIR_HALF_LIFE_S`, as of `usage_at`.
    """

    __tablename__ = "users"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str] = mapped_column(String(80), unique=True)
    role: Mapped[str] = mapped_column(String(16))
    max_queued: Mapped[int | None] = mapped_column(Integer)
    max_running: Mapped[int | None] = mapped_column(Integer)
    max_priority: Mapped[int] = mapped_column(Integer, default=0)
    share: Mapped[float] = mapped_column(Float, default=1.0)
    usage_s: Mapped[float] = mapped_column(Float, default=0.0)
    usage_at: Mapped[float] = mapped_column(Float, default=0.0)
    created_at: Mapped[float] = mapped_column(Float)
    disabled_at: Mapped[float | None] = mapped_column(Float)


class ApiKeyRow(Base):
    """One API key: the key itself is not kept, only its SHA-256 and its first characters."""

    __tablename__ = "api_keys"
    __table_args__ = (Index("ix_api_keys_user", "user_id"),)

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    user_id: Mapped[str] = mapped_column(String(40))
    hash: Mapped[str] = mapped_column(String(64), unique=True)
    name: Mapped[str] = mapped_column(String(80))
    hint: Mapped[str] = mapped_column(String(16), default="")
    scopes: Mapped[list[str]]
    created_at: Mapped[float] = mapped_column(Float)
    expires_at: Mapped[float | None] = mapped_column(Float)
    revoked_at: Mapped[float | None] = mapped_column(Float)
    used_at: Mapped[float | None] = mapped_column(Float)


class JobRow(Base):
    """One job or sweep, by `kind`: what was asked for, where it stands, and the newest of what is known of it.

    The jobs of a sweep name it as `parent_id`, each under a `trial_key` of its own; `figures` are what such a job came
    to. A sweep's `spec` is a `SweepSpec`, its `ledger` the result that its driver told.

    `live` are running sums over its steps. `plan`, `timeline` (of the newest step that was traced) and `ledger` are
    large and read only when asked for. `search` is the lower-case text that a search looks through. `outside` is true
    of a run that was not ordered here, `whereabouts` is where it says it is. `want` is what its driver is asked: pause,
    or stop where nothing would be lost; `requeue` says that the job waits again once it is paused. `faults`, `stuck`
    and `lost_step` count its lost attempts (`service.faults`).
    """

    __tablename__ = "jobs"
    __table_args__ = (
        Index("ix_jobs_created", "created_at", "id"),
        Index("ix_jobs_owner", "owner", "created_at", "id"),
        Index("ix_jobs_state", "state", "created_at"),
        Index("ix_jobs_queue", "state", "owner", "priority", "queued_at"),
        Index("ux_jobs_idempotency", "owner", "idempotency_key", unique=True),
        Index("ux_jobs_trial", "parent_id", "trial_key", unique=True),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    kind: Mapped[str] = mapped_column(String(8), default="job")
    owner: Mapped[str] = mapped_column(String(40))
    parent_id: Mapped[str | None] = mapped_column(String(40))
    trial_key: Mapped[str | None] = mapped_column(String(80))
    setting: Mapped[dict[str, Any] | None]
    baseline: Mapped[str | None] = mapped_column(String(16))
    figures: Mapped[dict[str, Any] | None]
    idempotency_key: Mapped[str | None] = mapped_column(String(255))
    fingerprint: Mapped[str] = mapped_column(String(64))
    spec: Mapped[dict[str, Any]]
    model: Mapped[str] = mapped_column(String(200), default="")
    search: Mapped[str] = mapped_column(Text, default="")
    trace: Mapped[str | None] = mapped_column(String(64))
    state: Mapped[str] = mapped_column(String(16))
    status_reason: Mapped[str | None]
    priority: Mapped[int] = mapped_column(Integer, default=0)
    queued_at: Mapped[float | None] = mapped_column(Float)
    queue_deadline: Mapped[float | None] = mapped_column(Float)
    outside: Mapped[bool] = mapped_column(Boolean, default=False)
    whereabouts: Mapped[dict[str, Any] | None]
    want: Mapped[str | None] = mapped_column(String(16))
    requeue: Mapped[bool] = mapped_column(Boolean, default=False)
    attempt: Mapped[int] = mapped_column(Integer, default=0)
    faults: Mapped[int] = mapped_column(Integer, default=0)
    stuck: Mapped[int] = mapped_column(Integer, default=0)
    lost_step: Mapped[int | None] = mapped_column(Integer)
    last_seq: Mapped[int] = mapped_column(Integer, default=0)
    live: Mapped[dict[str, Any] | None]
    estimate: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    plan: Mapped[dict[str, Any] | None] = mapped_column(deferred=True)
    timeline: Mapped[dict[str, Any] | None] = mapped_column(deferred=True)
    ledger: Mapped[dict[str, Any] | None] = mapped_column(deferred=True)
    created_at: Mapped[float] = mapped_column(Float)
    started_at: Mapped[float | None] = mapped_column(Float)
    finished_at: Mapped[float | None] = mapped_column(Float)


class LabelRow(Base):
    """One entry of a job's metadata, for filters."""

    __tablename__ = "job_labels"
    __table_args__ = (Index("ix_job_labels", "key", "value", "job_id"),)

    job_id: Mapped[str] = mapped_column(String(40), ForeignKey("jobs.id"), primary_key=True)
    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[str] = mapped_column(String(512))


class AttemptRow(Base):
    """One run of a job. States: created, submitted, ended (the job is decided), settled (Ray has let go of it).

    `heard_at` is when a run outside last posted.
    """

    __tablename__ = "attempts"
    __table_args__ = (Index("ix_attempts_state", "state"), Index("ix_attempts_token", "token"))

    job_id: Mapped[str] = mapped_column(String(40), ForeignKey("jobs.id"), primary_key=True)
    n: Mapped[int] = mapped_column(Integer, primary_key=True)
    token: Mapped[str] = mapped_column(String(40))
    submission_id: Mapped[str] = mapped_column(String(80), unique=True)
    state: Mapped[str] = mapped_column(String(16))
    events_offset: Mapped[int] = mapped_column(BigInteger, default=0)
    heard_at: Mapped[float | None] = mapped_column(Float)
    created_at: Mapped[float] = mapped_column(Float)
    ended_at: Mapped[float | None] = mapped_column(Float)


class EventRow(Base):
    """One line of history. `run_seq` is the place in the run's own file, by which a replay is recognised."""

    __tablename__ = "events"
    __table_args__ = (Index("ux_events_run", "job_id", "attempt", "run_seq", unique=True),)

    job_id: Mapped[str] = mapped_column(String(40), ForeignKey("jobs.id"), primary_key=True)
    seq: Mapped[int] = mapped_column(Integer, primary_key=True)
    attempt: Mapped[int] = mapped_column(Integer)
    run_seq: Mapped[int | None] = mapped_column(BigInteger)
    type: Mapped[str] = mapped_column(String(40))
    level: Mapped[str] = mapped_column(String(10))
    message: Mapped[str]
    data: Mapped[dict[str, Any]]
    created_at: Mapped[float] = mapped_column(Float)


class MetricRow(Base):
    """What one step measured; a step that is run again replaces its row."""

    __tablename__ = "metrics"

    job_id: Mapped[str] = mapped_column(String(40), ForeignKey("jobs.id"), primary_key=True)
    step: Mapped[int] = mapped_column(Integer, primary_key=True)
    values: Mapped[dict[str, Any]]


class ArtifactRow(Base):
    """One file that may be downloaded."""

    __tablename__ = "artifacts"

    job_id: Mapped[str] = mapped_column(String(40), ForeignKey("jobs.id"), primary_key=True)
    name: Mapped[str] = mapped_column(String(255), primary_key=True)
    path: Mapped[str]
    bytes: Mapped[int | None] = mapped_column(BigInteger)
    sha256: Mapped[str | None] = mapped_column(String(64))
    created_at: Mapped[float] = mapped_column(Float)


class CheckpointRow(Base):
    """One checkpoint from which a job can go on; `sha256` is that of its manifest."""

    __tablename__ = "checkpoints"

    job_id: Mapped[str] = mapped_column(String(40), ForeignKey("jobs.id"), primary_key=True)
    name: Mapped[str] = mapped_column(String(80), primary_key=True)
    attempt: Mapped[int] = mapped_column(Integer)
    step: Mapped[int] = mapped_column(Integer)
    path: Mapped[str]
    bytes: Mapped[int | None] = mapped_column(BigInteger)
    sha256: Mapped[str | None] = mapped_column(String(64))
    created_at: Mapped[float] = mapped_column(Float)


class DatasetRow(Base):
    """One registered image folder; `summary` is what its listing said: classes and counts."""

    __tablename__ = "datasets"
    __table_args__ = (Index("ux_datasets_name", "owner", "name", unique=True),)

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    owner: Mapped[str] = mapped_column(String(40))
    name: Mapped[str] = mapped_column(String(80))
    uri: Mapped[str]
    summary: Mapped[dict[str, Any]]
    created_at: Mapped[float] = mapped_column(Float)


class WebhookRow(Base):
    """One address that is told of a user's jobs. Its secret is not kept: it follows from the service's and the id."""

    __tablename__ = "webhooks"
    __table_args__ = (Index("ix_webhooks_owner", "owner"),)

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    owner: Mapped[str] = mapped_column(String(40))
    url: Mapped[str]
    types: Mapped[list[str]]
    created_at: Mapped[float] = mapped_column(Float)
    disabled_at: Mapped[float | None] = mapped_column(Float)


class DeliveryRow(Base):
    """One message to one webhook. States: pending, sent, failed (given up)."""

    __tablename__ = "deliveries"
    __table_args__ = (Index("ix_deliveries_due", "state", "next_at"), Index("ix_deliveries_webhook", "webhook_id"))

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    webhook_id: Mapped[str] = mapped_column(String(40), ForeignKey("webhooks.id"))
    body: Mapped[dict[str, Any]]
    state: Mapped[str] = mapped_column(String(16))
    tries: Mapped[int] = mapped_column(Integer, default=0)
    next_at: Mapped[float] = mapped_column(Float)
    last_error: Mapped[str | None]
    created_at: Mapped[float] = mapped_column(Float)
    sent_at: Mapped[float | None] = mapped_column(Float)


class LeaseRow(Base):
    """Which process does what only one may do; `until` is by the database's clock."""

    __tablename__ = "leases"

    name: Mapped[str] = mapped_column(String(40), primary_key=True)
    holder: Mapped[str] = mapped_column(String(80))
    until: Mapped[float] = mapped_column(Float)
