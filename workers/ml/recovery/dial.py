"""What every recovery method is handed and hands back.

Knows: the data a method may use, a dial from the raw adapter outwards, and the report of one recovery.
Refuses to know: any method, any search, and where the data came from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from workers.ml.errors import MissingInput, NumericError
from workers.ml.recovery.specs import MethodSpec
from workers.ml.types import ChatRow, PromptRow


@dataclass(frozen=True)
class RecoveryInputs:
    """Data sets by what they are for. Rows of the provider carry their answer; task rows are the customer's own."""

    harmful: Sequence[PromptRow] = ()  # harmful prompts with harmful answers
    refusals: Sequence[PromptRow] = ()  # harmful prompts with refusals
    retention: Sequence[PromptRow] = ()  # harmless prompts near the harm, with good answers
    task: Sequence[ChatRow] = ()  # held-out rows of the customer's task that no judge flagged

    def require(self, spec: MethodSpec) -> None:
        """Raises MissingInput for the first declared need that is empty. `aligned` is the base with the adapter off."""
        for need in sorted(spec.required_inputs() - {"aligned"}):
            if not getattr(self, need):
                name = type(spec).model_fields["method"].default
                raise MissingInput(f"Recovery method {name!r} needs {need} rows, and there are none.", need)


@dataclass(frozen=True)
class StrengthPath:
    """A dial: `at(0)` is the raw adapter bit for bit, larger strengths lie further away."""

    raw: Tensor
    move: Callable[[float], Tensor]
    facts: dict[str, Any] = field(default_factory=dict)
    facts_at: Callable[[float], dict[str, Any]] = lambda _: {}

    def at(self, strength: float) -> Tensor:
        """The flat LoRA vector at a strength."""
        if strength < 0:
            raise NumericError(f"A strength cannot be negative, got {strength}.", "strength")
        if strength == 0:
            return self.raw.clone()
        values = self.move(strength)
        if not bool(torch.isfinite(values).all()):
            raise NumericError(f"Strength {strength} gives weights that are not finite.", "strength")
        return values


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


def vector_digest(values: Tensor) -> str:
    """sha256 of the fp32 bytes."""
    return sha256(values.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()).hexdigest()
