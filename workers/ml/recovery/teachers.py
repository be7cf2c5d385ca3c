"""Frozen teachers: what a model said of some rows before anything moved.

Knows: log-probabilities of the raw fine-tune or of the aligned base (the adapter off) at chosen tokens, kept in memory
up to a budget and recomputed beyond it; the KL divergence from a teacher.
Refuses to know: who learns from the teacher or is measured against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from workers.ml.candidate import applied
from workers.ml.chat import EncodedRow
from workers.ml.data import Batch, collate, micro_batches
from workers.ml.recovery.calibration import counted_logits, evaluation_mode
from workers.ml.tuned_model import TunedModel

Tokens = Literal["all", "answer"]


class Teacher:
    """Log-probabilities of a fixed model at the counted tokens of a fixed list of rows."""

    def __init__(
        self,
        tuned: TunedModel,
        rows: Sequence[EncodedRow],
        *,
        at: Callable[[], AbstractContextManager[None]],
        tokens: Tokens,
        cache_bytes: int,
    ) -> None:
        """`at` is a context in which the model is the teacher: `aligned(tuned)` or `raw_at(tuned, vector)`."""
        self._tuned, self._rows, self._at, self.tokens = tuned, rows, at, tokens
        self._free = cache_bytes
        self._kept: dict[int, Tensor] = {}

    def remember(self, indices: Iterable[int]) -> None:
        """Compute rows ahead of their use, as many as fit."""
        wanted = sorted(set(indices) - set(self._kept))
        by_row = {id(self._rows[index]): index for index in wanted}
        for piece in micro_batches([self._rows[i] for i in wanted], max_tokens=self._tuned.piece_tokens):
            if self._free <= 0:
                return
            for index, values in self._compute([by_row[id(row)] for row in piece]).items():
                self._kept[index] = values
                self._free -= values.numel() * values.element_size()

    def log_probs(self, indices: Sequence[int]) -> Tensor:
        """(counted tokens of the rows in this order, vocabulary)"""
        missing = [index for index in dict.fromkeys(indices) if index not in self._kept]
        fresh = self._compute(missing) if missing else {}
        return torch.cat([self._kept[i] if i in self._kept else fresh[i] for i in indices])

    def _compute(self, indices: Sequence[int]) -> dict[int, Tensor]:
        rows = [self._rows[index] for index in indices]
        batch = collate(rows, self._tuned.pad_id).to(self._tuned.vector.device)
        counted = counted_tokens(batch, self.tokens)
        with self._at(), evaluation_mode(self._tuned), torch.no_grad():
            values = F.log_softmax(counted_logits(self._tuned, batch, counted).float(), dim=-1)
        return dict(zip(indices, values.split(counted.sum(dim=1).tolist()), strict=True))


def counted_tokens(batch: Batch, tokens: Tokens) -> Tensor:
    """(rows, tokens - 1): True where the prediction of the next token counts."""
    marks = batch.attention_mask if tokens == "all" else batch.loss_weights > 0
    return marks[:, 1:].bool()


def raw_at(tuned: TunedModel, raw: Tensor) -> Callable[[], AbstractContextManager[None]]:
    """The fine-tune at a fixed point, wherever the vector is now."""
    return lambda: applied(tuned, raw)


def summed_kl(teacher: Tensor, student_logits: Tensor) -> Tensor:
    """Sum over tokens of KL(teacher || student); both (tokens, vocabulary)."""
    return F.kl_div(F.log_softmax(student_logits.float(), dim=-1), teacher, log_target=True, reduction="sum")
