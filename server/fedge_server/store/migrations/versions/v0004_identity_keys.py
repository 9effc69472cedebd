"""The keys with which sites sign, and the newest signed directory of them.

Sites that were enrolled before have no such key: they are in no directory until they enrol again.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "identity_keys",
        sa.Column("site", sa.Text, nullable=False),
        sa.Column("key", sa.LargeBinary, nullable=False),
        sa.Column("not_before", sa.BigInteger, nullable=False),
        sa.Column("not_after", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("site", name="pk_identity_keys"),
    )
    op.create_index("ix_identity_keys_key", "identity_keys", ["key"], unique=True)
    op.create_table(
        "directories",
        sa.Column("epoch", sa.BigInteger, autoincrement=False, nullable=False),
        sa.Column("signed_at", sa.Double, nullable=False),
        sa.Column("statements", sa.Text, nullable=False),
        sa.Column("signature", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("epoch", name="pk_directories"),
    )


def downgrade() -> None:
    for table in ("directories", "identity_keys"):
        op.drop_table(table)
