"""What every worker did in a step of a job, as measured."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("timeline", sa.JSON(none_as_null=True)))


def downgrade() -> None:
    op.drop_column("jobs", "timeline")
