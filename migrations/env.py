"""Alembic's entry: brings one database to a schema version.

Knows: every table (importing `app.tables` modules fills the metadata) and how both databases want their changes made.
Refuses to know: settings. The caller (`app.setup.migrate`, or the command line with `-x url=…`) names the database.
"""

import importlib
import pkgutil

from alembic import context
from sqlalchemy import Connection

import app.tables
from app.database import open_engine
from app.tables.base import Table

for module in pkgutil.iter_modules(app.tables.__path__):
    importlib.import_module(f"app.tables.{module.name}")


def run(connection: Connection) -> None:
    # SQLite cannot alter a column in place; batch mode copies the table instead.
    is_sqlite = connection.dialect.name == "sqlite"
    context.configure(
        connection=connection,
        target_metadata=Table.metadata,
        render_as_batch=is_sqlite,
        compare_type=True,
        compare_server_default=True,
    )
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:
    url = context.get_x_argument(as_dictionary=True).get("url")
    if not url:
        raise SystemExit("name the database: alembic -x url=sqlite:///theriac.db …")
    engine = open_engine(url)
    with engine.connect() as opened:
        run(opened)
        opened.commit()  # room: commit Alembic's own transaction, outside any unit of work
    engine.dispose()
