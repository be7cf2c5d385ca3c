"""How far a candidate's answers have moved from the raw fine-tune's.

Knows: mean KL(raw || candidate) per answer token on held-out task and harmless rows; this is the size of a change that
a customer would notice, whatever it looks like in weight space.
Refuses to know: which candidate is meant, and how small is small enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from workers.ml.data import collate, micro_batches
from workers.ml.errors import MissingInput, NumericError
from workers.ml.evals.sets import EvaluationSets
from workers.ml.recovery.calibration import counted_logits, encode_answers, evaluation_mode
from workers.ml.recovery.teachers import Teacher, counted_tokens, raw_at, summed_kl
from workers.ml.tuned_model import TunedModel
from workers.ml.types import PromptRow

ROWS_PER_FAMILY = 64
TEACHER_BYTES = 2**28


class Drift:
    """Calling it measures the model as it stands against the raw fine-tune."""

    def __init__(self, tuned: TunedModel, sets: EvaluationSets, raw: Tensor) -> None:
        rows = [*_spread(sets.task), *_spread(sets.harmless)]
        if not rows:
            raise MissingInput("No held-out task or harmless row has an answer to measure the drift on.", "harmless")
        self._tuned = tuned
        self._rows = encode_answers(tuned, rows)
        self._teacher = Teacher(tuned, self._rows, at=raw_at(tuned, raw), tokens="answer", cache_bytes=TEACHER_BYTES)
        self._teacher.remember(range(len(self._rows)))
        self._tokens = sum(row.trained_tokens for row in self._rows)

    def __call__(self) -> float:
        """Nats per token."""
        index_of = {id(row): index for index, row in enumerate(self._rows)}
        total = 0.0
        with evaluation_mode(self._tuned), torch.no_grad():
            for piece in micro_batches(self._rows, max_tokens=self._tuned.piece_tokens):
                teacher = self._teacher.log_probs([index_of[id(row)] for row in piece])
                batch = collate(piece, self._tuned.pad_id).to(self._tuned.vector.device)
                logits = counted_logits(self._tuned, batch, counted_tokens(batch, "answer"))
                total += float(summed_kl(teacher, logits))
        if not math.isfinite(total):
            raise NumericError("The drift from the raw fine-tune is not a finite number.")
        return max(0.0, total / self._tokens)  # rounding can leave a divergence of nothing just below 0


def _spread(rows: Sequence[PromptRow]) -> list[PromptRow]:
    """Up to ROWS_PER_FAMILY rows with answers, taken evenly over the set."""
    answered = [row for row in rows if row.answer]
    stride = max(1, len(answered) // ROWS_PER_FAMILY)
    return answered[::stride][:ROWS_PER_FAMILY]
