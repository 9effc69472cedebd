"""The tables. `migrations/` brings a database to them, and a test holds the two together."""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa

metadata: Final = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(referred_table_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
    }
)

runs: Final = sa.Table(
    "runs",
    metadata,
    sa.Column("run_id", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("run_toml", sa.Text, nullable=False),
    sa.Column("layout", sa.LargeBinary, nullable=False),
    sa.Column("strategy", sa.Text, nullable=False),
    sa.Column("submitted_at", sa.Double, nullable=False),
    sa.Column("submitted_by", sa.Text, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("committed", sa.Integer, nullable=False),
    sa.Column("machine", sa.Text, nullable=False),
    sa.Column("ended_at", sa.Double, nullable=True),
)

_run = "runs.run_id"

rounds: Final = sa.Table(
    "rounds",
    metadata,
    sa.Column("run_id", sa.ForeignKey(_run, ondelete="CASCADE"), primary_key=True),
    sa.Column("round", sa.Integer, primary_key=True),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("clients", sa.Text, nullable=False),  # JSON: names
    sa.Column("num_examples", sa.BigInteger, nullable=False),
    sa.Column("seconds", sa.Double, nullable=False),
    sa.Column("bytes_down", sa.BigInteger, nullable=False),
    sa.Column("bytes_up", sa.BigInteger, nullable=False),
    sa.Column("refused", sa.Integer, nullable=False),
    sa.Column("staleness", sa.Integer, nullable=False),
    sa.Column("metrics", sa.Text, nullable=False),  # JSON: name -> number
)

# Who was asked for an open order, and what became of it: the cohort.
members: Final = sa.Table(
    "members",
    metadata,
    sa.Column("run_id", sa.ForeignKey(_run, ondelete="CASCADE"), primary_key=True),
    sa.Column("kind", sa.Text, primary_key=True),
    sa.Column("round", sa.Integer, primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True),
    sa.Column("client", sa.Text, primary_key=True),
    sa.Column("state", sa.Text, nullable=False),
)

# Accepted updates of open orders. The primary key is the idempotency key.
updates: Final = sa.Table(
    "updates",
    metadata,
    sa.Column("run_id", sa.ForeignKey(_run, ondelete="CASCADE"), primary_key=True),
    sa.Column("kind", sa.Text, primary_key=True),
    sa.Column("round", sa.Integer, primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True),
    sa.Column("client", sa.Text, primary_key=True),
    sa.Column("num_examples", sa.BigInteger, nullable=False),
    sa.Column("metrics", sa.Text, nullable=False),  # JSON: name -> number
    sa.Column("staleness", sa.Integer, nullable=False),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("digest", sa.LargeBinary, nullable=False),
    sa.Column("place", sa.Text, nullable=False),
    sa.Column("inline", sa.LargeBinary, nullable=True),
)

checkpoints: Final = sa.Table(
    "checkpoints",
    metadata,
    sa.Column("run_id", sa.ForeignKey(_run, ondelete="CASCADE"), primary_key=True),
    sa.Column("round", sa.Integer, primary_key=True),
    sa.Column("digest", sa.Text, nullable=False),
    sa.Column("size", sa.BigInteger, nullable=False),
)

events: Final = sa.Table(
    "events",
    metadata,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("subject", sa.Text, nullable=False),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("detail", sa.Text, nullable=False),
)

# Who may call. `registry.py` says what the columns mean.
tokens: Final = sa.Table(
    "tokens",
    metadata,
    sa.Column("serial", sa.Text, primary_key=True),  # hexadecimal, of the bootstrap certificate
    sa.Column("site", sa.Text, nullable=False, index=True),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("expires_at", sa.Double, nullable=False),
)

holders: Final = sa.Table(
    "holders",
    metadata,
    sa.Column("kind", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("enrolled_at", sa.Double, nullable=False),
    sa.Column("revoked", sa.Boolean, nullable=False),
)

# What sites have kept here of their ledgers, sealed by themselves; outlives their enrolment.
witnesses: Final = sa.Table(
    "witnesses",
    metadata,
    sa.Column("site", sa.Text, primary_key=True),
    sa.Column("sealed", sa.LargeBinary, nullable=False),
)

certificates: Final = sa.Table(
    "certificates",
    metadata,
    sa.Column("serial", sa.Text, primary_key=True),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("expires_at", sa.Double, nullable=False),
    sa.Column("used", sa.BigInteger, nullable=False),  # grows with each use
    sa.ForeignKeyConstraint(
        ["kind", "name"], ["holders.kind", "holders.name"], ondelete="CASCADE", name="fk_certificates_holders"
    ),
    sa.Index("ix_certificates_holder", "kind", "name"),
)

# With which Ed25519 key a site signs, and how long its newest certificate is valid: what a directory says of it. The
# row stays when the site is revoked, so that nobody else can bring its key.
identity_keys: Final = sa.Table(
    "identity_keys",
    metadata,
    sa.Column("site", sa.Text, primary_key=True),
    sa.Column("key", sa.LargeBinary, nullable=False),
    sa.Column("not_before", sa.BigInteger, nullable=False),  # seconds, as is the next
    sa.Column("not_after", sa.BigInteger, nullable=False),
    sa.Index("ix_identity_keys_key", "key", unique=True),
)

# The newest signed directory: one row, or none. `directories.py` says what the columns mean.
directories: Final = sa.Table(
    "directories",
    metadata,
    sa.Column("epoch", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("signed_at", sa.Double, nullable=False),
    sa.Column(
        "statements", sa.Text, nullable=False
    ),  # JSON: [site, key in hexadecimal, from, until], by site
    sa.Column("signature", sa.LargeBinary, nullable=False),
)
