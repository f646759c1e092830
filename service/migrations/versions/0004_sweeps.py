"""Sweeps beside jobs, and which jobs are whose trials."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("kind", sa.String(8), nullable=False, server_default="job"))
    op.add_column("jobs", sa.Column("parent_id", sa.String(40)))
    op.add_column("jobs", sa.Column("trial_key", sa.String(80)))
    op.add_column("jobs", sa.Column("setting", sa.JSON(none_as_null=True)))
    op.add_column("jobs", sa.Column("baseline", sa.String(16)))
    op.add_column("jobs", sa.Column("figures", sa.JSON(none_as_null=True)))
    op.create_index("ux_jobs_trial", "jobs", ["parent_id", "trial_key"], unique=True)


def downgrade() -> None:
    op.drop_index("ux_jobs_trial", "jobs")
    for name in ("kind", "parent_id", "trial_key", "setting", "baseline", "figures"):
        op.drop_column("jobs", name)
