"""Provider and task rows as tokens, and the model's losses on them.

Knows: encoding rows with the serving template, evaluation mode, token-weighted losses and gradients in micro-batches.
Refuses to know: which method asks, and what the rows teach.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from workers.ml.chat import EncodedRow
from workers.ml.data import Batch, collate, micro_batches
from workers.ml.errors import MissingInput, NumericError
from workers.ml.predictions import logits_at, places
from workers.ml.tuned_model import TunedModel
from workers.ml.types import ChatRow, Message, Progress, PromptRow


def encode_answers(tuned: TunedModel, rows: Sequence[PromptRow]) -> list[EncodedRow]:
    """Prompts with their answers; the loss lies on the answers."""
    encoded = []
    for row in rows:
        if row.answer is None:
            raise MissingInput(f"Row {row.id!r} of a data set has no answer.", row.id)
        context = (replace(message, weight=0.0) for message in row.messages)  # earlier answers are not taught
        encoded.append(tuned.encode(ChatRow((*context, Message("assistant", row.answer)))))
    return encoded


def encode_task(tuned: TunedModel, rows: Sequence[ChatRow]) -> list[EncodedRow]:
    return [tuned.encode(row) for row in rows]


@contextmanager
def evaluation_mode(tuned: TunedModel) -> Iterator[None]:
    """No dropout; the mode that was set comes back."""
    was_training = tuned.model.training
    tuned.model.eval()
    try:
        yield
    finally:
        tuned.model.train(was_training)


@contextmanager
def gradients_of_factors(tuned: TunedModel) -> Iterator[None]:
    """Gradients for the LoRA factors, whatever they were loaded for; weights, flags and gradients are put back."""
    parameters = tuned.vector.parameters()
    flags = [parameter.requires_grad for parameter in parameters]
    kept = tuned.vector.get()
    for parameter in parameters:
        parameter.requires_grad_(True)
    tuned.vector.zero_grad()
    try:
        with evaluation_mode(tuned):
            yield
    finally:
        tuned.vector.zero_grad()
        tuned.vector.set(kept)
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)


def counted_logits(tuned: TunedModel, batch: Batch, counted: Tensor) -> Tensor:
    """(counted, vocabulary): logits of the predictions marked in `counted` (rows, tokens - 1), row by row."""
    return logits_at(tuned.model, batch.input_ids, places(counted), attention_mask=batch.attention_mask)


def pieces_of(tuned: TunedModel, rows: Sequence[EncodedRow]) -> list[Batch]:
    """Micro-batches on the model's device."""
    pieces = micro_batches(rows, max_tokens=tuned.piece_tokens)
    return [collate(piece, tuned.pad_id).to(tuned.vector.device) for piece in pieces]


def summed_loss(tuned: TunedModel, batch: Batch) -> Tensor:
    """Sum over trained tokens of weight times negative log-likelihood."""
    weights = batch.loss_weights[:, 1:]
    trained = weights > 0
    logits = counted_logits(tuned, batch, trained).float()
    losses = F.cross_entropy(logits, batch.input_ids[:, 1:][trained], reduction="none")
    return (losses * weights[trained]).sum()


def answer_loss(tuned: TunedModel, rows: Sequence[EncodedRow]) -> float:
    """Mean loss per trained token at the model's present weights."""
    pieces = pieces_of(tuned, rows)
    total = sum(float(piece.loss_weights[:, 1:].sum()) for piece in pieces)
    with evaluation_mode(tuned), torch.no_grad():
        return sum(float(summed_loss(tuned, piece)) for piece in pieces) / total


def answer_gradient(tuned: TunedModel, rows: Sequence[EncodedRow], progress: Progress) -> tuple[float, Tensor]:
    """Mean loss per trained token over *all* rows and its gradient. Call inside `gradients_of_factors`."""
    pieces = pieces_of(tuned, rows)
    total = sum(float(piece.loss_weights[:, 1:].sum()) for piece in pieces)
    if total == 0:
        raise NumericError("No token of the data set carries a loss.")
    tuned.vector.zero_grad()
    loss_sum = 0.0
    for index, piece in enumerate(pieces, start=1):
        loss = summed_loss(tuned, piece) / total
        loss.backward()
        loss_sum += float(loss.detach())
        progress.step(index, len(pieces), part="gradient")
    return loss_sum, tuned.vector.grad()
