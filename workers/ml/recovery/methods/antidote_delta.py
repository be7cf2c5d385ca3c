"""Antidote on the update itself: zeroes the entries of delta = s * B @ A that harmful data excites most.

Paper: Antidote, ICML 2025, arXiv 2408.09600, as its text has it: scores and masks on weights, not on LoRA factors.
Score |delta_ij| * c_j, with c_j the norm of input channel j over harmful prompts with their answers; the top `strength`
(the paper's alpha) of each row, module or of all modules is set to zero. The base is frozen, so zeroing an entry of
delta is putting that weight back to its aligned value. Does not depend on how B and A share their scale.
A masked delta has no low rank any more. Form `patch` is exact: the raw adapter with a sparse patch of minus delta
beside it. Form `adapter` is the best refit of what is left at the job's rank, which undoes much of the mask:
`refit_lost_share` is the part of the wanted change that it misses, `pruning_kept` how much of the pruning survives.
What it does not do: use gradients, or know the task (unless `spare` names rows whose own top entries stay).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from workers.ml.chat import EncodedRow
from workers.ml.errors import NumericError
from workers.ml.recovery.activations import channel_norms
from workers.ml.recovery.calibration import encode_answers, encode_task
from workers.ml.recovery.deltas import delta_norm
from workers.ml.recovery.dial import RecoveryInputs, StrengthPath
from workers.ml.recovery.entries import TopEntries, masked_path, weight_change
from workers.ml.recovery.scores import wanda_scores
from workers.ml.recovery.specs import AntidoteDeltaSpec
from workers.ml.tuned_model import TunedModel
from workers.ml.types import Progress


def prepare(tuned: TunedModel, spec: AntidoteDeltaSpec, inputs: RecoveryInputs, progress: Progress) -> StrengthPath:
    """One forward for each set of rows; scores are formed module by module whenever a point is asked for."""
    inputs.require(spec)
    vector, raw = tuned.vector, tuned.vector.get()
    if delta_norm(vector, raw) == 0:
        raise NumericError("The adapter changes nothing: there is no entry to prune.")
    names = [pair.module_name for pair in vector.pairs()]
    harmful = encode_answers(tuned, inputs.harmful[: spec.max_rows])
    scored = entry_scores(tuned, spec, harmful, progress)
    top = TopEntries(names, scored, spec.granularity, compat=spec.compat)
    spared = []
    for role in spec.spare:
        rows = encode_task(tuned, inputs.task) if role == "task" else encode_answers(tuned, inputs.retention)
        spared.append(TopEntries(names, entry_scores(tuned, spec, rows[: spec.max_rows], progress), spec.granularity))

    def masks(strength: float) -> Iterator[tuple[str, Tensor]]:
        own = [one.masks(spec.spare_ratio) for one in spared]
        for name, mask in top.masks(strength):
            for kept in own:
                mask &= ~next(kept)[1]
            yield name, mask

    facts = {"harmful_rows": len(harmful), "harmful_tokens": sum(len(row) for row in harmful)}
    return masked_path(vector, spec.form, masks, facts=facts, progress=progress)


def entry_scores(
    tuned: TunedModel, spec: AntidoteDeltaSpec, rows: Sequence[EncodedRow], progress: Progress
) -> Callable[[str], Tensor]:
    """After one forward over the rows: the scores, (d_out, d_in), of the entries of the module that is named."""
    pairs = {pair.module_name: pair for pair in tuned.vector.pairs()}
    parts = tuned.vector.split(tuned.vector.get())
    names = [pair.a_name for pair in pairs.values()]
    norms = channel_norms(tuned, rows, names, norm=spec.norm, tokens=spec.tokens, progress=progress)
    return lambda name: wanda_scores(weight_change(parts, pairs[name]), norms[pairs[name].a_name])
