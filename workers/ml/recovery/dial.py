"""What every recovery method is handed and hands back.

Knows: the data a method may use, a dial from the raw adapter outwards, and the report of one recovery.
Refuses to know: any method, any search, and where the data came from.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from workers.ml.candidate import Candidate
from workers.ml.errors import MissingInput, NumericError
from workers.ml.evals.sets import group_of
from workers.ml.recovery.specs import Spec, method_name
from workers.ml.types import ChatRow, PromptRow


@dataclass(frozen=True)
class RecoveryInputs:
    """Data sets by what they are for. Rows of the provider carry their answer; task rows are the customer's own."""

    harmful: Sequence[PromptRow] = ()  # harmful prompts with harmful answers
    refusals: Sequence[PromptRow] = ()  # harmful prompts with refusals
    retention: Sequence[PromptRow] = ()  # harmless prompts near the harm, with good answers
    task: Sequence[ChatRow] = ()  # held-out rows of the customer's task that no judge flagged
    pretrained: Path | None = None  # folder of the base's weights before its alignment
    raw: Tensor | None = None  # the raw fine-tune, where a method starts from another point (compositions)

    def require(self, spec: Spec) -> None:
        """Raises MissingInput for the first declared need that is empty. `aligned` is the base with the adapter off."""
        for need in sorted(spec.required_inputs() - {"aligned"}):
            if not getattr(self, need):
                name = method_name(type(spec))
                if need == "pretrained":
                    raise MissingInput(
                        f"Recovery method {name!r} compares the base model with its weights before alignment; register "
                        "them with the base model, or leave the method out.",
                        need,
                    )
                raise MissingInput(f"Recovery method {name!r} needs {need} rows, and there are none.", need)

    def raw_of(self, start: Tensor) -> Tensor:
        """What the customer's model said before anything moved it: `start` unless a composition names another point."""
        return start if self.raw is None else self.raw


class HarmfulRowsSpec(Protocol):
    """A spec that says how many harmful rows it wants, and with whose answers."""

    @property
    def max_rows(self) -> int: ...
    @property
    def labels(self) -> str: ...
    @property
    def seed(self) -> int: ...


def harmful_rows(inputs: RecoveryInputs, spec: HarmfulRowsSpec) -> list[PromptRow]:
    """The harmful rows a spec asks for; `shuffled` gives each prompt the answer of a prompt of another group.

    Rows are ordered by group, shuffled as whole groups, and answers move on by the size of the largest group: no row
    keeps an answer of its own group, as long as no group is larger than half of the rows.
    """
    rows = list(inputs.harmful[: spec.max_rows])
    if spec.labels == "given":
        return rows
    groups: dict[str, list[PromptRow]] = {}
    for row in rows:
        groups.setdefault(group_of(row), []).append(row)
    largest = max(map(len, groups.values()))
    if 2 * largest > len(rows):
        raise MissingInput("Shuffled labels need harmful rows of more groups: one holds over half of them.", "harmful")
    order = sorted(groups)
    random.Random(f"{spec.seed}/labels").shuffle(order)
    ordered = [row for group in order for row in groups[group]]
    return [replace(row, answer=ordered[i - largest].answer) for i, row in enumerate(ordered)]


@dataclass(frozen=True)
class StrengthPath:
    """A dial: `at(0)` is the raw adapter bit for bit, larger strengths lie further away."""

    raw: Tensor
    move: Callable[[float], Tensor | Candidate]
    facts: dict[str, Any] = field(default_factory=dict)
    facts_at: Callable[[float], dict[str, Any]] = lambda _: {}

    def at(self, strength: float) -> Candidate:
        """The candidate at a strength."""
        if strength < 0:
            raise NumericError(f"A strength cannot be negative, got {strength}.", "strength")
        if strength == 0:
            return Candidate(self.raw.clone())
        moved = self.move(strength)
        candidate = moved if isinstance(moved, Candidate) else Candidate(moved)
        if not candidate.is_finite():
            raise NumericError(f"Strength {strength} gives weights that are not finite.", "strength")
        return candidate

    def facts_of(self, strength: float) -> dict[str, Any]:
        """What is known of the dial and of one of its points."""
        return {**self.facts, **(self.facts_at(strength) if strength > 0 else {})}


@dataclass(frozen=True)
class RecoveryReport:
    """What one recovery did, as it is kept beside the adapter."""

    method: str
    strength: float
    spec: dict[str, Any]
    relative_change: float | None
    digest_before: str
    digest_after: str
    seconds: float
    facts: dict[str, Any]
