"""Fixtures that give a test an empty database with every table: once on SQLite, once on a real PostgreSQL."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

import app.tables
from app.database import open_engine, unit_of_work
from app.tables.accounts import Organization, Project
from app.tables.base import Table

for module in pkgutil.iter_modules(app.tables.__path__, "app.tables."):
    importlib.import_module(module.name)


@pytest.fixture(scope="session")
def postgres_with_tables(new_postgres_database: Callable[[], str]) -> str:
    """One database for all tests of the process: making one costs a second, emptying it a few milliseconds."""
    url = new_postgres_database()
    engine = open_engine(url)
    Table.metadata.create_all(engine)
    engine.dispose()
    return url


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    if request.param == "sqlite":
        engine = open_engine(f"sqlite:///{tmp_path / 'theriac.db'}")
        Table.metadata.create_all(engine)
    else:
        engine = open_engine(request.getfixturevalue("postgres_with_tables"))
        names = ", ".join(table.name for table in Table.metadata.sorted_tables)
        with engine.begin() as connection:
            connection.exec_driver_sql(f"TRUNCATE {names} RESTART IDENTITY CASCADE")
    yield engine
    engine.dispose()


@pytest.fixture
def new_project(engine: Engine) -> Callable[[str], str]:
    """Makes a project (and its organization, once) and returns its id."""

    def create(project_id: str) -> str:
        with unit_of_work(engine) as session:
            if session.get(Organization, "org_test") is None:
                session.add(Organization(id="org_test", name="test"))
                session.flush()
            session.add(Project(id=project_id, organization_id="org_test", name=project_id))
        return project_id

    return create
