"""Provider sets and policies as an operator handles them over HTTP.

Knows: which service does it, what is shown of the result, and that every change leaves a log line with its author.
Refuses to know: rows. There is no function here that returns one.
"""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from app import telemetry
from app.admin.schemas import PolicyList, PolicyObject, ProviderSetList, ProviderSetObject
from app.base_models import service as base_models
from app.database import read_session
from app.errors import InvalidRequest
from app.safety import provider_sets, publishing
from app.safety import service as safety
from app.safety.library import SPLIT_OF
from app.safety.provider_sets import NewSet
from app.safety.schemas import PolicyDraft, SetRole
from app.storage import Storage
from app.tables.safety import Policy, ProviderSet

log = telemetry.get_logger(__name__)


def import_set(engine: Engine, storage: Storage, path: Path, new: NewSet) -> ProviderSetObject:
    shown = provider_set_object(provider_sets.import_set(engine, storage, path, new))
    log.info("provider_set.imported", set_id=shown.id, sha256=shown.sha256, by=new.imported_by)
    return shown


def list_sets(session: Session, *, role: SetRole | None, after: str | None, limit: int) -> ProviderSetList:
    page = provider_sets.list_page(session, role=role, after=after, limit=limit)
    data = [provider_set_object(row) for row in page.data]
    return ProviderSetList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=page.has_more,
    )


def get_set(session: Session, set_id: str) -> ProviderSetObject:
    return provider_set_object(provider_sets.get_set(session, set_id))


def publish_policy(engine: Engine, storage: Storage, draft: PolicyDraft, *, published_by: str) -> PolicyObject:
    base_model_id = base_model_id_of(engine, draft)
    policy = publishing.publish(engine, storage, draft, base_model_id=base_model_id, published_by=published_by)
    shown = policy_object(policy, draft.base_model)
    log.info("policy.published", policy_id=shown.id, digest=shown.digest, by=published_by)
    return shown


def base_model_id_of(engine: Engine, draft: PolicyDraft) -> str | None:
    """The id of the base model the draft names; None where it is for any."""
    if draft.base_model is None:
        return None
    with read_session(engine) as session:
        base = base_models.get_by_name(session, draft.base_model)
    if base is None:
        raise InvalidRequest(
            f"There is no base model {draft.base_model!r}.", code="model_not_found", param="base_model"
        )
    return base.id


def list_policies(session: Session, *, after: str | None, limit: int) -> PolicyList:
    page = safety.list_policies(session, after=after, limit=limit)
    data = [policy_object(policy, _base_name(session, policy)) for policy in page.data]
    return PolicyList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=page.has_more,
    )


def _base_name(session: Session, policy: Policy) -> str | None:
    return None if policy.base_model_id is None else base_models.get(session, policy.base_model_id).name


def provider_set_object(row: ProviderSet) -> ProviderSetObject:
    return ProviderSetObject(
        id=row.id,
        name=row.name,
        role=row.role,
        split=SPLIT_OF[row.role],
        version=row.version,
        sha256=row.sha256,
        rows=row.rows,
        groups=row.groups,
        categories=row.categories,
        imported_by=row.imported_by,
        created_at=int(row.created_at),
    )


def policy_object(policy: Policy, base_model: str | None) -> PolicyObject:
    return PolicyObject(
        id=policy.id,
        name=policy.name,
        version=policy.version,
        base_model=base_model,
        digest=policy.digest,
        active=policy.active,
        published_by=policy.published_by,
        created_at=int(policy.created_at),
        body=policy.body,
    )
