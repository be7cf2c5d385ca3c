"""`theriac keys`: customers' and operators' keys, on the provider's own machine.

Knows: that a key's text is printed once. Refuses to know: HTTP; whoever can write the database needs no key.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from app.accounts import service as accounts
from app.commands.client import AsJson
from app.commands.database import opened
from app.commands.output import moment, show_json, show_table
from app.database import read_session, unit_of_work
from app.kit.clock import now
from app.tables.accounts import ApiKey, OperatorKey

commands = typer.Typer(no_args_is_help=True, help="API keys and operator keys.")


@commands.command()
def create(
    name: Annotated[str, typer.Argument(help="whom the key is for")] = "key",
    operator: Annotated[bool, typer.Option("--operator", help="a provider's key instead of a customer's")] = False,
    organization: Annotated[str, typer.Option()] = accounts.DEFAULT_ORGANIZATION,
    project: Annotated[str, typer.Option()] = accounts.DEFAULT_PROJECT,
    days: Annotated[float | None, typer.Option(min=0.0, help="lifetime; default: until revoked")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it, this once."""
    with opened() as engine, unit_of_work(engine) as session:
        row: ApiKey | OperatorKey
        if operator:
            row, text = accounts.issue_operator_key(session, name)
        else:
            owner = accounts.ensure_project(session, organization, project)
            expires_at = now() + days * 86400 if days is not None else None
            row, text = accounts.issue_key(session, owner.id, name, expires_at=expires_at)
        made = {"id": row.id, "name": row.name, "key": text}
    if as_json:
        show_json(made)
    else:
        typer.echo(made["key"])


@commands.command("list")
def list_keys(as_json: AsJson = False) -> None:
    """List keys. Their texts are not kept anywhere."""
    with opened() as engine, read_session(engine) as session:
        rows = [_row("customer", key) for key in accounts.list_keys(session)]
        rows += [_row("operator", key) for key in accounts.list_operator_keys(session)]
    if as_json:
        show_json(rows)
        return
    columns = ("id", "kind", "name", "project", "created", "last used", "state")
    show_table(columns, [[row[name.replace(" ", "_")] for name in columns] for row in rows], empty="no keys")


@commands.command()
def revoke(key: Annotated[str, typer.Argument(help="the key's id (key_…)")]) -> None:
    """Revoke a key; it stops working at once."""
    with opened() as engine, unit_of_work(engine) as session:
        accounts.revoke_key(session, key)
    typer.echo(f"revoked {key}")


def _row(kind: str, key: ApiKey | OperatorKey) -> dict[str, Any]:
    expires_at = getattr(key, "expires_at", None)
    expired = expires_at is not None and expires_at <= now()
    return {
        "id": key.id,
        "kind": kind,
        "name": key.name,
        "project": getattr(key, "project_id", None),
        "created": moment(key.created_at),
        "last_used": moment(key.last_used_at),
        "state": "revoked" if key.revoked_at else "expired" if expired else "live",
    }
