"""Fetches a base model's files from a model hub into the service's own folder.

Knows: that a revision must be named, which files are wanted, and that workers never go to the hub themselves.
Refuses to know: whether the folder is acceptable (`folder`) and the database.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Protocol

from app.errors import InvalidRequest, Unavailable

WANTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "LICENSE*")
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


class Fetcher(Protocol):
    """Downloads the wanted files of one revision into `folder` and returns the exact revision fetched."""

    def __call__(self, hub_id: str, revision: str, folder: Path) -> str: ...


def fetch(hub_id: str, revision: str, parent: Path, fetcher: Fetcher) -> tuple[Path, str]:
    """The folder below `parent` that holds the model, and the revision it is."""
    if not HUB_ID.fullmatch(hub_id):
        raise InvalidRequest(f"{hub_id!r} is not a hub id of the form owner/name.", param="hub_id")
    if not revision:
        raise InvalidRequest("Name the revision (a commit), so that the bytes are the same tomorrow.", param="revision")
    folder = parent / hub_id.replace("/", "--") / re.sub(r"[^A-Za-z0-9._-]", "-", revision)
    folder.mkdir(parents=True, exist_ok=True)
    return folder, fetcher(hub_id, revision, folder)


def fetch_from_hugging_face(hub_id: str, revision: str, folder: Path) -> str:
    """The fetcher `theriac base-models add --hub` uses."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise Unavailable("Install theriac[worker] to fetch from a hub, or register a local folder.") from error
    exact = huggingface_hub.HfApi().model_info(hub_id, revision=revision).sha
    if exact is None:
        raise InvalidRequest(f"The hub knows no revision {revision!r} of {hub_id}.", param="revision")
    huggingface_hub.snapshot_download(hub_id, revision=exact, local_dir=folder, allow_patterns=list(WANTED))
    leftovers = folder / ".cache"
    if leftovers.exists():
        _remove_tree(leftovers)
    return exact


def _remove_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()
