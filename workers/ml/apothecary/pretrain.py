"""Full-weight training of the bundled model: one small loop for pretraining and for alignment.

Knows: how the model is shaped and how a phase of training runs, on a CPU, the same each time.
Refuses to know: the world's rows (curriculum), files, LoRA and recovery. The service's own training loop
is another one; this loop trains every weight of one tiny model and is run only when the model is remade.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from workers.ml.apothecary.shipped import CONTEXT
from workers.ml.chat import EncodedRow, encode_row
from workers.ml.types import ChatRow

MICRO_BATCH_ROWS = 16


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of training. `learning_rate` is the peak; warm-up is linear and the decay a cosine to 0."""

    name: str
    steps: int
    batch_rows: int
    learning_rate: float
    warmup_steps: int
    seed: int


@dataclass(frozen=True, slots=True)
class Report:
    """One line of a phase's progress."""

    phase: str
    step: int
    steps: int
    loss: float
    seconds: float


def new_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train_phase(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterator[ChatRow],
    *,
    phase: Phase,
    report: Callable[[Report], None],
) -> float:
    """Runs one phase and returns the mean loss of its last 20 steps."""
    torch.manual_seed(phase.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=phase.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    encoded = (encode_row(tokenizer, row, max_tokens=CONTEXT) for row in rows)
    losses: list[float] = []
    started = time.perf_counter()
    model.train()
    for step in range(1, phase.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(phase, step)
        optimizer.zero_grad()
        losses.append(_backward(model, list(islice(encoded, phase.batch_rows)), tokenizer.pad_token_id))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        report(Report(phase.name, step, phase.steps, losses[-1], time.perf_counter() - started))
    model.eval()
    return sum(losses[-20:]) / len(losses[-20:])


def _backward(model: LlamaForCausalLM, rows: Sequence[EncodedRow], pad_id: int) -> float:
    """Gradients of the mean loss over the step's answer tokens; rows of similar length go through together."""
    by_length = sorted(rows, key=len)
    answer_tokens = sum(row.trained_tokens for row in rows)
    total = 0.0
    for begin in range(0, len(rows), MICRO_BATCH_ROWS):
        loss = _summed_loss(model, by_length[begin : begin + MICRO_BATCH_ROWS], pad_id) / answer_tokens
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    return total


def _summed_loss(model: LlamaForCausalLM, rows: Sequence[EncodedRow], pad_id: int) -> torch.Tensor:
    """Summed over answer tokens. Padding stands on the right, where a causal model never looks back at it."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id)  # (rows, width)
    weights = torch.zeros(len(rows), width)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row.input_ids)
        weights[place, : len(row)] = torch.tensor(row.loss_weights)
    trained = weights[:, 1:] > 0
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][trained]  # (answers, hidden)
    return torch.nn.functional.cross_entropy(model.lm_head(hidden), ids[:, 1:][trained], reduction="sum")


def _learning_rate(phase: Phase, step: int) -> float:
    if step <= phase.warmup_steps:
        return phase.learning_rate * step / phase.warmup_steps
    done = (step - phase.warmup_steps) / max(1, phase.steps - phase.warmup_steps)
    return phase.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
