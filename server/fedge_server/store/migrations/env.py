"""What alembic runs: the migrations, in one transaction on the connection that it is given."""

from __future__ import annotations

from alembic import context

from fedge_server.store.schema import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
connection.commit()
