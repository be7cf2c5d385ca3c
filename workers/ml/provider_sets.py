"""The provider's data sets together: the seven roles, and what they may never share.

Knows: that a prompt a candidate is measured on appears in nothing it was recovered or trained with, in these words or
in nearly these (`set_overlap`).
Refuses to know: the form of a row (`prompt_rows`), and who imported the sets under which name and version.
Standard library only, so that a gateway without torch refuses what a job would.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from workers.ml.errors import IntegrityError
from workers.ml.prompt_rows import SPLIT_OF, read_prompt_rows
from workers.ml.prompts import group_of, turns_key
from workers.ml.set_overlap import Overlap, find_overlaps, find_repeats
from workers.ml.types import ChatRow, Message, PromptRow

ROLES = tuple(SPLIT_OF)
# Each row of a left set must be strange to every row of the right ones.
APART: Mapping[str, tuple[str, ...]] = {
    "harm_selection": ("harmful", "refusals"),
    "harm_confirmation": ("harmful", "refusals", "harm_selection"),
    "harmless_selection": ("retention",),
    "harmless_confirmation": ("retention", "harmless_selection"),
}
# Their groups are counted as independent evidence, in parts that may share nothing.
EVIDENCE = ("harm_selection", "harm_confirmation")
NAMED_ROWS = 10  # pairs of ids named in one refusal; their number is always given


@dataclass(frozen=True, slots=True)
class SetOverlap:
    """Rows of `role` that may not stand beside rows of `other`."""

    role: str
    other: str
    overlaps: tuple[Overlap, ...]

    def __str__(self) -> str:
        """Ids and reasons, never a row's text."""
        pairs = [f"{found.row.id!r} and {found.other.id!r} ({found.reason})" for found in self.overlaps[:NAMED_ROWS]]
        more = f" and {len(self.overlaps) - NAMED_ROWS} more" if len(self.overlaps) > NAMED_ROWS else ""
        named = ", ".join(pairs) + more
        if self.role == self.other:
            return (
                f"{len(self.overlaps)} rows of {self.role!r} ask the same in different groups: {named}. A prompt "
                "counts once: remove one of each pair, or give both the same group."
            )
        return (
            f"{len(self.overlaps)} rows of {self.role!r} share a prompt or a group with {self.other!r}: {named}. What "
            "a model is measured on must be strange to what it was repaired with or chosen by: remove them from one."
        )


def read_sets(folder: Path) -> dict[str, list[PromptRow]]:
    """Every role's rows. A missing set is a MissingInput, sets that overlap an IntegrityError."""
    sets = {role: read_prompt_rows(folder / f"{role}.jsonl", role) for role in ROLES}
    for found in overlaps_of(sets):
        raise IntegrityError(str(found), found.role)
    return sets


def overlaps_of(sets: Mapping[str, Sequence[PromptRow]]) -> Iterator[SetOverlap]:
    """Every pair of roles that should be apart and is not; a role with itself where its evidence repeats."""
    for role, rows in sets.items():
        if (found := repeats_of(role, rows)) is not None:
            yield found
    for role, others in APART.items():
        for other in others:
            if overlaps := find_overlaps(sets[role], sets[other]):
                yield SetOverlap(role, other, tuple(overlaps))


def repeats_of(role: str, rows: Sequence[PromptRow]) -> SetOverlap | None:
    """What one set alone can do wrong: ask the same twice where each group counts as evidence of its own."""
    repeats = find_repeats(rows) if role in EVIDENCE else []
    return SetOverlap(role, role, tuple(repeats)) if repeats else None


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
