"""`theriac sets`: the provider's own data, on the provider's own machine.

Knows: arguments and columns, and that rows are shown nowhere: an export writes a file that only its owner may read.
Refuses to know: how rows are checked.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from app.admin.provider_data import provider_set_object
from app.commands.client import AsJson
from app.commands.database import opened
from app.commands.output import fail, moment, show_json, show_table
from app.database import read_session
from app.safety import provider_sets
from app.safety.provider_sets import NewSet
from app.safety.schemas import SetRole
from app.settings import get_settings
from app.storage import open_storage

commands = typer.Typer(no_args_is_help=True, help="Provider sets: harmful rows, refusals, retention, gate prompts.")

BY = "command line"
PAGE = 100
Name = Annotated[str, typer.Argument(help="the set's name")]
Role = Annotated[SetRole, typer.Option(help="what the rows are for")]
Version = Annotated[int | None, typer.Option(min=1, help="default: the newest")]


@commands.command("import")
def import_set(
    name: Name,
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, readable=True, help="JSONL, one row a line")],
    role: Role,
    as_json: AsJson = False,
) -> None:
    """Check a JSONL file and keep it as a new version; the same bytes are the same version."""
    with opened() as engine:
        storage = open_storage(get_settings())
        _show(_row(provider_sets.import_set(engine, storage, file, NewSet(name, role, imported_by=BY))), as_json)


@commands.command("list")
def list_sets(
    role: Annotated[SetRole | None, typer.Option(help="only sets of this role")] = None, as_json: AsJson = False
) -> None:
    """List every version of every set, newest first."""
    rows: list[dict[str, Any]] = []
    with opened() as engine, read_session(engine) as session:
        while True:
            page = provider_sets.list_page(session, role=role, after=rows[-1]["id"] if rows else None, limit=PAGE)
            rows += [_row(provider_set) for provider_set in page.data]
            if not page.has_more:
                break
    if as_json:
        show_json(rows)
        return
    columns = ("id", "name", "role", "version", "rows", "groups", "created")
    cells = [[moment(row["created_at"]) if name == "created" else row[name] for name in columns] for row in rows]
    show_table(columns, cells, empty="no provider sets")


@commands.command()
def show(name: Name, role: Role, version: Version = None, as_json: AsJson = False) -> None:
    """Show what is known of a set: version, digest, counts by category. No rows."""
    with opened() as engine, read_session(engine) as session:
        _show(_row(provider_sets.find_set(session, name, role, version)), as_json)


@commands.command()
def export(
    name: Name,
    role: Role,
    out: Annotated[Path, typer.Option(help="must not exist; readable by you alone")],
    version: Version = None,
) -> None:
    """Write a set's rows, byte for byte as they were imported, into a new file."""
    with opened() as engine:
        with read_session(engine) as session:
            provider_set = provider_sets.find_set(session, name, role, version)
        try:
            os.close(os.open(out, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except OSError as error:
            fail(f"{out} cannot be made: {error.strerror}")
        try:
            provider_sets.fetch(open_storage(get_settings()), provider_set, out)
        except BaseException:
            out.unlink(missing_ok=True)
            raise
    typer.echo(f"{provider_set.rows} rows, sha256 {provider_set.sha256}: {out}")


def _row(provider_set: Any) -> dict[str, Any]:
    return provider_set_object(provider_set).model_dump(exclude={"object"})


def _show(row: dict[str, Any], as_json: bool) -> None:
    if as_json:
        show_json(row)
        return
    counts = ", ".join(f"{name} {count}" for name, count in (row["categories"] or {}).items()) or "none"
    typer.echo(f"{row['id']}  {row['name']}@{row['version']}  {row['role']} (for {row['split']})")
    typer.echo(f"rows {row['rows']}  groups {row['groups'] or 'none'}  categories: {counts}")
    typer.echo(f"sha256 {row['sha256']}  imported {moment(row['created_at'])} by {row['imported_by'] or 'the product'}")
