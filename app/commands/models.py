"""`theriac models`: list, and download with every byte checked. Knows: manifests. Refuses to know: candidates."""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from app.commands.client import DEFAULT_URL, AsJson, Key, Service, Url, connect
from app.commands.output import fail, moment, show_json, show_table

commands = typer.Typer(no_args_is_help=True, help="Base models and released models.")

CHUNK_BYTES = 1 << 20


@commands.command("list")
def list_models(url: Url = DEFAULT_URL, key: Key = "", as_json: AsJson = False) -> None:
    """List base models and the project's released models."""
    with connect(url, key) as service:
        models = service.get("/models")["data"]
    if as_json:
        show_json(models)
        return
    rows = [[m["id"], m["base_model"], m["owned_by"], moment(m["created"])] for m in models]
    show_table(("id", "base model", "owned by", "created"), rows, empty="no models")


@commands.command()
def download(
    model: str,
    folder: Annotated[Path, typer.Argument(help="made if it does not exist")],
    url: Url = DEFAULT_URL,
    key: Key = "",
) -> None:
    """Download a released adapter; every file is compared with the manifest's sha256 before it gets its name."""
    with connect(url, key) as service:
        manifest = service.get(f"/models/{model}/artifact")
        total = sum(entry["bytes"] for entry in manifest["files"])
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, transient=True) as progress:
            task = progress.add_task(model, total=total)
            for entry in manifest["files"]:
                _fetch(service, model, entry, folder, (progress, task))
    typer.echo(f"{len(manifest['files'])} files, {total} bytes, bundle {manifest['bundle_digest']} verified: {folder}")


def _fetch(service: Service, model: str, entry: dict[str, Any], folder: Path, meter: tuple[Progress, TaskID]) -> None:
    target = folder / _inside(entry["path"])
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    hasher, (progress, task) = hashlib.sha256(), meter
    with service.stream(f"/models/{model}/artifact/{entry['path']}") as response, partial.open("wb") as output:
        for chunk in response.iter_bytes(CHUNK_BYTES):
            hasher.update(chunk)
            output.write(chunk)
            progress.advance(task, len(chunk))
    if hasher.hexdigest() != entry["sha256"]:
        partial.unlink()
        fail(f"{entry['path']} is not the file the manifest names; nothing was kept of it")
    partial.replace(target)


def _inside(name: str) -> PurePosixPath:
    """A service that was taken over must not write outside the chosen folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        fail(f"the manifest names a path outside the folder: {name!r}")
    return path
