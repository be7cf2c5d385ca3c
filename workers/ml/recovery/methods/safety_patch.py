"""Safety patch: a short training on refusals, with task and retention rows replayed as they are given.

Paper: the recovery LoRA of SLDR (2026), trained on a hundred refusals, with what its own figures ask for: task rows
against the loss of the task, and the provider's harmless rows against refusing everything that resembles the harm.
Here it continues the job's own adapter, so that rank and shape stay; the dial interpolates to its end.
What it does not do: know what the raw fine-tune or the aligned base would have said. Rows are followed to the letter, so
what they do not show may be lost: compare with anchored-patch.
"""

from __future__ import annotations

from workers.ml.recovery.calibration import encode_answers, encode_task
from workers.ml.recovery.dial import RecoveryInputs, StrengthPath
from workers.ml.recovery.patching import Term, train_patch
from workers.ml.recovery.specs import SafetyPatchSpec
from workers.ml.tuned_model import TunedModel
from workers.ml.types import Progress


def prepare(tuned: TunedModel, spec: SafetyPatchSpec, inputs: RecoveryInputs, progress: Progress) -> StrengthPath:
    """Trains the patch once; every strength is then one interpolation."""
    inputs.require(spec)
    start = tuned.vector.get()
    terms = [
        Term("refusal_loss", encode_answers(tuned, inputs.refusals), spec.refusal_rows),
        Term("task_loss", encode_task(tuned, inputs.task), spec.task_rows, spec.replay_weight),
        Term("retention_loss", encode_answers(tuned, inputs.retention), spec.retention_rows, spec.replay_weight),
    ]
    patch, losses = train_patch(tuned, spec, terms, progress)
    move = patch - start
    facts = {f"{term.name.removesuffix('_loss')}_rows": len(term.rows) for term in terms}
    return StrengthPath(start, lambda strength: start + strength * move, {**facts, "losses": losses})
