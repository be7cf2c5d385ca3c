"""Anchored patch: a short training on refusals, with two frozen teachers that hold everything else in place.

An idea of this project, not of a paper. Some optimizer steps on the job's own adapter, with

    loss = NLL(refusals) + lambda/2 * KL(raw fine-tune || patched) on all tokens of task rows
                         + lambda/2 * KL(aligned base || patched) on answer tokens of retention rows

each term a mean over its tokens in the step; lambda is `anchor_weight`. Trained once; the dial interpolates
`raw + strength * (patch - raw)` on the factors. Steps and lambda are not dials: over-refusal is not monotone in them.
With `shrink` the training starts nearer to the aligned base: what tuning broke by the way comes back at once, in every
form and kind, and the raw teacher has to bring back the task alone.
What it does not do: remove harm. It masks it, about twice as hard to undo as scaling down. A skill in neither the task
nor the retention rows is not restored, and retention does not generalise as well as refusals do.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from workers.ml.chat import EncodedRow
from workers.ml.data import Batch, collate, micro_batches
from workers.ml.errors import NumericError
from workers.ml.recovery.calibration import (
    counted_logits,
    encode_answers,
    encode_task,
    gradients_of_factors,
    summed_loss,
)
from workers.ml.recovery.dial import RecoveryInputs, StrengthPath
from workers.ml.recovery.specs import AnchoredPatchSpec
from workers.ml.recovery.teachers import Teacher, Tokens, counted_tokens, raw_at, summed_kl
from workers.ml.tuned_model import TunedModel, aligned
from workers.ml.types import Progress

Term = Callable[[Batch, list[EncodedRow]], Tensor]


def prepare(tuned: TunedModel, spec: AnchoredPatchSpec, inputs: RecoveryInputs, progress: Progress) -> StrengthPath:
    """Trains the patch once; every strength is then one interpolation."""
    inputs.require(spec)
    raw = tuned.vector.get()
    refusals = encode_answers(tuned, inputs.refusals)
    anchors = _anchors(tuned, spec, inputs, raw)
    patch, losses = _train(tuned, spec, refusals, anchors, progress)
    move = patch - raw
    facts: dict[str, Any] = {
        "refusal_rows": len(refusals),
        **{f"{anchor.name}_rows": len(anchor.rows) for anchor in anchors},
        "losses": losses,
    }
    return StrengthPath(raw, lambda strength: raw + strength * move, facts)


@dataclass(frozen=True)
class _Anchor:
    """Rows on which the patched model must keep saying what its teacher says."""

    name: str
    rows: list[EncodedRow]
    teacher: Teacher
    tokens: Tokens
    schedule: list[list[int]]  # row indices of each step


def _anchors(tuned: TunedModel, spec: AnchoredPatchSpec, inputs: RecoveryInputs, raw: Tensor) -> list[_Anchor]:
    task, retention = encode_task(tuned, inputs.task), encode_answers(tuned, inputs.retention)
    half = spec.teacher_cache_bytes // 2
    anchors = [
        _Anchor(
            "task",
            task,
            Teacher(tuned, task, at=raw_at(tuned, raw), tokens="all", cache_bytes=half),
            "all",
            _schedule(len(task), spec.task_rows, spec, "task"),
        ),
        _Anchor(
            "retention",
            retention,
            Teacher(tuned, retention, at=partial(aligned, tuned), tokens="answer", cache_bytes=half),
            "answer",
            _schedule(len(retention), spec.retention_rows, spec, "retention"),
        ),
    ]
    for anchor in anchors:
        anchor.teacher.remember(index for step in anchor.schedule for index in step)
    return anchors


def _schedule(available: int, wanted: int, spec: AnchoredPatchSpec, role: str) -> list[list[int]]:
    """`wanted` distinct rows for every step, going round the shuffled rows again and again."""
    dice = random.Random(f"{spec.seed}/anchored-patch/{role}")
    waiting: list[int] = []
    steps = []
    for _ in range(spec.steps):
        drawn: list[int] = []
        twice: list[int] = []  # met again before the step was full: they open the next step
        while len(drawn) < min(wanted, available):
            waiting = waiting or dice.sample(range(available), available)
            index = waiting.pop(0)
            (twice if index in drawn else drawn).append(index)
        waiting = twice + waiting
        steps.append(drawn)
    return steps


def _train(
    tuned: TunedModel,
    spec: AnchoredPatchSpec,
    refusals: list[EncodedRow],
    anchors: Sequence[_Anchor],
    progress: Progress,
) -> tuple[Tensor, list[dict[str, float]]]:
    schedule = _schedule(len(refusals), spec.refusal_rows, spec, "refusals")
    losses = []
    with gradients_of_factors(tuned):
        _shrink(tuned, spec.shrink)
        optimizer = torch.optim.AdamW(tuned.vector.parameters(), lr=spec.learning_rate, weight_decay=0.0)
        for step in range(spec.steps):
            tuned.vector.zero_grad()
            values = _backward(tuned, spec, [refusals[i] for i in schedule[step]], anchors, step)
            if not all(value == value for value in values.values()):
                raise NumericError(f"A loss is not a number at step {step + 1} of the patch: {values}.")
            optimizer.step()
            losses.append(values)
            progress.step(step + 1, spec.steps, part="patch", **values)
        return tuned.vector.get(), losses


def _shrink(tuned: TunedModel, share: float) -> None:
    values = tuned.vector.get()
    for pair in tuned.vector.pairs():
        tuned.vector.split(values)[pair.b_name].mul_(1.0 - share)
    tuned.vector.set(values)


def _backward(
    tuned: TunedModel, spec: AnchoredPatchSpec, refusals: list[EncodedRow], anchors: Sequence[_Anchor], step: int
) -> dict[str, float]:
    """Adds the gradient of one step's loss; returns its terms."""
    total = sum(sum(row.loss_weights[1:]) for row in refusals)

    def refuse(batch: Batch, _rows: list[EncodedRow]) -> Tensor:
        return summed_loss(tuned, batch) / total

    values = {"refusal_loss": _add_up(tuned, refusals, refuse, weight=1.0)}
    for anchor in anchors:
        indices = anchor.schedule[step]
        term = _kl_term(tuned, anchor, {id(anchor.rows[index]): index for index in indices})
        rows = [anchor.rows[index] for index in indices]
        values[f"{anchor.name}_kl"] = _add_up(tuned, rows, term, weight=spec.anchor_weight / 2)
    return values


def _kl_term(tuned: TunedModel, anchor: _Anchor, index_of: dict[int, int]) -> Term:
    rows = [anchor.rows[index] for index in index_of.values()]
    count = sum(len(row) - 1 if anchor.tokens == "all" else row.trained_tokens for row in rows)

    def hold(batch: Batch, piece: list[EncodedRow]) -> Tensor:
        # The teacher speaks before the student's graph is built: it may have to move the weights for it.
        teacher = anchor.teacher.log_probs([index_of[id(row)] for row in piece])
        return summed_kl(teacher, counted_logits(tuned, batch, counted_tokens(batch, anchor.tokens))) / count

    return hold


def _add_up(tuned: TunedModel, rows: list[EncodedRow], term: Term, *, weight: float) -> float:
    """Backward over micro-batches of one term; returns the unweighted sum."""
    value = 0.0
    for piece in micro_batches(rows, max_tokens=tuned.micro_batch_tokens):
        loss = term(collate(piece, tuned.pad_id).to(tuned.vector.device), piece)
        if weight > 0:
            (weight * loss).backward()
        value += float(loss.detach())
    return value
