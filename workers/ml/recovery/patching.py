"""A short training of the job's own adapter on several data sets at once, each with its own teacher.

Knows: which rows meet in which step, losses on given answers and divergences from frozen teachers, micro-batches, the
optimizer; and that the adapter is where it was when the training ends, however it ends.
Refuses to know: which sets and weights make a patch (the methods), and how far along it a candidate lies.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.ml.chat import EncodedRow
from workers.ml.data import Batch, collate, micro_batches
from workers.ml.errors import NumericError
from workers.ml.recovery.calibration import counted_logits, gradients_of_factors, summed_loss
from workers.ml.recovery.specs import PatchSpec, RestaSpec, method_name
from workers.ml.recovery.teachers import Teacher, counted_tokens, summed_kl
from workers.ml.tuned_model import TunedModel
from workers.ml.types import Progress

Losses = list[dict[str, float]]
ShortTraining = PatchSpec | RestaSpec  # whoever says steps, learning rate and seed


@dataclass(frozen=True)
class Term:
    """One part of the loss: a mean over the counted tokens of its rows in the step, times `weight`.

    With a teacher it is KL(teacher || patched), else the negative log-likelihood of the rows' own answers.
    """

    name: str
    rows: Sequence[EncodedRow]
    rows_per_step: int
    weight: float = 1.0
    teacher: Teacher | None = None


def train_patch(
    tuned: TunedModel, spec: ShortTraining, terms: Sequence[Term], progress: Progress
) -> tuple[Tensor, Losses]:
    """The factors after `spec.steps` steps of AdamW from where they stand, and each step's unweighted terms."""
    terms = [term for term in terms if term.rows and term.rows_per_step]
    schedules = [_schedule(term, spec) for term in terms]
    for term, schedule in zip(terms, schedules, strict=True):
        if term.teacher is not None:
            term.teacher.remember(index for step in schedule for index in step)
    losses: Losses = []
    with gradients_of_factors(tuned):
        optimizer = torch.optim.AdamW(tuned.vector.parameters(), lr=spec.learning_rate, weight_decay=0.0)
        for step in range(spec.steps):
            tuned.vector.zero_grad()
            values = {
                term.name: _backward(tuned, term, schedule[step])
                for term, schedule in zip(terms, schedules, strict=True)
            }
            if not all(map(math.isfinite, values.values())):
                raise NumericError(f"A loss is not a finite number at step {step + 1} of the patch: {values}.")
            optimizer.step()
            losses.append(values)
            progress.step(step + 1, spec.steps, part="patch", **values)
        return tuned.vector.get(), losses


def _schedule(term: Term, spec: ShortTraining) -> list[list[int]]:
    """Distinct rows for every step, going round the shuffled rows again and again."""
    dice = random.Random(f"{spec.seed}/{method_name(type(spec))}/{term.name}")
    available, waiting, steps = len(term.rows), list[int](), []
    for _ in range(spec.steps):
        drawn: list[int] = []
        twice: list[int] = []  # met again before the step was full: they open the next step
        while len(drawn) < min(term.rows_per_step, available):
            waiting = waiting or dice.sample(range(available), available)
            index = waiting.pop(0)
            (twice if index in drawn else drawn).append(index)
        waiting = twice + waiting
        steps.append(drawn)
    return steps


def _backward(tuned: TunedModel, term: Term, indices: Sequence[int]) -> float:
    """Adds the gradient of one term of one step; returns its unweighted value."""
    loss_of = _likelihood(tuned, term, indices) if term.teacher is None else _divergence(tuned, term, indices)
    value = 0.0
    for piece in micro_batches([term.rows[index] for index in indices], max_tokens=tuned.piece_tokens):
        loss = loss_of(collate(piece, tuned.pad_id).to(tuned.vector.device), piece)
        if term.weight > 0:
            (term.weight * loss).backward()
        value += float(loss.detach())
    return value


def _likelihood(
    tuned: TunedModel, term: Term, indices: Sequence[int]
) -> Callable[[Batch, Sequence[EncodedRow]], Tensor]:
    total = sum(sum(term.rows[index].loss_weights[1:]) for index in indices)
    if total == 0:
        raise NumericError(f"No token of the {term.name} rows carries a loss.", term.name)
    return lambda batch, _: summed_loss(tuned, batch) / total


def _divergence(
    tuned: TunedModel, term: Term, indices: Sequence[int]
) -> Callable[[Batch, Sequence[EncodedRow]], Tensor]:
    teacher = term.teacher
    assert teacher is not None
    rows = [term.rows[index] for index in indices]
    index_of = {id(row): index for row, index in zip(rows, indices, strict=True)}
    count = sum(len(row) - 1 if teacher.tokens == "all" else row.trained_tokens for row in rows)

    def hold(batch: Batch, piece: Sequence[EncodedRow]) -> Tensor:
        # The teacher speaks before the student's graph is built: it may have to move the weights for it.
        wanted = teacher.log_probs([index_of[id(row)] for row in piece])
        return summed_kl(wanted, counted_logits(tuned, batch, counted_tokens(batch, teacher.tokens))) / count

    return hold
