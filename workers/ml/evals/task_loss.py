"""How much less likely a change made the customer's own answers.

Knows: each row's mean loss per answer token, and the paired rise from one model to another.
Refuses to know: how large a rise is too large, and whether exact match would have been telling enough (the gate).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from workers.ml.chat import EncodedRow
from workers.ml.data import collate, micro_batches
from workers.ml.measurements import LossRise
from workers.ml.predictions import logits_at, places
from workers.ml.tuned_model import TunedModel
from workers.ml.types import ChatRow, Message, Progress, PromptRow


def answer_losses(tuned: TunedModel, rows: Sequence[PromptRow], progress: Progress | None = None) -> list[float]:
    """Mean negative log-likelihood per token of each row's answer, in nats, as the model stands."""
    encoded = [tuned.encode(_taught(row)) for row in rows]
    place = {id(row): index for index, row in enumerate(encoded)}
    losses = [math.nan] * len(rows)
    was_training = tuned.model.training
    tuned.model.eval()
    try:
        pieces = micro_batches(encoded, max_tokens=tuned.piece_tokens)
        for number, piece in enumerate(pieces, start=1):
            for row, loss in zip(piece, _losses(tuned, piece), strict=True):
                losses[place[id(row)]] = loss
            if progress is not None:
                progress.step(number, len(pieces), part="answer loss")
    finally:
        tuned.model.train(was_training)
    return losses


def loss_rise(before: Sequence[float], after: Sequence[float]) -> LossRise:
    """The mean paired difference and its standard error (0 rows or 1 give no error: not a number)."""
    rises = [b - a for a, b in zip(before, after, strict=True)]
    n = len(rises)
    if n < 2:
        return LossRise(math.nan, math.nan, n)
    mean = math.fsum(rises) / n
    variance = math.fsum((rise - mean) ** 2 for rise in rises) / (n - 1)
    return LossRise(mean, math.sqrt(variance / n), n)


def _taught(row: PromptRow) -> ChatRow:
    context = (Message(turn.role, turn.content, 0.0) for turn in row.messages)
    return ChatRow((*context, Message("assistant", row.answer or "")))


@torch.inference_mode()
def _losses(tuned: TunedModel, piece: Sequence[EncodedRow]) -> list[float]:
    batch = collate(piece, tuned.pad_id).to(tuned.vector.device)
    counted = batch.loss_weights[:, 1:] > 0  # (rows, tokens - 1)
    logits = logits_at(tuned.model, batch.input_ids, places(counted), attention_mask=batch.attention_mask)
    losses = F.cross_entropy(logits.float(), batch.input_ids[:, 1:][counted], reduction="none")
    counts = counted.sum(dim=1).tolist()
    return [float(part.mean()) for part in losses.split(counts)]
