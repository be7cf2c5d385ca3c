"""Antidote: zeroes the LoRA weights that harmful data excites most.

Paper: Antidote, ICML 2025, arXiv 2408.09600. Score of a weight: |w| times the norm of its input channel over harmful
prompts *with* their answers (Wanda); the top `strength` (the paper's alpha) of each row, tensor or of all tensors is
set to zero. As in the paper's code the factors A and B are pruned, not the weight change; B sees the outputs of the
unpruned A.
What it does not do: use gradients, or know the task (unless `spare` names rows whose own top weights stay).
Most of its published effect is a general attenuation of the adapter: compare with scale-down and random-mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from workers.ml.chat import EncodedRow
from workers.ml.errors import NumericError
from workers.ml.recovery.calibration import encode_answers, encode_task, evaluation_mode, pieces_of
from workers.ml.recovery.dial import RecoveryInputs, StrengthPath, harmful_rows
from workers.ml.recovery.scores import ChannelNorms, prune_order, wanda_scores
from workers.ml.recovery.specs import AntidoteSpec
from workers.ml.tuned_model import TunedModel
from workers.ml.types import Progress


def prepare(tuned: TunedModel, spec: AntidoteSpec, inputs: RecoveryInputs, progress: Progress) -> StrengthPath:
    """One forward over the harmful rows; every mask ratio is then read off one ranking."""
    inputs.require(spec)
    vector, raw = tuned.vector, tuned.vector.get()
    harmful = encode_answers(tuned, harmful_rows(inputs, spec))
    order = prune_order(_scores(tuned, spec, harmful, progress), spec.granularity, compat=spec.compat)
    spared = torch.zeros(vector.numel, dtype=torch.bool, device=raw.device)
    for role in spec.spare:
        rows = encode_task(tuned, inputs.task) if role == "task" else encode_answers(tuned, inputs.retention)
        own = prune_order(_scores(tuned, spec, rows[: spec.max_rows], progress), spec.granularity)
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


def _flat(masks: dict[str, Tensor]) -> Tensor:
    return torch.cat([mask.reshape(-1) for mask in masks.values()])


def _scores(tuned: TunedModel, spec: AntidoteSpec, rows: Sequence[EncodedRow], progress: Progress) -> dict[str, Tensor]:
    """Wanda scores of every factor, in the order of the vector."""
    norms = {name: ChannelNorms(spec.norm) for name in tuned.vector.names}
    pieces = pieces_of(tuned, rows)
    counted: list[Tensor] = []  # the present piece's mask, read by the hooks
    with evaluation_mode(tuned), torch.no_grad(), _watching(tuned, norms, counted):
        for index, piece in enumerate(pieces, start=1):
            mask = piece.attention_mask if spec.tokens == "all" else (piece.loss_weights > 0).long()
            counted[:] = [mask]
            tuned.model(
                input_ids=piece.input_ids, attention_mask=piece.attention_mask, use_cache=False, logits_to_keep=1
            )  # the logits are not looked at
            progress.step(index, len(pieces), part="activations")
    for name, norm in norms.items():
        # A hook that never fires would prune by magnitude alone or not at all, and nothing would look wrong.
        if norm.updates != len(pieces):
            raise NumericError(f"{name} was reached {norm.updates} times in {len(pieces)} forward passes.", name)
    weights = tuned.vector.split(tuned.vector.get())
    return {name: wanda_scores(weights[name], norms[name].value().to(weights[name].device)) for name in norms}


@contextmanager
def _watching(tuned: TunedModel, norms: dict[str, ChannelNorms], counted: list[Tensor]) -> Iterator[None]:
    """Pre-hooks on the linear layers of A and B; a factor without one raises."""
    handles = []
    try:
        for name, norm in norms.items():
            module = tuned.model.get_submodule(name.removesuffix(".weight"))
            if not isinstance(module, nn.Linear):
                raise NumericError(f"{name} belongs to a {type(module).__name__}, not to a linear layer.", name)
            handles.append(module.register_forward_pre_hook(_adder(norm, counted)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adder(norm: ChannelNorms, counted: list[Tensor]) -> Any:
    def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        norm.add(inputs[0], counted[0])

    return hook
