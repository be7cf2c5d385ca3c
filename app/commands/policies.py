"""`theriac policies`: what jobs are judged by.

Knows: arguments, columns, and that a policy is a JSON file. Refuses to know: what its members mean.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from app.admin import provider_data
from app.commands.client import AsJson
from app.commands.database import opened
from app.commands.output import fail, moment, show_json, show_table
from app.database import read_session
from app.safety import publishing
from app.safety.schemas import PolicyDraft
from app.settings import get_settings
from app.storage import open_storage

commands = typer.Typer(no_args_is_help=True, help="Safety policies: limits, judge, recovery plan, provider sets.")

BY = "command line"
PAGE = 100


@commands.command()
def publish(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, readable=True, help="a policy as JSON")],
    as_json: AsJson = False,
) -> None:
    """Publish a policy: a new version, which jobs created from now on are judged by."""
    draft = _read(file)
    with opened() as engine:
        base_model_id = provider_data.base_model_id_of(engine, draft)
        storage = open_storage(get_settings())
        policy = publishing.publish(engine, storage, draft, base_model_id=base_model_id, published_by=BY)
        published = provider_data.policy_object(policy, draft.base_model).model_dump(exclude={"object"})
    if as_json:
        show_json(published)
    else:
        typer.echo(f"{published['id']}  {published['name']}@{published['version']}  digest {published['digest']}")


@commands.command("list")
def list_policies(as_json: AsJson = False) -> None:
    """List every version of every policy, newest first."""
    rows: list[dict[str, Any]] = []
    with opened() as engine, read_session(engine) as session:
        while True:
            page = provider_data.list_policies(session, after=rows[-1]["id"] if rows else None, limit=PAGE)
            rows += [policy.model_dump(exclude={"object"}) for policy in page.data]
            if not page.has_more:
                break
    if as_json:
        show_json(rows)
        return
    columns = ("id", "name", "version", "base model", "published by", "created")
    cells = [
        [
            row["id"],
            row["name"],
            row["version"],
            row["base_model"] or "any",
            row["published_by"],
            moment(row["created_at"]),
        ]
        for row in rows
    ]
    show_table(columns, cells, empty="no policies")


def _read(file: Path) -> PolicyDraft:
    try:
        return PolicyDraft.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        fail(f"{file} is not a policy: {place}: {first['msg']}")
