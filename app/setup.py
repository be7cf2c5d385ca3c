"""What a new or updated deployment needs before it can serve: schema, bundled base model and policy, first keys.

Knows: the order of these steps, and that each may be repeated without harm.
Refuses to know: processes and ports.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Engine

from app.accounts import service as accounts
from app.base_models import service as base_models
from app.database import open_engine, unit_of_work
from app.safety import service as safety
from app.safety.library import BUNDLED_ASSETS
from app.settings import Settings
from app.storage import Storage, open_storage

MIGRATIONS = Path(__file__).parent.parent / "migrations"
FIRST_KEY_NAME = "first"


@dataclass(frozen=True, slots=True)
class FirstKeys:
    """The texts of the keys made at first start. They are shown once and kept nowhere."""

    api_key: str
    operator_key: str

    def __repr__(self) -> str:
        return "FirstKeys(…)"


def prepare(settings: Settings) -> FirstKeys | None:
    """Everything `theriac up` needs; the keys are returned at the first start only."""
    settings.home.mkdir(parents=True, exist_ok=True)
    migrate(settings)
    engine = open_engine(settings.resolved_database_url)
    try:
        install_bundled(engine, open_storage(settings))
        return create_first_keys(engine)
    finally:
        engine.dispose()


def migrate(settings: Settings, revision: str = "head") -> None:
    """Brings the database to the newest schema (or to the one named)."""
    settings.home.mkdir(parents=True, exist_ok=True)
    engine = open_engine(settings.resolved_database_url)
    try:
        migrate_engine(engine, revision)
    finally:
        engine.dispose()


def migrate_engine(engine: Engine, revision: str = "head", *, down: bool = False) -> None:
    config = alembic_config()
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        (command.downgrade if down else command.upgrade)(config, revision)


def alembic_config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    return config


def install_bundled(engine: Engine, storage: Storage, *, assets: Path = BUNDLED_ASSETS) -> None:
    """The apothecary base model, its provider sets and the `default` policy."""
    base = base_models.register_bundled(engine, assets=assets)
    safety.install_bundled(engine, storage, base_model_id=base.id, assets=assets)


def create_first_keys(engine: Engine) -> FirstKeys | None:
    """A customer's and an operator's key, when there is none of either yet."""
    with unit_of_work(engine) as session:
        if accounts.list_keys(session) or accounts.list_operator_keys(session):
            return None
        project = accounts.ensure_default_project(session)
        _, api_key = accounts.issue_key(session, project.id, FIRST_KEY_NAME)
        _, operator_key = accounts.issue_operator_key(session, FIRST_KEY_NAME)
        return FirstKeys(api_key, operator_key)
