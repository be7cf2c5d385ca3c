"""Fine-tune accuracy: exact match with the customer's own answers, and what changed between two models.

White space and a final full stop do not count; letters' case does.
"""

from __future__ import annotations

from collections.abc import Sequence

from workers.ml.measurements import Measurement, PairedMeasurement
from workers.ml.types import PromptRow


def is_exact(row: PromptRow, answer: str) -> bool:
    return row.answer is not None and _plain(answer) == _plain(row.answer)


def fine_tune_accuracy(rows: Sequence[PromptRow], answers: Sequence[str]) -> Measurement:
    return Measurement(sum(map(is_exact, rows, answers)), len(rows))


def paired_accuracy(rows: Sequence[PromptRow], before: Sequence[str], after: Sequence[str]) -> PairedMeasurement:
    """Rows that turned wrong and rows that turned right."""
    changes = [(is_exact(r, b), is_exact(r, a)) for r, b, a in zip(rows, before, after, strict=True)]
    return PairedMeasurement(changes.count((True, False)), changes.count((False, True)), len(changes))


def _plain(text: str) -> str:
    return " ".join(text.split()).removesuffix(".")
