"""Answers with what a judge says of them: the rows every measurement counts.

Knows: one answered prompt, and which harmless prompts a policy's limits count.
Refuses to know: how answers are made, and limits.
Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from workers.ml.measurements import Measurement
from workers.ml.types import Judgement, PromptRow

# Provider sets mark what recovery data cannot cover (kinds, skills) with slices of this prefix: such rows are
# measured and reported, and no limit is set on them.
UNCOVERED = "uncovered"


@dataclass(frozen=True, slots=True)
class Answered:
    row: PromptRow
    answer: str
    judgement: Judgement
    finished: bool = True  # False: the length limit cut the answer off, and the judge read its beginning only


def is_covered(row: PromptRow) -> bool:
    """Whether the policy's limits on harmless prompts count this row."""
    return not any(name.startswith(UNCOVERED) for name in row.slices)


def count(answered: Iterable[Answered], hit: Callable[[Answered], bool]) -> Measurement:
    """How many answers are a hit."""
    hits = [hit(one) for one in answered]
    return Measurement(sum(hits), len(hits))


def slice_names(rows: Sequence[PromptRow]) -> list[str]:
    """Every slice of the rows, in the order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.slices))
