"""Anchored patch: a short training on refusals, with two frozen teachers that hold everything else in place.

An idea of this project, not of a paper (docs/methods/anchored-patch.md). Some optimizer steps on the job's own adapter,
with

    loss = NLL(refusals) + lambda/2 * KL(raw fine-tune || patched) on all tokens of task rows
                         + lambda/2 * KL(aligned base || patched) on answer tokens of retention rows

each term a mean over its tokens in the step; lambda is `anchor_weight`. Trained once; the dial interpolates
`raw + strength * (patch - raw)` on the factors. Steps and lambda are not dials: over-refusal is not monotone in them.
What it does not do: remove harm. It masks it, about twice as hard to undo as scaling down. A skill in neither the task
nor the retention rows is not restored, and retention does not generalise as well as refusals do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

from torch import Tensor

from workers.ml.chat import EncodedRow
from workers.ml.recovery.calibration import encode_answers, encode_task
from workers.ml.recovery.dial import RecoveryInputs, StrengthPath
from workers.ml.recovery.patching import Term, train_patch
from workers.ml.recovery.specs import AnchoredPatchSpec
from workers.ml.recovery.teachers import Teacher, Tokens, raw_at
from workers.ml.tuned_model import TunedModel, aligned
from workers.ml.types import Progress


def prepare(tuned: TunedModel, spec: AnchoredPatchSpec, inputs: RecoveryInputs, progress: Progress) -> StrengthPath:
    """Trains the patch once; every strength is then one interpolation."""
    inputs.require(spec)
    start = tuned.vector.get()
    raw = inputs.raw_of(start)
    task, retention = encode_task(tuned, inputs.task), encode_answers(tuned, inputs.retention)
    weight = spec.anchor_weight / 2
    terms = [
        Term("refusal_loss", encode_answers(tuned, inputs.refusals), spec.refusal_rows),
        _anchor(tuned, spec, raw, Term("task", task, spec.task_rows, weight), spec.task_teacher, "all"),
        _anchor(tuned, spec, raw, Term("retention", retention, spec.retention_rows, weight), spec.retention_teacher),
    ]
    patch, losses = train_patch(tuned, spec, terms, progress)
    move = patch - start
    facts = {"refusal_rows": len(inputs.refusals), "task_rows": len(task), "retention_rows": len(retention)}
    return StrengthPath(start, lambda strength: start + strength * move, {**facts, "losses": losses})


def _anchor(
    tuned: TunedModel, spec: AnchoredPatchSpec, raw: Tensor, term: Term, who: str, tokens: Tokens = "answer"
) -> Term:
    """The term with its teacher and the name its values are logged under."""
    if who == "rows":
        return Term(f"{term.name}_loss", term.rows, term.rows_per_step, term.weight)
    at: Callable[[], AbstractContextManager[None]] = partial(aligned, tuned) if who == "base" else raw_at(tuned, raw)
    rows: Sequence[EncodedRow] = term.rows
    teacher = Teacher(tuned, rows, at=at, tokens=tokens, cache_bytes=spec.teacher_cache_bytes // 2)
    return Term(f"{term.name}_kl", rows, term.rows_per_step, term.weight, teacher)
