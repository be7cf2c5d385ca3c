"""The database of THERIAC_HOME, for the few commands that work on the provider's own machine.

Knows: how to open it, and that its schema may need to be made first. Refuses to know: what is done with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Engine

from app import setup
from app.commands.output import fail
from app.database import open_engine
from app.errors import ServiceError
from app.settings import get_settings


@contextmanager
def opened() -> Iterator[Engine]:
    """An engine on the current schema; refusals become one line and exit code 1."""
    settings = get_settings()
    setup.migrate(settings)
    engine = open_engine(settings.resolved_database_url)
    try:
        yield engine
    except ServiceError as error:
        fail(f"{error.message} ({error.code})")
    finally:
        engine.dispose()
