"""Where a change of the weights acts, and how far it moves the model's view of harmful prompts.

Knows: each module's share of a weight change (Panacea's "layer-wise safety affinity", here for every method), and the
drift of harmful embeddings from the aligned base's (the measure of Vaccine and Antidote), layer by layer.
Refuses to know: methods, and which of the two is good.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.ml.candidate import Candidate
from workers.ml.chat import encode_prompt
from workers.ml.recovery.calibration import evaluation_mode
from workers.ml.recovery.deltas import module_changes
from workers.ml.tuned_model import TunedModel, aligned
from workers.ml.types import PromptRow

PROMPTS = 64
PROMPTS_AT_ONCE = 16
PREFIX = "base_model.model."


def affinity(tuned: TunedModel, candidate: Candidate, raw: Tensor) -> dict[str, float]:
    """Share of every adapted module in the squared norm of the change; all 0 where nothing changed."""
    squares = {
        name.removeprefix(PREFIX): norm**2 for name, norm in module_changes(tuned.vector, candidate, raw).items()
    }
    total = sum(squares.values())
    return {name: square / total if total else 0.0 for name, square in squares.items()}


class EmbeddingDrift:
    """Calling it measures the model as it stands: per layer (embeddings first), the mean over harmful prompts of
    ||h - h_aligned|| / ||h_aligned|| at the prompt's last token."""

    def __init__(self, tuned: TunedModel, prompts: Sequence[PromptRow]) -> None:
        self._tuned = tuned
        stride = max(1, len(prompts) // PROMPTS)
        self._prompts = [encode_prompt(tuned.tokenizer, row.messages) for row in prompts[::stride][:PROMPTS]]
        with aligned(tuned):
            self._aligned = self._last_states()

    def __call__(self) -> list[float]:
        if not self._prompts:
            return []
        distance = (self._last_states() - self._aligned).norm(dim=-1)  # (layers + 1, prompts)
        size = self._aligned.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        return [float(value) for value in (distance / size).mean(dim=1)]

    def _last_states(self) -> Tensor:
        """(layers + 1, prompts, hidden) in fp32"""
        device = self._tuned.vector.device
        states = []
        with evaluation_mode(self._tuned), torch.no_grad():
            for begin in range(0, len(self._prompts), PROMPTS_AT_ONCE):
                part = self._prompts[begin : begin + PROMPTS_AT_ONCE]
                width = max(map(len, part))
                ids = torch.tensor([row + [self._tuned.pad_id] * (width - len(row)) for row in part], device=device)
                # Padded on the right, a causal model never sees the padding from the last real token.
                found = self._tuned.model(
                    input_ids=ids, output_hidden_states=True, use_cache=False, logits_to_keep=1
                ).hidden_states
                places = torch.tensor([len(row) - 1 for row in part], device=device)
                rows = torch.arange(len(part), device=device)
                states.append(torch.stack([layer[rows, places].float() for layer in found]))
        return torch.cat(states, dim=1) if states else torch.empty(0)
