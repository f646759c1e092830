"""Runs that the service has not ordered."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("outside", sa.Boolean, nullable=False, server_default=sa.false()))
    op.add_column("jobs", sa.Column("whereabouts", sa.JSON(none_as_null=True)))
    op.add_column("attempts", sa.Column("heard_at", sa.Float))


def downgrade() -> None:
    op.drop_column("attempts", "heard_at")
    op.drop_column("jobs", "whereabouts")
    op.drop_column("jobs", "outside")
