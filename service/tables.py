"""The tables of the store. Only `service.store` may import them; `migrations/` builds them.

| table | a row is | written by |
|---|---|---|
| jobs | one job, and its place in the queue | POST, the supervisor, cancel |
| attempts | one run of a job; `token` fences its writes | the supervisor |
| events | one line of a job's history; append-only, numbered from 1 within its job | whoever moves the job |
| metrics | one optimiser step | the supervisor |
| artifacts | one file that the job produced | the supervisor |
| api_keys | the hash of one key | first start |

Times are Unix seconds.
"""

from __future__ import annotations

from typing import Any, ClassVar

from sqlalchemy import JSON, BigInteger, Float, ForeignKey, Index, Integer, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """Base of the mapped classes."""

    type_annotation_map: ClassVar = {dict[str, Any]: JSON(none_as_null=True), str: Text}


class JobRow(Base):
    """One job. `live` is what the newest metrics say; `plan` and `ledger` are read only when asked for."""

    __tablename__ = "jobs"
    __table_args__ = (
        Index("ix_jobs_created", "created_at", "id"),
        Index("ix_jobs_state", "state", "created_at"),
        Index("ux_jobs_idempotency", "owner", "idempotency_key", unique=True),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    owner: Mapped[str] = mapped_column(String(40))
    idempotency_key: Mapped[str | None] = mapped_column(String(255))
    fingerprint: Mapped[str] = mapped_column(String(64))
    spec: Mapped[dict[str, Any]]
    state: Mapped[str] = mapped_column(String(16))
    status_reason: Mapped[str | None]
    attempt: Mapped[int] = mapped_column(Integer, default=0)
    last_seq: Mapped[int] = mapped_column(Integer, default=0)
    live: Mapped[dict[str, Any] | None]
    estimate: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    plan: Mapped[dict[str, Any] | None] = mapped_column(deferred=True)
    ledger: Mapped[dict[str, Any] | None] = mapped_column(deferred=True)
    created_at: Mapped[float] = mapped_column(Float)
    started_at: Mapped[float | None] = mapped_column(Float)
    finished_at: Mapped[float | None] = mapped_column(Float)


class AttemptRow(Base):
    """One run of a job. States: created, submitted, ended (the job is decided), settled (Ray has let go of it)."""

    __tablename__ = "attempts"
    __table_args__ = (Index("ix_attempts_state", "state"),)

    job_id: Mapped[str] = mapped_column(String(40), ForeignKey("jobs.id"), primary_key=True)
    n: Mapped[int] = mapped_column(Integer, primary_key=True)
    token: Mapped[str] = mapped_column(String(40))
    submission_id: Mapped[str] = mapped_column(String(80), unique=True)
    state: Mapped[str] = mapped_column(String(16))
    events_offset: Mapped[int] = mapped_column(BigInteger, default=0)
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


class ApiKeyRow(Base):
    """One API key: the key itself is not kept, only its SHA-256."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    hash: Mapped[str] = mapped_column(String(64), unique=True)
    name: Mapped[str] = mapped_column(String(80))
    created_at: Mapped[float] = mapped_column(Float)
