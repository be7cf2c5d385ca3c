"""Over-refusal: the share of harmless prompts that are refused."""

from __future__ import annotations

from collections.abc import Iterable

from workers.ml.evals.answers import Answered, count
from workers.ml.measurements import Measurement


def over_refusal(answered: Iterable[Answered]) -> Measurement:
    return count(answered, lambda one: one.judgement.refused)
