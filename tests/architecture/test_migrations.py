"""Migrations lead to exactly the tables, and back, on both databases."""

import importlib
import pkgutil
import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

import app.tables
from app.tables.base import Table

ROOT = Path(__file__).resolve().parents[2]

for _module in pkgutil.iter_modules(app.tables.__path__, "app.tables."):
    importlib.import_module(_module.name)  # a table counts once its module is loaded


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'theriac.db'}"
    new_database: Callable[[], str] = request.getfixturevalue("new_postgres_database")
    return new_database()


@pytest.fixture
def alembic(database_url: str) -> Config:
    config = Config(cmd_opts=Namespace(x=[f"url={database_url}"]))
    config.set_main_option("script_location", str(ROOT / "migrations"))
    return config


@pytest.fixture
def engine(database_url: str) -> Iterator[sa.Engine]:
    engine = sa.create_engine(database_url)
    yield engine
    engine.dispose()


def tables_in(engine: sa.Engine) -> set[str]:
    return set(sa.inspect(engine).get_table_names()) - {"alembic_version"}


def test_up_down_and_up_again_ends_at_the_tables(alembic: Config, engine: sa.Engine) -> None:
    command.upgrade(alembic, "head")
    assert tables_in(engine) == set(Table.metadata.tables)
    command.downgrade(alembic, "base")
    assert tables_in(engine) == set()
    command.upgrade(alembic, "head")
    assert tables_in(engine) == set(Table.metadata.tables)


def test_autogenerate_finds_nothing_to_do(alembic: Config, engine: sa.Engine) -> None:
    command.upgrade(alembic, "head")
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        found = [difference for difference in compare_metadata(context, Table.metadata) if not is_identity(difference)]
    assert found == []


def is_identity(difference: object) -> bool:
    """SQLite numbers rows without an IDENTITY clause, so its absence there is no difference."""
    match difference:
        case [("modify_default", _, table, column, *_)]:
            return Table.metadata.tables[table].c[column].identity is not None
    return False


def test_every_check_and_unique_constraint_of_the_tables_is_migrated(alembic: Config, engine: sa.Engine) -> None:
    """Autogenerate does not compare CHECK constraints; a status set that the database does not know is no guard."""
    command.upgrade(alembic, "head")
    inspector = sa.inspect(engine)
    for table in Table.metadata.sorted_tables:
        wanted = {str(c.name) for c in table.constraints if isinstance(c, sa.CheckConstraint)}
        assert {str(c["name"]) for c in inspector.get_check_constraints(table.name)} == wanted, table.name


def test_there_is_one_line_of_versions_with_dated_names() -> None:
    config = Config()
    config.set_main_option("script_location", str(ROOT / "migrations"))
    assert len(ScriptDirectory.from_config(config).get_heads()) == 1
    names = [path.name for path in (ROOT / "migrations" / "versions").glob("*.py") if path.name != "__init__.py"]
    assert names
    assert [name for name in names if not re.match(r"\d{4}-?\d{2}-?\d{2}_", name)] == []
