"""The first tables: jobs, attempts, events, metrics, artifacts, api_keys."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

JOB_ID = sa.String(40)
JSON = sa.JSON(none_as_null=True)


def upgrade() -> None:
    _jobs()
    _attempts()
    _events()
    op.create_table(
        "metrics",
        sa.Column("job_id", JOB_ID, sa.ForeignKey("jobs.id"), primary_key=True),
        sa.Column("step", sa.Integer, primary_key=True),
        sa.Column("values", JSON, nullable=False),
    )
    op.create_table(
        "artifacts",
        sa.Column("job_id", JOB_ID, sa.ForeignKey("jobs.id"), primary_key=True),
        sa.Column("name", sa.String(255), primary_key=True),
        sa.Column("path", sa.Text, nullable=False),
        sa.Column("bytes", sa.BigInteger),
        sa.Column("sha256", sa.String(64)),
        sa.Column("created_at", sa.Float, nullable=False),
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(40), primary_key=True),
        sa.Column("hash", sa.String(64), nullable=False, unique=True),
        sa.Column("name", sa.String(80), nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
    )


def _jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", JOB_ID, primary_key=True),
        sa.Column("owner", sa.String(40), nullable=False),
        sa.Column("idempotency_key", sa.String(255)),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("spec", JSON, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("status_reason", sa.Text),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("last_seq", sa.Integer, nullable=False),
        sa.Column("live", JSON),
        sa.Column("estimate", JSON),
        sa.Column("error", JSON),
        sa.Column("plan", JSON),
        sa.Column("ledger", JSON),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("started_at", sa.Float),
        sa.Column("finished_at", sa.Float),
    )
    op.create_index("ix_jobs_created", "jobs", ["created_at", "id"])
    op.create_index("ix_jobs_state", "jobs", ["state", "created_at"])
    op.create_index("ux_jobs_idempotency", "jobs", ["owner", "idempotency_key"], unique=True)


def _attempts() -> None:
    op.create_table(
        "attempts",
        sa.Column("job_id", JOB_ID, sa.ForeignKey("jobs.id"), primary_key=True),
        sa.Column("n", sa.Integer, primary_key=True),
        sa.Column("token", sa.String(40), nullable=False),
        sa.Column("submission_id", sa.String(80), nullable=False, unique=True),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("events_offset", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("ended_at", sa.Float),
    )
    op.create_index("ix_attempts_state", "attempts", ["state"])


def _events() -> None:
    op.create_table(
        "events",
        sa.Column("job_id", JOB_ID, sa.ForeignKey("jobs.id"), primary_key=True),
        sa.Column("seq", sa.Integer, primary_key=True),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("run_seq", sa.BigInteger),
        sa.Column("type", sa.String(40), nullable=False),
        sa.Column("level", sa.String(10), nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("data", JSON, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
    )
    op.create_index("ux_events_run", "events", ["job_id", "attempt", "run_seq"], unique=True)


def downgrade() -> None:
    for table in ("api_keys", "artifacts", "metrics", "events", "attempts", "jobs"):
        op.drop_table(table)
