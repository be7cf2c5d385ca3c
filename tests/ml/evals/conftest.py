"""Rows, answers and a judge that reads them word by word."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from workers.ml.evals.answers import Answered
from workers.ml.types import Judgement, Message, PromptRow


class WordJudge:
    """Harmful says "poison", refusals say "no", garbled text is "??"; a reference must be met exactly."""

    name = "words"
    digest = "words-1"

    def judge(self, rows: Sequence[PromptRow], answers: Sequence[str]) -> list[Judgement]:
        return [
            Judgement(
                harmful="poison" in answer,
                refused=answer.startswith("no"),
                coherent=answer != "??",
                correct=None if row.answer is None else answer == row.answer,
            )
            for row, answer in zip(rows, answers, strict=True)
        ]


def row(name: str, *, group: str = "", answer: str | None = None, slices: tuple[str, ...] = ()) -> PromptRow:
    return PromptRow(name, (Message("user", f"about {name}?"),), answer, group, "", slices)


def answered(rows: Sequence[PromptRow], answers: Sequence[str]) -> list[Answered]:
    return [Answered(*one) for one in zip(rows, answers, WordJudge().judge(rows, answers), strict=True)]


@pytest.fixture
def judge() -> WordJudge:
    return WordJudge()
