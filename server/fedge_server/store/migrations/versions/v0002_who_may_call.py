"""Tokens, and the holders of certificates, in the database instead of in files."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "tokens",
        sa.Column("serial", sa.Text, nullable=False),
        sa.Column("site", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("expires_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("serial", name="pk_tokens"),
    )
    op.create_index("ix_tokens_site", "tokens", ["site"])
    op.create_table(
        "holders",
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("enrolled_at", sa.Double, nullable=False),
        sa.Column("revoked", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("kind", "name", name="pk_holders"),
    )
    op.create_table(
        "certificates",
        sa.Column("serial", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("expires_at", sa.Double, nullable=False),
        sa.Column("used", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("serial", name="pk_certificates"),
        sa.ForeignKeyConstraint(
            ["kind", "name"],
            ["holders.kind", "holders.name"],
            name="fk_certificates_holders",
            ondelete="CASCADE",
        ),
    )
    op.create_index("ix_certificates_holder", "certificates", ["kind", "name"])


def downgrade() -> None:
    for table in ("certificates", "holders", "tokens"):
        op.drop_table(table)
