"""`/v1/models`: base models and released ones; download of what was released.

Knows: verbs, paths (a base's id may hold '/'), ranges. Refuses to know: candidates. What no gate passed has no route.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Depends, Header
from fastapi.responses import StreamingResponse

from app.accounts.dependencies import Caller, ObjectStore, Reading, Writing
from app.base_models import service as base_models
from app.errors import Forbidden, NotFound
from app.releases import artifact
from app.releases import service as releases
from app.releases.artifact import Span
from app.releases.manifest import find_file
from app.releases.schemas import (
    Artifact,
    Model,
    ModelDeleted,
    ModelList,
    artifact_object,
    base_model_object,
    tuned_model_object,
)

router = APIRouter(prefix="/models", tags=["models"])


@dataclass(frozen=True, slots=True)
class WantedRange:
    """`if_range` names the content the range was measured on; of another content the whole is sent."""

    range: str | None
    if_range: str | None


def wanted_range(
    range_: Annotated[str | None, Header(alias="range")] = None, if_range: Annotated[str | None, Header()] = None
) -> WantedRange:
    return WantedRange(range_, if_range)


@router.get("", response_model=ModelList)
def list_models(caller: Caller, session: Reading) -> ModelList:
    """Base models that can be tuned, and the project's released models."""
    bases = [base_model_object(base) for base in base_models.list_active(session)]
    tuned = [
        tuned_model_object(release, caller.organization_id)
        for release in releases.list_servable(session, caller.project_id)
    ]
    return ModelList(data=[*bases, *tuned])


@router.get("/{model_id}/artifact", response_model=Artifact)
def retrieve_artifact(model_id: str, caller: Caller, session: Reading) -> Artifact:
    """The manifest of a released model: every file with its sha256, and the digests the gate judged."""
    return artifact_object(releases.get_servable(session, caller.project_id, model_id))


@router.get("/{model_id}/artifact.tar", response_class=StreamingResponse)
def download_tar(model_id: str, caller: Caller, session: Reading, storage: ObjectStore) -> StreamingResponse:
    """Download the whole bundle as one tar; the same bytes every time."""
    release = releases.get_servable(session, caller.project_id, model_id)
    headers = {
        "content-length": str(artifact.tar_bytes(release)),
        "content-disposition": f'attachment; filename="{release.id}.tar"',
    }
    return StreamingResponse(artifact.stream_tar(storage, release), media_type="application/x-tar", headers=headers)


@router.get("/{model_id}/artifact/{path:path}", response_class=StreamingResponse)
def download_file(
    model_id: str,
    path: str,
    caller: Caller,
    session: Reading,
    storage: ObjectStore,
    wanted: Annotated[WantedRange, Depends(wanted_range)],
) -> StreamingResponse:
    """Download one file of the bundle, whole or one range of it."""
    release = releases.get_servable(session, caller.project_id, model_id)
    entry = find_file(release.manifest, path)
    if entry is None:
        raise NotFound(f"The model has no file {path!r}.", code="file_not_found", param="path")
    etag, size = f'"{entry["sha256"]}"', int(entry["bytes"])
    span = artifact.parse_range(wanted.range, size) if wanted.if_range in {None, etag} else None
    whole = Span(0, size)
    headers = {
        "accept-ranges": "bytes",
        "etag": etag,
        "x-content-sha256": entry["sha256"],
        "content-length": str((span or whole).bytes),
    }
    if span is not None:
        headers["content-range"] = f"bytes {span.start}-{span.end - 1}/{size}"
    return StreamingResponse(
        artifact.stream_file(storage, release, entry, span or whole),
        status_code=206 if span else 200,
        media_type="application/octet-stream",
        headers=headers,
    )


@router.get("/{model_id:path}", response_model=Model)
def retrieve(model_id: str, caller: Caller, session: Reading) -> Model:
    """Look at a base model or a released one."""
    base = base_models.get_by_name(session, model_id)
    if base is not None:
        return base_model_object(base)
    return tuned_model_object(releases.get_servable(session, caller.project_id, model_id), caller.organization_id)


@router.delete("/{model_id:path}", response_model=ModelDeleted)
def delete(model_id: str, caller: Caller, session: Writing) -> ModelDeleted:
    """Delete a tuned model: it is no longer listed or downloadable."""
    if base_models.get_by_name(session, model_id) is not None:
        raise Forbidden("A base model belongs to the provider and cannot be deleted here.", param="model")
    releases.delete(session, caller.project_id, model_id)
    return ModelDeleted(id=model_id)
