"""What sites have the coordinator keep of their ledgers."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "witnesses",
        sa.Column("site", sa.Text, nullable=False),
        sa.Column("sealed", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("site", name="pk_witnesses"),
    )


def downgrade() -> None:
    op.drop_table("witnesses")
