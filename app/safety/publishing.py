"""Publishing a policy: no version is made of sets that a job would refuse.

Knows: that every role is filled by a set of that role, and that the rows of all of them are compared before the policy
exists, outside any transaction: sets never change.
Refuses to know: HTTP, who may publish, and how rows are compared (`workers.ml.set_overlap`).
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from app.database import read_session, unit_of_work
from app.errors import InvalidRequest
from app.safety import provider_sets, repository, service
from app.safety.library import LibraryError, overlaps_of, read_prompt_rows
from app.safety.schemas import PolicyBody, PolicyDraft, SetRole
from app.storage import Storage
from app.tables.safety import Policy, ProviderSet

REFERENCE = re.compile(r"(?P<name>[^@]+)(?:@(?P<version>[0-9]{1,9}))?")


def publish(
    engine: Engine, storage: Storage, draft: PolicyDraft, *, base_model_id: str | None, published_by: str
) -> Policy:
    """A new version of the draft's policy, or the one that already says exactly this. Raises InvalidRequest."""
    with read_session(engine) as session:
        sets = {role: _find(session, role, draft.sets.get(role)) for role in SetRole}
    check_apart(storage, sets)
    ids = {role: provider_set.id for role, provider_set in sets.items()}
    values = {name: getattr(draft, name) for name in PolicyBody.model_fields if name != "sets"}
    body = PolicyBody(**values, sets=ids)
    with unit_of_work(engine) as session:
        return service.publish_policy(session, draft.name, body, base_model_id=base_model_id, published_by=published_by)


def check_apart(storage: Storage, sets: Mapping[SetRole, ProviderSet]) -> None:
    """Refuses sets that share what they may not, with the ids of the rows."""
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for role, provider_set in sets.items():
            path = Path(folder) / f"{role.value}.jsonl"
            provider_sets.fetch(storage, provider_set, path)
            try:
                rows[role.value] = read_prompt_rows(path, role.value)
            except LibraryError as error:
                raise InvalidRequest(str(error), code="invalid_provider_set", param=f"sets.{role.value}") from error
    for found in overlaps_of(rows):
        raise InvalidRequest(str(found), code="provider_sets_overlap", param=f"sets.{found.role}")


def _find(session: Session, role: SetRole, reference: str | None) -> ProviderSet:
    """A role's set by id, or by its name, or by name@version."""
    param = f"sets.{role.value}"
    if reference is None:
        raise InvalidRequest(
            f"A policy needs a provider set of every role; this one names none for {role.value!r}.",
            code="missing_required_parameter",
            param=param,
        )
    found = repository.get_set(session, reference)
    if found is None and (named := REFERENCE.fullmatch(reference)) is not None:
        version = named["version"]
        found = repository.find_set_version(session, named["name"], role, int(version) if version else None)
    if found is None:
        raise InvalidRequest(
            f"There is no provider set {reference!r} of role {role.value!r}; name it by its id, its name, or "
            "name@version.",
            code="unknown_provider_set",
            param=param,
        )
    if found.role != role.value:
        raise InvalidRequest(
            f"{reference!r} was imported as {found.role!r} and cannot serve as {role.value!r}.",
            code="wrong_set_role",
            param=param,
        )
    return found
