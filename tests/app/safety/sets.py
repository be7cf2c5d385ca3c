"""Provider sets small enough to read: one per role, strange to each other, of harmless content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from app.safety import provider_sets
from app.safety.provider_sets import NewSet
from app.safety.schemas import SetRole
from app.storage import Storage
from app.tables.safety import ProviderSet


def row(role: SetRole, number: int, **changes: Any) -> dict[str, Any]:
    question = f"What is placeholder {number} of the {role.value} set?"
    plain = {"id": f"{role.value}-{number}", "messages": [{"role": "user", "content": question}], "answer": "A word."}
    return {**plain, **changes}


def rows(role: SetRole, count: int = 3) -> list[dict[str, Any]]:
    return [row(role, number) for number in range(count)]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(one) + "\n" for one in rows).encode()


def import_rows(
    engine: Engine, storage: Storage, folder: Path, role: SetRole, rows: list[dict[str, Any]], name: str = "mine"
) -> ProviderSet:
    path = folder / "rows.jsonl"
    path.write_bytes(jsonl(rows))
    return provider_sets.import_set(engine, storage, path, NewSet(name, role, imported_by="olga"))


def import_all(engine: Engine, storage: Storage, folder: Path, name: str = "mine") -> dict[SetRole, ProviderSet]:
    return {role: import_rows(engine, storage, folder, role, rows(role), name) for role in SetRole}
