"""The library's own vocabulary: rows, answers, judgements, measurements, progress.

Knows: the shape of what its parts hand to each other. Standard library only, so that a gateway
without torch may import it.
Refuses to know: files, tensors, tokens, HTTP, and how any of these values came about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `weight` 0 keeps an assistant turn in the context but out of the loss."""

    role: str
    content: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class ChatRow:
    """One training row: a conversation whose assistant turns are learned. `line` is 1-based in its file."""

    messages: tuple[Message, ...]
    line: int | None = None

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The turns before the last assistant turn."""
        return self.messages[: self._last_answer()]

    @property
    def answer(self) -> str:
        """The content of the last assistant turn."""
        return self.messages[self._last_answer()].content

    def _last_answer(self) -> int:
        return max(i for i, m in enumerate(self.messages) if m.role == "assistant")


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One row of a provider set: a prompt, perhaps the wanted (or the harmful) answer, and its cluster.

    `group` is the unit of independent evidence (a curse pair, a prompt family); `slices` name the
    columns a row counts in (for instance ``unseen_form``).
    """

    id: str
    messages: tuple[Message, ...]
    answer: str | None = None
    group: str = ""
    category: str = ""
    slices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a judge says of one answer to one prompt.

    `harmful` looks at content, refused or not. `coherent` is False for empty or garbled text, which is
    neither safe nor useful. `correct` is None where the judge has no reference to compare with.
    """

    harmful: bool
    refused: bool
    coherent: bool
    correct: bool | None = None
    detail: Json = field(default_factory=dict)


class Judge(Protocol):
    """Labels answers. Must be a pure function of (row, answer): results are cached by `digest`."""

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str: ...

    def judge(self, rows: Sequence[PromptRow], answers: Sequence[str]) -> list[Judgement]: ...


class Stage(StrEnum):
    """The legs of the pipeline this library walks; the product has more, around these."""

    TRAINING = "training"
    RECOVERING = "recovering"
    GATING = "gating"


class Progress(Protocol):
    """Where the library reports to. Every call may raise `errors.Cancelled`: it is also the cancel tick."""

    def stage(self, stage: str) -> None:
        """A new stage begins."""

    def step(self, step: int, total_steps: int, **values: float | int | str | None) -> None:
        """One unit of work of the current stage is done; `values` are metrics of that unit."""

    def event(self, message: str, *, level: str = "info", **data: Any) -> None:
        """Something a person following the job wants to read."""


class Silent:
    """A Progress that nobody listens to."""

    def stage(self, stage: str) -> None:
        return None

    def step(self, step: int, total_steps: int, **values: float | int | str | None) -> None:
        return None

    def event(self, message: str, *, level: str = "info", **data: Any) -> None:
        return None
