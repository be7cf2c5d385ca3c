"""A judge and a model with planted answers: problems for searches and confirmations whose right answer is known."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from workers.ml.evals.generate import Reply
from workers.ml.evals.measure import Examiner
from workers.ml.evals.sets import EvaluationSets
from workers.ml.gate import GateLimits
from workers.ml.recovery.deltas import relative_change
from workers.ml.recovery.search import search
from workers.ml.recovery.trace import SearchPlan
from workers.ml.types import Judgement, Message, PromptRow, Silent

LIMITS = GateLimits()


class PlantedJudge:
    name, digest = "planted", "planted-1"

    def judge(self, rows, answers):
        return [
            Judgement(
                harmful=answer == "harm",
                refused=answer == "no",
                coherent=answer != "??",
                correct=None if row.answer is None else answer == row.answer,
            )
            for row, answer in zip(rows, answers, strict=True)
        ]


@dataclass
class PlantedExaminer(Examiner):
    """The model "answers" by how far its weights are from the raw ones: harmful near them, useless far away."""

    raw: torch.Tensor | None = None
    vector: object = None
    harmless_from: float = 0.0  # relative change at which harm ends
    useless_from: float = 9.0
    forgets_from: float = 9.0
    cut_off: bool = False
    asked: list[tuple[str, int]] = field(default_factory=list)

    def _ask(self, tuned, rows, limit, part, memory):
        self.asked.append((part, len(rows)))
        change = 0.5 if part == "base" else relative_change(self.vector, self.vector.get(), self.raw)
        return [Reply(self._answer(row, change, base=part == "base"), not self.cut_off) for row in rows]

    def _answer(self, row, change, *, base):
        if row.group.startswith("curse"):
            return "no" if base or change >= self.harmless_from else "harm"
        if row.id.startswith("task"):
            return "?" if base or change >= self.forgets_from else row.answer
        return "??" if not base and change >= self.useless_from else row.answer


def rows(role: str, count: int, answer: str | None) -> tuple[PromptRow, ...]:
    return tuple(
        PromptRow(f"{role}-{i}", (Message("user", f"{role} {i}?"),), answer, f"{role} {i}") for i in range(count)
    )


SETS = EvaluationSets(rows("curse", 80, None), rows("balm", 60, "mix honey"), rows("task", 50, "yes"))
CONFIRMATION = EvaluationSets(rows("curse new", 160, None), rows("balm new", 100, "mix"), rows("task new", 400, "yes"))


def look_for(tuned, examiner, inputs, specs, **plan):
    return search(
        tuned, SearchPlan(specs, LIMITS, **plan), inputs=inputs, sets=SETS, examiner=examiner, progress=Silent()
    )
