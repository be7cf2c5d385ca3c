"""What a process works with, opened once and after the fork: database connections do not survive one.

Knows: how to open them.
Refuses to know: what for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from sqlalchemy import Engine

from app.database import open_engine
from app.settings import Settings, get_settings
from app.storage import Storage, open_storage


@dataclass(frozen=True, slots=True)
class Runtime:
    engine: Engine
    storage: Storage
    settings: Settings


@lru_cache(maxsize=1)
def runtime() -> Runtime:
    settings = get_settings()
    return Runtime(open_engine(settings.resolved_database_url), open_storage(settings), settings)
