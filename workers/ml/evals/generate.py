"""Greedy answers to many prompts at once.

Knows: left padding, the key-value cache, when a row is finished, and when dropping finished rows pays.
Refuses to know: templates (prompts come as tokens), what is asked, what is made of the answers.

Deterministic: an answer does not depend on what else is in its batch (up to the rounding of one matrix product).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from workers.ml.errors import InvalidSetting
from workers.ml.memory import is_out_of_memory, release_reserve

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Rebuilding the cache without finished rows costs about one decoding step; it pays once a quarter is finished.
DROP_RATIO = 0.25


@dataclass(frozen=True, slots=True)
class Reply:
    """`finished` is False where the length limit cut the answer off: what would have followed is not known."""

    text: str
    finished: bool = True


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    tick: Callable[[], None] | None = None,
) -> list[Reply]:
    """The answer to each prompt, in the order of the prompts; batches halve where memory runs out.

    `tick` is called at every batch and may raise.
    """
    if any(not prompt for prompt in prompts):
        raise InvalidSetting("A prompt without tokens cannot be answered.", "prompts")
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index), reverse=True)
    answers = [Reply("")] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            waiting = order
            while waiting:
                if tick is not None:
                    tick()
                chosen = waiting[:batch_size]
                try:
                    written = _decode(model, tokenizer, [prompts[i] for i in chosen], max_new_tokens)
                except (RuntimeError, MemoryError) as error:
                    if batch_size == 1 or not is_out_of_memory(error):
                        raise
                    release_reserve()
                    batch_size //= 2
                    continue
                waiting = waiting[batch_size:]
                for index, (tokens, finished) in zip(chosen, written, strict=True):
                    text = str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
                    answers[index] = Reply(text, finished)
    finally:
        model.train(was_training)
    return answers


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer, by the tokenizer and by the model's generation settings."""
    ends: set[int] = set()
    settings = getattr(model, "generation_config", None)
    for end in (tokenizer.eos_token_id, getattr(settings, "eos_token_id", None)):
        ends.update(end if isinstance(end, list) else [end] if end is not None else [])
    return sorted(ends)


def _decode(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[Sequence[int]], max_new_tokens: int
) -> list[tuple[list[int], bool]]:
    """New tokens of each prompt, without the one that ends it, and whether one did."""
    ids, mask = _left_padded(prompts, tokenizer.pad_token_id or 0, model.device)
    ends = torch.tensor(end_tokens(model, tokenizer), device=model.device)
    answers: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    rows = list(range(len(prompts)))  # which prompt each row of the batch belongs to
    finished = torch.zeros(len(rows), dtype=torch.bool, device=model.device)
    cache = DynamicCache()
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    for _ in range(max_new_tokens):
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        token = logits.argmax(dim=-1)
        finished |= torch.isin(token, ends)
        for row, value, done in zip(rows, token.tolist(), finished.tolist(), strict=True):
            ended[row] = done
            if not done:
                answers[row].append(value)
        if bool(finished.all()):
            break
        if int(finished.sum()) >= DROP_RATIO * len(rows):
            keep = (~finished).nonzero().squeeze(1)
            cache.batch_select_indices(keep)
            rows = [rows[index] for index in keep.tolist()]
            token, mask, positions, finished = token[keep], mask[keep], positions[keep], finished[keep]
        ids = token[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return list(zip(answers, ended, strict=True))


def _left_padded(prompts: list[Sequence[int]], pad_id: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Token ids and mask, (rows, tokens)."""
    longest = max(len(prompt) for prompt in prompts)
    ids = [[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
