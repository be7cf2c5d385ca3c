"""`/healthz` and `/readyz`: whether the process lives, and whether it could serve a request.

Knows: the two things every request needs, database and store. Refuses to know: workers; a queue without workers is
the operator's alarm, not a reason to refuse customers.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel
from sqlalchemy import Engine, text

from app.accounts.dependencies import Database, ObjectStore
from app.database import read_session
from app.errors import Unavailable
from app.telemetry import get_logger

router = APIRouter(tags=["health"])
log = get_logger(__name__)


class Health(BaseModel):
    status: Literal["ok"] = "ok"


@router.get("/healthz", response_model=Health)
def healthz() -> Health:
    """The process answers."""
    return Health()


@router.get("/readyz", response_model=Health)
def readyz(engine: Database, storage: ObjectStore) -> Health:
    """Database and object store can be reached."""
    for name, probe in (("database", partial(_ask, engine)), ("object store", storage.check)):
        try:
            probe()
        except Exception as error:
            log.exception("readyz.failed", part=name)
            raise Unavailable(f"The {name} cannot be reached.") from error
    return Health()


def _ask(engine: Engine) -> None:
    with read_session(engine) as session:
        session.execute(text("SELECT version_num FROM alembic_version"))
