"""Queries of policies, provider sets and gate runs.

Knows: SQL. Refuses to know: when a policy may be used and what a verdict means.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Select, func, or_, select
from sqlalchemy.orm import Session

from app.tables.safety import GateRun, Policy, ProviderSet


def get_policy(session: Session, policy_id: str) -> Policy | None:
    return session.get(Policy, policy_id)


def find_policy(session: Session, name: str, base_model_id: str, version: int | None) -> Policy | None:
    """The newest active version for this base; one made for the base comes before one for any base."""
    statement = select(Policy).where(
        Policy.name == name,
        Policy.active.is_(True),
        or_(Policy.base_model_id == base_model_id, Policy.base_model_id.is_(None)),
    )
    if version is not None:
        statement = statement.where(Policy.version == version)
    return session.scalars(statement.order_by(Policy.base_model_id.is_(None), Policy.version.desc()).limit(1)).first()


def find_policy_by_digest(session: Session, name: str, digest: str, base_model_id: str | None) -> Policy | None:
    statement = select(Policy).where(Policy.name == name, Policy.digest == digest)
    return session.scalars(statement.where(Policy.base_model_id.is_not_distinct_from(base_model_id)).limit(1)).first()


def last_policy_version(session: Session, name: str) -> int:
    return session.scalar(select(func.coalesce(func.max(Policy.version), 0)).where(Policy.name == name)) or 0


def find_set(session: Session, name: str, role: str, sha256: str) -> ProviderSet | None:
    statement = select(ProviderSet).where(
        ProviderSet.name == name, ProviderSet.role == role, ProviderSet.sha256 == sha256
    )
    return session.scalars(statement.limit(1)).first()


def last_set_version(session: Session, name: str, role: str) -> int:
    statement = select(func.coalesce(func.max(ProviderSet.version), 0))
    return session.scalar(statement.where(ProviderSet.name == name, ProviderSet.role == role)) or 0


def get_set(session: Session, set_id: str) -> ProviderSet | None:
    return session.get(ProviderSet, set_id)


def find_set_version(session: Session, name: str, role: str, version: int | None) -> ProviderSet | None:
    """The newest version, or the one that is named."""
    statement = select(ProviderSet).where(ProviderSet.name == name, ProviderSet.role == role)
    if version is not None:
        statement = statement.where(ProviderSet.version == version)
    return session.scalars(statement.order_by(ProviderSet.version.desc()).limit(1)).first()


def all_sets(role: str | None = None) -> Select[ProviderSet]:
    statement = select(ProviderSet)
    return statement.where(ProviderSet.role == role) if role is not None else statement


def all_policies() -> Select[Policy]:
    return select(Policy)


def get_sets(session: Session, set_ids: Sequence[str]) -> Sequence[ProviderSet]:
    return session.scalars(select(ProviderSet).where(ProviderSet.id.in_(set_ids))).all()


def last_gate_run(session: Session, job_id: str) -> GateRun | None:
    statement = select(GateRun).where(GateRun.job_id == job_id)
    return session.scalars(statement.order_by(GateRun.created_at.desc(), GateRun.id.desc()).limit(1)).first()


def list_gate_runs(session: Session, job_id: str) -> Sequence[GateRun]:
    return session.scalars(select(GateRun).where(GateRun.job_id == job_id).order_by(GateRun.created_at)).all()
