"""What was lost of a job to faults of the system: attempts, and how far it was then."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("faults", sa.Integer, nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("stuck", sa.Integer, nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("lost_step", sa.Integer))


def downgrade() -> None:
    for name in ("faults", "stuck", "lost_step"):
        op.drop_column("jobs", name)
