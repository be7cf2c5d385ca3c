"""Engine, sessions and the only commit in the product.

Knows: how to open SQLite (WAL, one writer at a time, full sync) and PostgreSQL so that the same SQL means
the same, and the database's own clock.
Refuses to know: tables and what a transaction is for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import ExceptionContext, make_url
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session
from sqlalchemy.sql.expression import FunctionElement
from sqlalchemy.types import Double

BUSY_TIMEOUT_MS = 10_000
HURRIED_TIMEOUT_MS = 50
STATEMENT_TIMEOUT_MS = 15_000


class db_now(FunctionElement[float]):
    """Unix seconds by the database's clock: the only clock leases are decided by."""

    type = Double()
    inherit_cache = True


@compiles(db_now, "sqlite")
def _sqlite_now(element: Any, compiler: Any, **kw: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(db_now)
def _postgresql_now(element: Any, compiler: Any, **kw: Any) -> str:
    # clock_timestamp(), not now(): a transaction that waited for a lock must not use the time it began at.
    return "extract(epoch from clock_timestamp())::double precision"


def open_engine(url: str) -> Engine:
    """An engine for a ``sqlite:///path`` or ``postgresql://`` URL."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        local = {"timeout": BUSY_TIMEOUT_MS / 1000, "check_same_thread": False}
        engine = create_engine(parsed, hide_parameters=True, connect_args=local)
        event.listen(engine, "connect", _configure_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    options = f"-c statement_timeout={STATEMENT_TIMEOUT_MS} -c lock_timeout=5000"
    options += " -c idle_in_transaction_session_timeout=30000"
    parsed = parsed.set(drivername="postgresql+psycopg")
    # A network that swallows packets must show within seconds: a worker's lease depends on it.
    network = {"connect_timeout": 5, "keepalives_idle": 10, "keepalives_interval": 3, "keepalives_count": 3}
    network["tcp_user_timeout"] = STATEMENT_TIMEOUT_MS
    remote = {"options": options, **network}
    engine = create_engine(parsed, pool_pre_ping=True, hide_parameters=True, connect_args=remote)
    event.listen(engine, "handle_error", _hide_rows)
    return engine


def _hide_rows(context: ExceptionContext) -> None:
    """PostgreSQL quotes the failing row or key in the message's detail; rows hold secrets and end up in no log."""
    for error in (context.original_exception, context.sqlalchemy_exception):
        if error is not None and error.args:
            error.args = (str(error.args[0]).partition("\nDETAIL:")[0], *error.args[1:])


def _configure_sqlite(connection: Any, _record: Any) -> None:
    # The driver's own transaction control would delay BEGIN until the first write, which is how two
    # readers deadlock while upgrading; we begin explicitly instead.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    options = connection.get_execution_options()
    connection.exec_driver_sql(f"PRAGMA busy_timeout={options.get('sqlite_busy_ms', BUSY_TIMEOUT_MS)}")
    connection.exec_driver_sql(f"BEGIN {options.get('sqlite_begin', 'IMMEDIATE')}")


@contextmanager
def unit_of_work(engine: Engine) -> Iterator[Session]:
    """One transaction: commits when the block ends well, rolls back on any exception."""
    with Session(engine, expire_on_commit=False) as session, session.begin():
        yield session


def in_a_hurry(engine: Engine) -> Engine:
    """The same database for what may be left undone: on SQLite it does not wait until another writer is done."""
    return engine.execution_options(sqlite_busy_ms=HURRIED_TIMEOUT_MS)


@contextmanager
def read_session(engine: Engine) -> Iterator[Session]:
    """A session for reading: takes no write lock on SQLite and never commits."""
    with Session(engine.execution_options(sqlite_begin="DEFERRED"), expire_on_commit=False) as session:
        yield session
