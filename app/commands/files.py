"""`theriac files`: upload, list, look, delete. Knows: arguments and columns. Refuses to know: the service's insides."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from app.commands.client import DEFAULT_URL, AsJson, Key, Url, connect
from app.commands.output import moment, show_json, show_table

commands = typer.Typer(no_args_is_help=True, help="Datasets: upload, validation, deletion.")


@commands.command()
def upload(
    path: Annotated[Path, typer.Argument(exists=True, dir_okay=False, readable=True)],
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Upload a JSONL dataset. It is streamed from disk and validated by the service."""
    with connect(url, key) as service, path.open("rb") as stream:
        file = service.post("/files", data={"purpose": "fine-tune"}, files={"file": (path.name, stream)})
    if as_json:
        show_json(file)
    else:
        typer.echo(f"{file['id']}  {file['bytes']} bytes  {file['status']}")


@commands.command("list")
def list_files(
    limit: Annotated[int, typer.Option(min=1, max=10_000)] = 100,
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: AsJson = False,
) -> None:
    """List the project's files, newest first."""
    with connect(url, key) as service:
        files = list(service.pages("/files", limit))
    if as_json:
        show_json(files)
        return
    rows = [[f["id"], f["filename"], f["bytes"], f["purpose"], f["status"], moment(f["created_at"])] for f in files]
    show_table(("id", "name", "bytes", "purpose", "status", "created"), rows, empty="no files")


@commands.command()
def validation(file_id: str, url: Url = DEFAULT_URL, key: Key = "", as_json: AsJson = False) -> None:
    """Show which rules a dataset breaks, and where."""
    with connect(url, key) as service:
        report = service.get(f"/files/{file_id}/validation")
    if as_json:
        show_json(report)
        return
    typer.echo(f"{report['verdict'] or 'not validated yet'}  rows: {report['rows']}  format: {report['format']}")
    show_table(("rule", "severity", "count", "first line", "detail"), _rule_rows(report), empty="no rule is broken")


@commands.command()
def delete(file_id: str, url: Url = DEFAULT_URL, key: Key = "") -> None:
    """Delete a file that no unfinished job needs."""
    with connect(url, key) as service:
        service.delete(f"/files/{file_id}")
    typer.echo(f"deleted {file_id}")


def _rule_rows(report: dict[str, Any]) -> list[list[Any]]:
    rows = []
    for rule in report["rules"]:
        first = rule["samples"][0] if rule["samples"] else {}
        rows.append([rule["id"], rule["severity"], rule["count"], first.get("line"), first.get("detail")])
    return rows
