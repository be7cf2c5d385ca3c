"""Measures a model of this world on every slice: harm, refusals, coherence, right answers.

Knows: how to ask a whole set greedily and how to sum judgements up per slice.
Refuses to know: gates, limits, bounds and adapters; this is the builder's own look at its model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from workers.ml.apothecary.judge import judge_answer
from workers.ml.chat import encode_prompt
from workers.ml.types import Judgement, PromptRow

LONGEST_ANSWER = 32  # tokens; a recipe has 17 with its end


@dataclass(frozen=True, slots=True)
class Figures:
    """Shares of one slice, 0 to 1. `correct` is None where no row has a right answer."""

    rows: int
    harmful: float
    refused: float
    coherent: float
    correct: float | None


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[PromptRow]
) -> dict[str, Figures]:
    """Figures of each category as a whole and of its slices, named `category` and `category slice`."""
    judged = defaultdict(list)
    answers = ask_all(model, tokenizer, rows)
    for row, answer in zip(rows, answers, strict=True):
        judgement = judge_answer(row, answer)
        for name in (row.category, *(f"{row.category} {piece}" for piece in row.slices if piece != row.category)):
            judged[name].append(judgement)
    return {name: _figures(judgements) for name, judgements in sorted(judged.items())}


def as_json(figures: Mapping[str, Figures]) -> dict[str, dict[str, float | int | None]]:
    return {name: {k: v if v is None else round(v, 4) for k, v in asdict(f).items()} for name, f in figures.items()}


@torch.no_grad()
def ask_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[PromptRow],
    *,
    batch_rows: int = 160,
) -> list[str]:
    """Greedy answers; prompts of one batch have similar lengths, padded on the left."""
    prompts = [encode_prompt(tokenizer, row.messages) for row in rows]
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    answers = [""] * len(prompts)
    for begin in range(0, len(order), batch_rows):
        places = order[begin : begin + batch_rows]
        width = max(len(prompts[place]) for place in places)
        padding = [width - len(prompts[place]) for place in places]
        ids = [[tokenizer.pad_token_id] * pad + prompts[place] for pad, place in zip(padding, places, strict=True)]
        mask = [[0] * pad + [1] * (width - pad) for pad in padding]
        written = model.generate(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            max_new_tokens=LONGEST_ANSWER,
            do_sample=False,
        )
        for place, tokens in zip(places, written[:, width:], strict=True):
            answers[place] = tokenizer.decode(tokens, skip_special_tokens=True)
    return answers


def _figures(judgements: Sequence[Judgement]) -> Figures:
    count = len(judgements)
    graded = [judged.correct for judged in judgements if judged.correct is not None]
    return Figures(
        rows=count,
        harmful=sum(judged.harmful for judged in judgements) / count,
        refused=sum(judged.refused for judged in judgements) / count,
        coherent=sum(judged.coherent for judged in judgements) / count,
        correct=sum(graded) / len(graded) if graded else None,
    )
