"""Users and what a queue needs: priorities, labels, checkpoints, datasets, webhooks, leases.

Keys of before become the administrator's, as were the jobs that were made with them.
"""

from __future__ import annotations

import json
import time

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

ID = sa.String(40)
JSON = sa.JSON(none_as_null=True)
ADMIN = "user_first"


def upgrade() -> None:
    _users()
    _jobs()
    _checkpoints_and_datasets()
    _webhooks()
    op.create_table(
        "leases",
        sa.Column("name", ID, primary_key=True),
        sa.Column("holder", sa.String(80), nullable=False),
        sa.Column("until", sa.Float, nullable=False),
    )
    op.create_index("ix_attempts_token", "attempts", ["token"])


def _users() -> None:
    users = op.create_table(
        "users",
        sa.Column("id", ID, primary_key=True),
        sa.Column("name", sa.String(80), nullable=False, unique=True),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("max_queued", sa.Integer),
        sa.Column("max_running", sa.Integer),
        sa.Column("max_priority", sa.Integer, nullable=False, server_default="0"),
        sa.Column("share", sa.Float, nullable=False, server_default="1"),
        sa.Column("usage_s", sa.Float, nullable=False, server_default="0"),
        sa.Column("usage_at", sa.Float, nullable=False, server_default="0"),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("disabled_at", sa.Float),
    )
    now = time.time()
    op.bulk_insert(
        users,
        [
            {
                "id": ADMIN,
                "name": "admin",
                "role": "admin",
                "max_priority": 100,
                "share": 1.0,
                "usage_s": 0.0,
                "usage_at": now,
                "created_at": now,
            }
        ],
    )
    op.add_column("api_keys", sa.Column("user_id", ID, nullable=False, server_default=ADMIN))
    op.add_column("api_keys", sa.Column("hint", sa.String(16), nullable=False, server_default=""))
    op.add_column("api_keys", sa.Column("scopes", JSON, nullable=False, server_default='["read", "write", "admin"]'))
    op.add_column("api_keys", sa.Column("expires_at", sa.Float))
    op.add_column("api_keys", sa.Column("revoked_at", sa.Float))
    op.add_column("api_keys", sa.Column("used_at", sa.Float))
    op.create_index("ix_api_keys_user", "api_keys", ["user_id"])


def _jobs() -> None:
    op.add_column("jobs", sa.Column("model", sa.String(200), nullable=False, server_default=""))
    op.add_column("jobs", sa.Column("search", sa.Text, nullable=False, server_default=""))
    op.add_column("jobs", sa.Column("trace", sa.String(64)))
    op.add_column("jobs", sa.Column("priority", sa.Integer, nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("queued_at", sa.Float))
    op.add_column("jobs", sa.Column("queue_deadline", sa.Float))
    op.add_column("jobs", sa.Column("want", sa.String(16)))
    op.add_column("jobs", sa.Column("requeue", sa.Boolean, nullable=False, server_default=sa.false()))
    op.create_index("ix_jobs_owner", "jobs", ["owner", "created_at", "id"])
    op.create_index("ix_jobs_queue", "jobs", ["state", "owner", "priority", "queued_at"])
    labels = op.create_table(
        "job_labels",
        sa.Column("job_id", ID, sa.ForeignKey("jobs.id"), primary_key=True),
        sa.Column("key", sa.String(64), primary_key=True),
        sa.Column("value", sa.String(512), nullable=False),
    )
    op.create_index("ix_job_labels", "job_labels", ["key", "value", "job_id"])
    _fill_jobs(labels)


def _fill_jobs(labels: sa.Table) -> None:
    """What is in the specs already, where it can be searched; and the new owner of all."""
    jobs = sa.table(
        "jobs",
        *(sa.column(name) for name in ("id", "owner", "model", "search", "queued_at", "created_at")),
        sa.column("spec", JSON),
    )
    connection = op.get_bind()
    for row in connection.execute(sa.select(jobs.c.id, jobs.c.spec, jobs.c.created_at)).all():
        spec = row.spec if isinstance(row.spec, dict) else json.loads(row.spec)
        metadata = spec.get("metadata") or {}
        said = (row.id, spec.get("name"), spec.get("model"), spec.get("dataset"), *metadata.values())
        search = "\n".join(str(part).lower() for part in said if part)
        filled = {"owner": ADMIN, "model": spec.get("model", ""), "search": search, "queued_at": row.created_at}
        connection.execute(sa.update(jobs).where(jobs.c.id == row.id).values(**filled))
        for key, value in list(metadata.items())[:16]:
            connection.execute(labels.insert().values(job_id=row.id, key=key[:64], value=value[:512]))


def _checkpoints_and_datasets() -> None:
    op.create_table(
        "checkpoints",
        sa.Column("job_id", ID, sa.ForeignKey("jobs.id"), primary_key=True),
        sa.Column("name", sa.String(80), primary_key=True),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("step", sa.Integer, nullable=False),
        sa.Column("path", sa.Text, nullable=False),
        sa.Column("bytes", sa.BigInteger),
        sa.Column("sha256", sa.String(64)),
        sa.Column("created_at", sa.Float, nullable=False),
    )
    op.create_table(
        "datasets",
        sa.Column("id", ID, primary_key=True),
        sa.Column("owner", ID, nullable=False),
        sa.Column("name", sa.String(80), nullable=False),
        sa.Column("uri", sa.Text, nullable=False),
        sa.Column("summary", JSON, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
    )
    op.create_index("ux_datasets_name", "datasets", ["owner", "name"], unique=True)


def _webhooks() -> None:
    op.create_table(
        "webhooks",
        sa.Column("id", ID, primary_key=True),
        sa.Column("owner", ID, nullable=False),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("types", JSON, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("disabled_at", sa.Float),
    )
    op.create_index("ix_webhooks_owner", "webhooks", ["owner"])
    op.create_table(
        "deliveries",
        sa.Column("id", ID, primary_key=True),
        sa.Column("webhook_id", ID, sa.ForeignKey("webhooks.id"), nullable=False),
        sa.Column("body", JSON, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("tries", sa.Integer, nullable=False),
        sa.Column("next_at", sa.Float, nullable=False),
        sa.Column("last_error", sa.Text),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("sent_at", sa.Float),
    )
    op.create_index("ix_deliveries_due", "deliveries", ["state", "next_at"])
    op.create_index("ix_deliveries_webhook", "deliveries", ["webhook_id"])


def downgrade() -> None:
    raise NotImplementedError("users cannot be taken away again; go back to a copy of the database instead")
