"""Who is asking: organizations, projects and their keys.

Knows: how a key proves a project (or an operator), and that unknown, expired, revoked and malformed keys are all
answered alike.
Refuses to know: what the project may do with its answer; every query takes the project from the key, never from
the request.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy.orm import Session

from app.accounts import keys, repository
from app.errors import NotFound, Unauthorized
from app.kit.clock import now
from app.kit.ids import new_id
from app.tables.accounts import ApiKey, OperatorKey, Organization, Project

# Compared against when the key id is unknown, so that the answer takes as long as for a known one.
ABSENT_DIGEST = "0" * 64
TOUCH_SECONDS = 60.0
DEFAULT_ORGANIZATION = "default"
DEFAULT_PROJECT = "default"


@dataclass(frozen=True, slots=True)
class Principal:
    """The project a customer's key stands for."""

    project_id: str
    organization_id: str
    key_id: str
    touch_due: bool = False


@dataclass(frozen=True, slots=True)
class Operator:
    """A person of the provider, by their key."""

    key_id: str
    name: str
    touch_due: bool = False


def authenticate(session: Session, header: str | None) -> Principal:
    """From an `Authorization` header; raises Unauthorized."""
    key = keys.parse(_bearer(header), keys.CUSTOMER_PREFIX)
    found = repository.find_api_key(session, key.key_id) if key else None
    row, project = found or (None, None)
    if not _valid(key, row) or row is None or project is None or project.archived_at is not None:
        raise _refused()
    if row.expires_at is not None and row.expires_at <= now():
        raise _refused()
    return Principal(project.id, project.organization_id, row.id, _touch_due(row.last_used_at))


def authenticate_operator(session: Session, header: str | None) -> Operator:
    key = keys.parse(_bearer(header), keys.OPERATOR_PREFIX)
    row = repository.find_operator_key(session, key.key_id) if key else None
    if not _valid(key, row) or row is None:
        raise _refused()
    return Operator(row.id, row.name, _touch_due(row.last_used_at))


def touch(session: Session, caller: Principal | Operator) -> None:
    """Notes that the key was used; callers ask only when `touch_due`, so that reading stays reading."""
    repository.touch(session, ApiKey if isinstance(caller, Principal) else OperatorKey, caller.key_id, now())


def ensure_default_project(session: Session) -> Project:
    """The project of a service that nobody has divided yet."""
    return ensure_project(session, DEFAULT_ORGANIZATION, DEFAULT_PROJECT)


def ensure_project(session: Session, organization_name: str, project_name: str) -> Project:
    organization = repository.find_organization(session, organization_name)
    if organization is None:
        organization = Organization(id=new_id("org_"), name=organization_name)
        session.add(organization)
        session.flush()
    project = repository.find_project(session, organization.id, project_name)
    if project is None:
        project = Project(id=new_id("proj_"), organization_id=organization.id, name=project_name)
        session.add(project)
        session.flush()
    return project


def organization_of(session: Session, project_id: str) -> Organization:
    return repository.get_organization_of(session, project_id)


def issue_key(session: Session, project_id: str, name: str, *, expires_at: float | None = None) -> tuple[ApiKey, str]:
    """A new customer key and its text, which is shown this once and kept nowhere."""
    key = keys.new_key(keys.CUSTOMER_PREFIX)
    row = ApiKey(
        id=new_id("key_"),
        project_id=project_id,
        name=name,
        key_id=key.key_id,
        digest=key.digest,
        expires_at=expires_at,
    )
    session.add(row)
    session.flush()
    return row, key.text


def issue_operator_key(session: Session, name: str) -> tuple[OperatorKey, str]:
    key = keys.new_key(keys.OPERATOR_PREFIX)
    row = OperatorKey(id=new_id("okey_"), name=name, key_id=key.key_id, digest=key.digest)
    session.add(row)
    session.flush()
    return row, key.text


def list_keys(session: Session) -> Sequence[ApiKey]:
    return repository.list_api_keys(session)


def list_operator_keys(session: Session) -> Sequence[OperatorKey]:
    return repository.list_operator_keys(session)


def revoke_key(session: Session, key: str) -> None:
    """By id (``key_…``), or by the public part of the key's text. Works at once: keys are read at every request."""
    if not repository.revoke(session, key, now()):
        raise NotFound(f"There is no live key {key!r}.")


def _bearer(header: str | None) -> str:
    scheme, _, text = (header or "").partition(" ")
    return text.strip() if scheme.lower() == "bearer" else ""


def _valid(key: keys.KeyText | None, row: ApiKey | OperatorKey | None) -> bool:
    if key is None or row is None:
        hmac.compare_digest(key.digest if key else ABSENT_DIGEST, ABSENT_DIGEST)
        return False
    return keys.matches(key, row.digest) and row.revoked_at is None


def _touch_due(last_used_at: float | None) -> bool:
    return last_used_at is None or now() - last_used_at > TOUCH_SECONDS


def _refused() -> Unauthorized:
    return Unauthorized(
        "Incorrect API key provided. Send it as 'Authorization: Bearer thk_…'; `theriac keys create` makes one."
    )
