"""What endpoints ask for: the caller, a session, the store.

Knows: how a request becomes a principal, and that a database session lives exactly as long as the endpoint's body.
Refuses to know: what the endpoint does. `app.main` puts the engine, the store and the settings into `app.state`.

A write dependency commits after the endpoint returned and before the answer is sent, so that an answer never
promises what a failed commit took back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import structlog
from fastapi import Depends, Header, Request
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from app.accounts import service as accounts
from app.accounts.service import Operator, Principal
from app.database import in_a_hurry, read_session, unit_of_work
from app.settings import Settings
from app.storage import Storage

log = structlog.get_logger(__name__)


def get_engine(request: Request) -> Engine:
    engine: Engine = request.app.state.engine
    return engine


def get_storage(request: Request) -> Storage:
    storage: Storage = request.app.state.storage
    return storage


def get_settings_of(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


def get_principal(
    request: Request, authorization: Annotated[str | None, Header(include_in_schema=False)] = None
) -> Principal:
    """The project whose key was sent. Keys are read at every request, so a revocation works at once."""
    engine = get_engine(request)
    with read_session(engine) as session:
        principal = accounts.authenticate(session, authorization)
    _touch_if_due(engine, principal)
    return principal


def get_operator(
    request: Request, authorization: Annotated[str | None, Header(include_in_schema=False)] = None
) -> Operator:
    engine = get_engine(request)
    with read_session(engine) as session:
        operator = accounts.authenticate_operator(session, authorization)
    _touch_if_due(engine, operator)
    return operator


def get_reader(request: Request) -> Iterator[Session]:
    with read_session(get_engine(request)) as session:
        yield session


def get_writer(request: Request) -> Iterator[Session]:
    with unit_of_work(get_engine(request)) as session:
        yield session


def _touch_if_due(engine: Engine, caller: Principal | Operator) -> None:
    """A note for the operator, never a condition: who may read may read while the database is full or locked."""
    if not caller.touch_due:
        return
    try:
        with unit_of_work(in_a_hurry(engine)) as session:
            accounts.touch(session, caller)
    except DBAPIError as error:
        log.warning("key.use_not_noted", error=type(error).__name__)


Caller = Annotated[Principal, Depends(get_principal)]
CurrentOperator = Annotated[Operator, Depends(get_operator)]
Reading = Annotated[Session, Depends(get_reader, scope="function")]
Writing = Annotated[Session, Depends(get_writer, scope="function")]
ObjectStore = Annotated[Storage, Depends(get_storage)]
Database = Annotated[Engine, Depends(get_engine)]
CurrentSettings = Annotated[Settings, Depends(get_settings_of)]
