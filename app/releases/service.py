"""Releases: granting, suspending and revoking the right to fetch one exact digest.

Knows: that a release is bound to a gate run over the same digest (or to an operator's recorded reason), and the
machine of its states.
Refuses to know: jobs. The database repeats the first rule by foreign key, so that no code path can forget it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from app import outbox
from app.domain.events import Topic
from app.domain.release_lifecycle import ReleaseState
from app.errors import IllegalTransition, NotFound
from app.kit.clock import now
from app.kit.ids import new_id
from app.releases import manifest as manifests
from app.releases import repository
from app.tables.releases import Release
from app.tables.safety import GateRun


@dataclass(frozen=True, slots=True)
class Candidate:
    """A packaged candidate: where its files lie and what they are, as judged by a gate run."""

    project_id: str
    job_id: str
    model_id: str
    storage_prefix: str
    manifest: Mapping[str, Any]
    bundle_digest: str


def grant(session: Session, candidate: Candidate, gate_run: GateRun, *, override_reason: str | None = None) -> Release:
    """The release row. Without an override only a passed gate run will do; the database insists as well."""
    manifests.check(
        candidate.manifest, candidate_digest=gate_run.candidate_digest, bundle_digest=candidate.bundle_digest
    )
    release = Release(
        id=new_id("rel_"),
        model_id=candidate.model_id,
        project_id=candidate.project_id,
        job_id=candidate.job_id,
        gate_run_id=gate_run.id,
        gate_verdict=gate_run.verdict.value,
        candidate_digest=gate_run.candidate_digest,
        bundle_digest=candidate.bundle_digest,
        storage_prefix=candidate.storage_prefix,
        manifest=dict(candidate.manifest),
        state=ReleaseState.RELEASED,
        override_reason=override_reason,
    )
    session.add(release)
    session.flush()
    _record(session, release, Topic.MODEL_RELEASED)
    return release


def get_servable(session: Session, project_id: str, model_id: str) -> Release:
    """A released model of this project; a candidate, a foreign or a suspended one is as absent as an unknown one."""
    release = repository.find_servable(session, project_id, model_id)
    if release is None:
        raise no_such_model(model_id)
    return release


def list_servable(session: Session, project_id: str) -> Sequence[Release]:
    return repository.list_servable(session, project_id)


def get(session: Session, release_id: str) -> Release:
    release = repository.get(session, release_id)
    if release is None:
        raise NotFound(f"There is no release {release_id!r}.", param="release_id")
    return release


def find_by_job(session: Session, job_id: str) -> Release | None:
    return repository.find_by_job(session, job_id)


def suspend(session: Session, release_id: str, reason: str) -> Release:
    """Stops downloads until resumed."""
    return _move(session, release_id, ReleaseState.SUSPENDED, reason, Topic.MODEL_SUSPENDED)


def resume(session: Session, release_id: str, reason: str) -> Release:
    return _move(session, release_id, ReleaseState.RELEASED, reason, Topic.MODEL_RELEASED)


def revoke(session: Session, release_id: str, reason: str) -> Release:
    """Stops downloads for good."""
    return _move(session, release_id, ReleaseState.REVOKED, reason, Topic.MODEL_REVOKED)


def delete(session: Session, project_id: str, model_id: str) -> None:
    """The customer's own end of a model. The row stays as evidence; its bytes are no longer served."""
    repository.mark_deleted(session, get_servable(session, project_id, model_id).id, now())


def no_such_model(model_id: str) -> NotFound:
    return NotFound(f"The model {model_id!r} does not exist", code="model_not_found", param="model")


def _move(session: Session, release_id: str, to: ReleaseState, reason: str, topic: Topic) -> Release:
    release = get(session, release_id)
    before = release.state
    if not repository.move(session, release_id, to, state_reason=reason):
        raise IllegalTransition(f"A {before.value} release cannot become {to.value}.")
    session.refresh(release)
    _record(session, release, topic)
    return release


def _record(session: Session, release: Release, topic: Topic) -> None:
    outbox.record(
        session, project_id=release.project_id, subject_id=release.id, topic=topic, data={"id": release.model_id}
    )
