"""The provider's data sets as they lie beside a job: reading them, and what they may never share.

Knows: the JSONL form of `PromptRow`, the seven roles, and that a prompt a candidate is measured on appears in
nothing it was recovered or trained with.
Refuses to know: who imported the sets and under which name and version.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workers.ml.data import turns_key
from workers.ml.errors import IntegrityError, MissingInput
from workers.ml.evals.sets import group_of
from workers.ml.types import ChatRow, Message, PromptRow

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


# Their groups are counted as independent evidence, in parts that may share nothing.
EVIDENCE = ("harm_selection", "harm_confirmation")


def read_sets(folder: Path) -> dict[str, list[PromptRow]]:
    """Every role's rows. A missing set is a MissingInput, sets that overlap an IntegrityError."""
    sets = {role: read_prompt_rows(folder / f"{role}.jsonl", role) for role in ROLES}
    for role in EVIDENCE:
        _refuse_repeats(role, sets[role])
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


def without_questions_of(
    sets: Mapping[str, Sequence[PromptRow]], rows: Sequence[ChatRow]
) -> tuple[dict[str, list[PromptRow]], dict[str, int]]:
    """The sets without what a customer's rows ask, and how many rows each measuring set lost.

    A fine-tune that was taught the answer to a question of the gate shows nothing by giving it. A whole group goes
    with its prompt: its other phrasings ask for the same.
    """
    asked = {turns_key([turn]) for row in rows for turn in row.messages if turn.role == "user"}
    left, lost = {role: list(prompts) for role, prompts in sets.items()}, {}
    for role in APART:
        known = {group_of(row) for row in sets[role] if turns_key(_question(row)) in asked}
        left[role] = [row for row in sets[role] if group_of(row) not in known]
        lost[role] = len(sets[role]) - len(left[role])
    return left, lost


def _question(row: PromptRow) -> tuple[Message, ...]:
    """The last thing that is asked, whatever system prompt or conversation stands before it."""
    return tuple(message for message in row.messages if message.role == "user")[-1:]


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


def _refuse_repeats(role: str, rows: Sequence[PromptRow]) -> None:
    """One prompt in two groups would count twice, and could stand on both sides of a cut between groups."""
    known: dict[str, PromptRow] = {}
    for row in rows:
        other = known.setdefault(_key(row), row)
        if group_of(other) != group_of(row):
            raise IntegrityError(
                f"Rows {other.id!r} and {row.id!r} of {role!r} ask the same in different groups: a prompt counts once. "
                "Remove one, or give both the same group.",
                role,
            )


def _key(row: PromptRow) -> str:
    return turns_key(row.messages)


def _refuse_overlap(role: str, rows: Sequence[PromptRow], other: str, others: Sequence[PromptRow]) -> None:
    groups, prompts = {group_of(row) for row in others}, {_key(row) for row in others}
    shared = [row.id for row in rows if _key(row) in prompts or group_of(row) in groups]
    if shared:
        raise IntegrityError(
            f"{len(shared)} rows of {role!r} (such as {shared[0]!r}) share a prompt or a group with {other!r}: "
            "what a model is measured on must be strange to what it was repaired with.",
            role,
        )
