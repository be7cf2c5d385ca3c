"""Logits where somebody looks at them, and nowhere else.

Knows: how to keep a model's LM head from every other position. At 8,192 tokens and a vocabulary of 128,000 the whole of
them would take gigabytes.
Refuses to know: losses, adapters, and why a position counts.
"""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel


def logits_at(
    model: PreTrainedModel | PeftModel, input_ids: Tensor, positions: Tensor, *, attention_mask: Tensor | None = None
) -> Tensor:
    """(positions, vocabulary): logits at `positions`, places in the flattened `input_ids` (rows * tokens).

    The choice is made at the door of the LM head, so whatever a model does to its logits afterwards (scaling, soft
    caps) stays in force.
    """

    def keep(_head: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].flatten(0, 1).index_select(0, positions), *args[1:])

    head: torch.nn.Module = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(keep)
    try:
        logits: Tensor = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    finally:
        hook.remove()
    return logits


def places(counted: Tensor) -> Tensor:
    """Where the predictions marked in `counted` (rows, tokens - 1) are made, in flattened input ids (rows * tokens)."""
    return torch.nn.functional.pad(counted, (0, 1)).reshape(-1).nonzero().squeeze(1)
