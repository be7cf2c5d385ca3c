"""Antidote: zeroes the LoRA weights that harmful data excites most.

Paper: Antidote, ICML 2025, arXiv 2408.09600. Score of a weight: |w| times the norm of its input channel over harmful
prompts *with* their answers (Wanda); the top `strength` (the paper's alpha) of each row, tensor or of all tensors is
set to zero. As in the paper's code the factors A and B are pruned, not the weight change; B sees the outputs of the
unpruned A. One forward over the rows; the paper's code takes two (bench/antidote_port.py).
What it does not do: use gradients, or know the task (unless `spare` names rows whose own top weights stay).
Most of its published effect is a general attenuation of the adapter: compare with scale-down and random-mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from workers.ml.chat import EncodedRow
from workers.ml.recovery.activations import channel_norms
from workers.ml.recovery.calibration import encode_answers, encode_task
from workers.ml.recovery.dial import RecoveryInputs, StrengthPath, harmful_rows
from workers.ml.recovery.scores import prune_order, wanda_scores
from workers.ml.recovery.specs import AntidoteSpec
from workers.ml.tuned_model import TunedModel
from workers.ml.types import Progress


def prepare(tuned: TunedModel, spec: AntidoteSpec, inputs: RecoveryInputs, progress: Progress) -> StrengthPath:
    """One forward over the harmful rows; every mask ratio is then read off one ranking."""
    inputs.require(spec)
    vector, raw = tuned.vector, tuned.vector.get()
    harmful = encode_answers(tuned, harmful_rows(inputs, spec))
    order = prune_order(factor_scores(tuned, spec, harmful, progress), spec.granularity, compat=spec.compat)
    spared = torch.zeros(vector.numel, dtype=torch.bool, device=raw.device)
    for role in spec.spare:
        rows = encode_task(tuned, inputs.task) if role == "task" else encode_answers(tuned, inputs.retention)
        own = prune_order(factor_scores(tuned, spec, rows[: spec.max_rows], progress), spec.granularity)
        spared |= _flat(own.masks(spec.spare_ratio))

    def mask_at(strength: float) -> Tensor:
        return _flat(order.masks(strength)) & ~spared

    def facts_at(strength: float) -> dict[str, Any]:
        mask = mask_at(strength)
        return {
            "counts": order.counts(strength),
            "pruned": int(mask.sum()),
            "pruned_ratio": float(mask.float().mean()),
            "mask_sha256": sha256(mask.cpu().numpy().tobytes()).hexdigest(),
        }

    facts = {"harmful_rows": len(harmful), "harmful_tokens": sum(len(row) for row in harmful)}
    return StrengthPath(raw, lambda strength: raw.masked_fill(mask_at(strength), 0.0), facts, facts_at)


def factor_scores(
    tuned: TunedModel, spec: AntidoteSpec, rows: Sequence[EncodedRow], progress: Progress
) -> dict[str, Tensor]:
    """Wanda scores of every factor, shaped as it is, in the order of the vector. One forward, no backward."""
    weights = tuned.vector.split(tuned.vector.get())
    norms = channel_norms(tuned, rows, tuned.vector.names, norm=spec.norm, tokens=spec.tokens, progress=progress)
    return {name: wanda_scores(weight, norms[name].to(weight.device)) for name, weight in weights.items()}


def _flat(masks: dict[str, Tensor]) -> Tensor:
    return torch.cat([mask.reshape(-1) for mask in masks.values()])
