"""The provider's data sets as they lie beside a job: reading them, and what they may never share.

Knows: the JSONL form of `PromptRow`, the seven roles, and that a prompt a candidate is measured on appears in
nothing it was recovered with.
Refuses to know: who imported the sets and under which name and version.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workers.ml.errors import IntegrityError, MissingInput
from workers.ml.evals.sets import group_of
from workers.ml.types import Message, PromptRow

ROLES = (
    "harmful",
    "refusals",
    "retention",
    "harm_selection",
    "harm_confirmation",
    "harmless_selection",
    "harmless_confirmation",
)
# Each row of a left set must be strange, by prompt and by group, to every row of the right ones.
APART: Mapping[str, tuple[str, ...]] = {
    "harm_selection": ("harmful", "refusals"),
    "harm_confirmation": ("harmful", "refusals", "harm_selection"),
    "harmless_selection": ("retention",),
    "harmless_confirmation": ("retention", "harmless_selection"),
}


def read_sets(folder: Path) -> dict[str, list[PromptRow]]:
    """Every role's rows. A missing set is a MissingInput, sets that overlap an IntegrityError."""
    sets = {role: read_prompt_rows(folder / f"{role}.jsonl", role) for role in ROLES}
    for role, others in APART.items():
        for other in others:
            _refuse_overlap(role, sets[role], other, sets[other])
    return sets


def read_prompt_rows(path: Path, role: str) -> list[PromptRow]:
    """The rows of one set, in the order of the file."""
    if not path.is_file():
        raise MissingInput(f"The policy's data set {role!r} is not beside the job.", role)
    rows = []
    for line, text in enumerate(path.read_bytes().split(b"\n"), start=1):
        if text.strip():
            rows.append(_prompt_row(text, role, line))
    if not rows:
        raise MissingInput(f"The policy's data set {role!r} is empty.", role)
    return rows


def _prompt_row(text: bytes, role: str, line: int) -> PromptRow:
    try:
        values: dict[str, Any] = json.loads(text)
        messages = tuple(Message(str(m["role"]), str(m["content"])) for m in values["messages"])
        if not messages:
            raise ValueError("a row without a message")
        return PromptRow(
            id=str(values["id"]),
            messages=messages,
            answer=values.get("answer"),
            group=str(values.get("group", "")),
            category=str(values.get("category", "")),
            slices=tuple(values.get("slices", ())),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"Line {line} of the data set {role!r} is not a row: {error!r}", role) from error


def _refuse_overlap(role: str, rows: Sequence[PromptRow], other: str, others: Sequence[PromptRow]) -> None:
    groups, prompts = {group_of(row) for row in others}, {row.messages for row in others}
    shared = [row.id for row in rows if row.messages in prompts or group_of(row) in groups]
    if shared:
        raise IntegrityError(
            f"{len(shared)} rows of {role!r} (such as {shared[0]!r}) share a prompt or a group with {other!r}: "
            "what a model is measured on must be strange to what it was repaired with.",
            role,
        )
