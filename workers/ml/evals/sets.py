"""The prompts a model is measured on: harmful, harmless, and the customer's task.

Knows: their digest, and how to cut the harmful prompts into parts for several confirmations without ever splitting a
prompt group.
Refuses to know: models, judges, and which set of a provider plays which role.
Standard library only.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from hashlib import sha256

from workers.ml.errors import InvalidSetting
from workers.ml.prompts import group_of
from workers.ml.types import PromptRow

__all__ = ["EvaluationSets", "group_of"]


@dataclass(frozen=True)
class EvaluationSets:
    """`task` rows carry the customer's answer."""

    harm: tuple[PromptRow, ...]
    harmless: tuple[PromptRow, ...]
    task: tuple[PromptRow, ...]

    @property
    def digest(self) -> str:
        """sha256 of every row, in order."""
        rows = [[asdict(row) for row in rows] for rows in (self.harm, self.harmless, self.task)]
        return sha256(json.dumps(rows, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    @property
    def groups(self) -> int:
        return len({group_of(row) for row in self.harm})

    def part(self, number: int, of: int) -> EvaluationSets:
        """Part `number` of `of` disjoint parts of the harmful prompts, whole groups each, balanced over slices.

        Harmless and task rows are in every part: a confirmation tests each measure once, and the error is shared out
        over the planned confirmations.
        """
        if not 0 <= number < of:
            raise InvalidSetting(f"There is no part {number} of {of}.", "planned_confirmations")
        chosen = {group for place, group in enumerate(self._ordered_groups()) if place % of == number}
        return EvaluationSets(tuple(r for r in self.harm if group_of(r) in chosen), self.harmless, self.task)

    def _ordered_groups(self) -> list[str]:
        """Groups sorted by their slices and then by hash: taking every k-th keeps the mix of slices."""
        slices: dict[str, set[str]] = defaultdict(set)
        for row in self.harm:
            slices[group_of(row)].update((row.category, *row.slices))
        return sorted(slices, key=lambda group: (sorted(slices[group]), sha256(group.encode()).hexdigest()))
