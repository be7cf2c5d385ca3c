"""The JSON of models and artifacts.

Knows: OpenAI's model object, and the manifest as a customer reads it. Refuses to know: rows of jobs.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from app.tables.base_models import BaseModelRef
from app.tables.releases import Release


class Model(BaseModel):
    """`base_model`, `release_id` and `job_id` are set for tuned models only."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    base_model: str | None = None
    release_id: str | None = None
    job_id: str | None = None


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class ModelDeleted(BaseModel):
    id: str
    object: Literal["model"] = "model"
    deleted: bool = True


class ArtifactFile(BaseModel):
    path: str
    bytes: int
    sha256: str
    blocks: list[str]


class Artifact(BaseModel):
    """What a released bundle holds. `blocks` are the sha256 of each `block_bytes` of a file."""

    object: Literal["model.artifact"] = "model.artifact"
    model: str
    release_id: str
    job_id: str
    candidate_digest: str
    bundle_digest: str
    block_bytes: int
    files: list[ArtifactFile]
    manifest: dict[str, Any]


def base_model_object(base: BaseModelRef) -> Model:
    return Model(id=base.name, created=int(base.created_at), owned_by="provider")


def tuned_model_object(release: Release, organization_id: str) -> Model:
    return Model(
        id=release.model_id,
        created=int(release.created_at),
        owned_by=organization_id,
        base_model=(release.manifest.get("base_model") or {}).get("name"),
        release_id=release.id,
        job_id=release.job_id,
    )


def artifact_object(release: Release) -> Artifact:
    facts = {key: value for key, value in release.manifest.items() if key not in {"files", "block_bytes"}}
    return Artifact(
        model=release.model_id,
        release_id=release.id,
        job_id=release.job_id,
        candidate_digest=release.candidate_digest,
        bundle_digest=release.bundle_digest,
        block_bytes=release.manifest["block_bytes"],
        files=[ArtifactFile.model_validate(entry) for entry in release.manifest["files"]],
        manifest=facts,
    )
