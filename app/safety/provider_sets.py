"""The provider's data sets: imported by file, named, versioned, pinned by digest.

Knows: that a set is checked row by row before a byte of it is kept, that the same bytes are the same version, and that
rows leave this room only into a file on the provider's own machine.
Refuses to know: HTTP, and what the rows are good for. What is said of a set names lines and ids, never a row's text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import Engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.database import unit_of_work
from app.errors import Conflict, InvalidRequest, NotFound, Unavailable
from app.kit.ids import new_id
from app.kit.pagination import Keyset, Page, fetch_page
from app.safety import repository
from app.safety.library import LibraryError, digest_file, read_prompt_rows, repeats_of
from app.safety.schemas import NAME, SetRole
from app.storage import Storage
from app.tables.safety import ProviderSet

KEYSET = Keyset(ProviderSet.created_at, ProviderSet.id)


@dataclass(frozen=True, slots=True)
class NewSet:
    """What an import says about its file. `imported_by` is None for what ships with the product."""

    name: str
    role: SetRole
    imported_by: str | None = None


@dataclass(frozen=True, slots=True)
class StoredSet:
    """A provider set whose bytes are in the store and whose row is not written yet."""

    role: SetRole
    sha256: str
    rows: int
    storage_key: str
    groups: int = 0
    categories: Mapping[str, int] = field(default_factory=dict)


def import_set(engine: Engine, storage: Storage, path: Path, new: NewSet) -> ProviderSet:
    """Checks and stores the file and registers it under its name: a new version, unless these bytes already are one."""
    if not re.fullmatch(NAME, new.name):
        raise InvalidRequest(
            "A set's name is 1 to 64 letters, digits and . _ -, a letter or digit first.", param="name"
        )
    stored = store_set(storage, new.role, path)
    with unit_of_work(engine) as session:
        return register_set(session, new.name, stored, imported_by=new.imported_by)


def store_set(storage: Storage, role: SetRole, path: Path) -> StoredSet:
    """Puts a JSONL into the store under its digest; doing it again changes nothing. Raises InvalidRequest."""
    try:
        rows = read_prompt_rows(path, role.value)
    except LibraryError as error:
        raise InvalidRequest(str(error), code="invalid_provider_set", param="file") from error
    if (repeats := repeats_of(role.value, rows)) is not None:
        raise InvalidRequest(str(repeats), code="provider_set_repeats", param="file")
    digest = digest_file(path).sha256
    key = f"provider/sets/{digest}.jsonl"
    if not storage.exists(key):
        storage.put_file(key, path)
    return StoredSet(
        role=role,
        sha256=digest,
        rows=len(rows),
        storage_key=key,
        groups=len({row.group for row in rows if row.group}),
        categories=dict(sorted(Counter(row.category for row in rows if row.category).items())),
    )


def register_set(session: Session, name: str, stored: StoredSet, *, imported_by: str | None = None) -> ProviderSet:
    """The set's row: the existing one when name, role and digest are known, else the next version."""
    existing = repository.find_set(session, name, stored.role, stored.sha256)
    if existing is not None:
        if existing.categories is None:
            existing.groups, existing.categories = stored.groups, dict(stored.categories)
        return existing
    provider_set = ProviderSet(
        id=new_id("pset_"),
        name=name,
        role=stored.role.value,
        version=repository.last_set_version(session, name, stored.role) + 1,
        sha256=stored.sha256,
        rows=stored.rows,
        groups=stored.groups,
        categories=dict(stored.categories),
        storage_key=stored.storage_key,
        imported_by=imported_by,
    )
    session.add(provider_set)
    try:
        session.flush()
    except IntegrityError as error:
        raise Conflict(
            f"Another version of {name!r} was imported at the same moment; try again.", code="set_version_taken"
        ) from error
    return provider_set


def list_page(session: Session, *, role: SetRole | None, after: str | None, limit: int) -> Page[ProviderSet]:
    """Newest first."""
    cursor = None
    if after is not None:
        last = repository.get_set(session, after)
        if last is None:
            raise InvalidRequest("'after' names no provider set.", code="invalid_cursor", param="after")
        cursor = (last.created_at, last.id)
    return fetch_page(session, repository.all_sets(role), KEYSET, cursor=cursor, limit=limit)


def get_set(session: Session, set_id: str) -> ProviderSet:
    provider_set = repository.get_set(session, set_id)
    if provider_set is None:
        raise NotFound("There is no such provider set.", param="set_id")
    return provider_set


def find_set(session: Session, name: str, role: SetRole, version: int | None = None) -> ProviderSet:
    """By name and role: the newest version, or the one that is named."""
    provider_set = repository.find_set_version(session, name, role, version)
    if provider_set is None:
        which = name if version is None else f"{name}@{version}"
        raise NotFound(f"There is no provider set {which!r} of role {role.value!r}.", param="name")
    return provider_set


def fetch(storage: Storage, provider_set: ProviderSet, path: Path) -> None:
    """The set's rows as a local file; other bytes than were imported are never left behind."""
    if storage.get_to_path(provider_set.storage_key, path).sha256 != provider_set.sha256:
        path.unlink()
        raise Unavailable(
            f"The object of provider set {provider_set.id} was altered after its import.", code="provider_set_altered"
        )
