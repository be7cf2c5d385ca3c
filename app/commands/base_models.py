"""`theriac base-models`: what may be tuned here.

Knows: that a folder is checked and hashed before anything is written, and that a hub is reached only here.
Refuses to know: how a model is loaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from app.base_models import hub
from app.base_models import service as base_models
from app.base_models.folder import describe_folder, describe_pretrained
from app.base_models.service import DEFAULT_LEARNING_RATE, Registration
from app.commands.client import AsJson
from app.commands.database import opened
from app.commands.output import fail, show_json, show_table
from app.database import read_session, unit_of_work
from app.settings import get_settings
from app.tables.base_models import BaseModelRef

commands = typer.Typer(no_args_is_help=True, help="Base models that may be fine-tuned.")


@commands.command()
def add(
    name: Annotated[str, typer.Argument(help="how jobs will call it")],
    path: Annotated[Path | None, typer.Option(help="a local folder")] = None,
    hub_id: Annotated[str | None, typer.Option("--hub", help="owner/name on the model hub")] = None,
    revision: Annotated[str, typer.Option(help="commit on the hub; required with --hub")] = "",
    pretrained: Annotated[
        Path | None,
        typer.Option(help="a local folder with the same weights before alignment, which some recovery methods need"),
    ] = None,
    context_limit: Annotated[int | None, typer.Option(min=8, help="default: the model's own")] = None,
    learning_rate: Annotated[
        float, typer.Option(min=0.0, help="what learning_rate_multiplier multiplies")
    ] = DEFAULT_LEARNING_RATE,
    target: Annotated[list[str] | None, typer.Option(help="layer LoRA adapts; repeat for more")] = None,
    defaults: Annotated[str, typer.Option(help='JSON, for instance {"rank": 16}')] = "{}",
    as_json: AsJson = False,
) -> None:
    """Register a local folder, or fetch a hub revision and register that. Only safetensors; no remote code."""
    if (path is None) == (hub_id is None):
        fail("give either --path or --hub")
    with opened() as engine:
        exact = None
        if path is None:
            path, exact = hub.fetch(hub_id or "", revision, _models_folder(), hub.fetch_from_hugging_face)
        described = describe_folder(path)
        registration = Registration(
            name=name,
            hub_id=hub_id,
            revision=exact,
            context_limit=context_limit,
            learning_rate=learning_rate,
            target_modules=target or (),
            defaults=_parse(defaults),
            pretrained=describe_pretrained(pretrained) if pretrained is not None else None,
        )
        with unit_of_work(engine) as session:
            added = _row(base_models.register(session, described, registration))
    if as_json:
        show_json(added)
    else:
        typer.echo(f"{added['name']}  digest {added['digest']}  context {added['context_limit']}")


@commands.command("list")
def list_base_models(as_json: AsJson = False) -> None:
    """List registered base models."""
    with opened() as engine, read_session(engine) as session:
        rows = [_row(base) for base in base_models.list_active(session)]
    if as_json:
        show_json(rows)
        return
    columns = ("name", "context_limit", "learning_rate", "digest", "path")
    show_table(columns, [[row[column] for column in columns] for row in rows], empty="no base models")


@commands.command()
def retire(name: str) -> None:
    """Offer a base model no longer to new jobs."""
    with opened() as engine, unit_of_work(engine) as session:
        base_models.retire(session, name)
    typer.echo(f"retired {name}")


def _models_folder() -> Path:
    return get_settings().home / "base-models"


def _parse(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        fail("--defaults must be a JSON object")
    return value


def _row(base: BaseModelRef) -> dict[str, Any]:
    return {
        "name": base.name,
        "path": base.path,
        "hub_id": base.hub_id,
        "revision": base.revision,
        "digest": base.digest,
        "pretrained_path": base.pretrained_path,
        "pretrained_digest": base.pretrained_digest,
        "context_limit": base.context_limit,
        "learning_rate": base.learning_rate,
        "target_modules": base.target_modules,
        "defaults": base.defaults,
    }
