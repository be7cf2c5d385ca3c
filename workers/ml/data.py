"""Rows from JSONL, splits that never share a prompt, and batches in a seed-determined order.

Knows: the two row formats (chat `messages`, `prompt`/`completion`), hashing, ordering, padding.
Refuses to know: tokenizers and templates (chat.py), losses, where the file came from.
"""

from __future__ import annotations

import codecs
import hashlib
import itertools
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from workers.ml.chat import EncodedRow
from workers.ml.errors import InvalidRow, InvalidSetting, MissingInput
from workers.ml.prompts import turns_key
from workers.ml.strict_json import parse_object
from workers.ml.types import ChatRow, Json, Message

ROLES = frozenset({"system", "user", "assistant"})
# Batches of similar lengths are formed inside windows of this many batches: wide enough to leave little
# padding, narrow enough that an epoch stays a shuffle (the figure transformers uses for the same purpose).
WINDOW_BATCHES = 50


def read_rows(path: Path) -> list[ChatRow]:
    """Every row of a JSONL file. Blank lines are skipped; anything else that is not a row is an error."""
    rows = []
    with path.open("rb") as stream:
        for line, raw in enumerate(stream, start=1):
            if line == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            if raw.strip():
                rows.append(parse_row(_parse_json(raw, line), line))
    if not rows:
        raise InvalidRow("The file has no rows.", None, "training_file")
    return rows


def parse_row(row: Json, line: int | None = None) -> ChatRow:
    """One row of either format; a prompt with its completion is a conversation of two turns."""
    if set(row) == {"prompt", "completion"}:
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
    elif set(row) == {"messages"} and isinstance(row["messages"], list):
        messages = row["messages"]
    else:
        raise InvalidRow(
            f"Expected the keys 'messages', or 'prompt' and 'completion'; found {sorted(row)}.", line, "messages"
        )
    parsed = tuple(_parse_message(message, line) for message in messages)
    if not any(message.role == "assistant" for message in parsed):
        raise InvalidRow("The row has no assistant message to learn.", line, "messages")
    return ChatRow(parsed, line)


def _parse_message(message: object, line: int | None) -> Message:
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message) <= {"role", "content", "weight"}:
        raise InvalidRow("A message has the keys 'role', 'content' and perhaps 'weight'.", line, "messages")
    role, content, weight = message["role"], message["content"], message.get("weight", 1)
    if role not in ROLES:
        raise InvalidRow(f"Unknown role {role!r}; expected one of {sorted(ROLES)}.", line, "role")
    if not isinstance(content, str):
        raise InvalidRow(f"The content of a message is text, not {type(content).__name__}.", line, "content")
    if isinstance(weight, bool) or weight not in (0, 1):
        raise InvalidRow(f"The weight of a message is 0 or 1, not {weight!r}.", line, "weight")
    if "weight" in message and role != "assistant":
        raise InvalidRow("Only assistant messages carry a weight.", line, "weight")
    return Message(role, content, float(weight))


def _parse_json(raw: bytes, line: int) -> Json:
    try:
        return parse_object(raw)
    except ValueError as error:
        raise InvalidRow(f"Line {line} is {error}.", line, "training_file") from error


@dataclass(frozen=True, slots=True)
class Split:
    train: list[ChatRow]
    held_out: list[ChatRow]


def prompt_key(row: ChatRow) -> str:
    """sha256 of the prompt: rows that ask the same have the same key."""
    return turns_key(row.prompt)


def split_rows(rows: Sequence[ChatRow], *, holdout: int | float, salt: str = "") -> Split:
    """Hold out whole prompts by a stable hash: no prompt is on both sides, whatever the order of the file.

    `holdout` is a number of rows (int; the prompt that reaches it is taken whole) or a share of prompts (float).
    With a share, a prompt stays on its side when other rows come and go.
    """
    if holdout < 0 or (isinstance(holdout, float) and holdout >= 1):
        raise InvalidSetting(f"Cannot hold out {holdout}.", "holdout")
    by_prompt: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        by_prompt[hashlib.sha256((salt + prompt_key(row)).encode()).hexdigest()].append(index)
    held: set[int] = set()
    for key in sorted(by_prompt):
        enough = len(held) >= holdout if isinstance(holdout, int) else int(key, 16) >= holdout * 2**256
        if enough:
            break
        held.update(by_prompt[key])
    return Split(
        [row for index, row in enumerate(rows) if index not in held],
        [row for index, row in enumerate(rows) if index in held],
    )


def batches(
    rows: Sequence[EncodedRow], *, batch_size: int, seed: int, epoch: int, grouped: bool = True
) -> Iterator[list[EncodedRow]]:
    """One epoch: every row once, `batch_size` rows at a time (the last batch may be smaller).

    The order depends on nothing but (seed, epoch, number of rows, lengths). Grouped, rows of similar length meet
    in a batch, which saves padding; the batches themselves come shuffled. Ungrouped is a plain shuffle.
    """
    order = list(range(len(rows)))
    dice = random.Random(f"{seed}/{epoch}")
    dice.shuffle(order)
    if grouped:
        order = _group_by_length(order, [len(row) for row in rows], batch_size, dice)
    for begin in range(0, len(order), batch_size):
        yield [rows[index] for index in order[begin : begin + batch_size]]


def endless_batches(rows: Sequence[EncodedRow], *, batch_size: int, seed: int) -> Iterator[list[EncodedRow]]:
    """Epoch after epoch without end: the second stream of methods that mix in rows of the provider."""
    if not rows:
        raise MissingInput("A stream of batches needs at least one row.", "rows")
    for epoch in itertools.count():
        yield from batches(rows, batch_size=batch_size, seed=seed, epoch=epoch)


def _group_by_length(order: list[int], lengths: list[int], batch_size: int, dice: random.Random) -> list[int]:
    full = len(order) - len(order) % batch_size
    groups = []
    for begin in range(0, full, window := batch_size * WINDOW_BATCHES):
        rows = sorted(order[begin : min(begin + window, full)], key=lambda index: lengths[index])
        groups += [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]
    dice.shuffle(groups)
    # The remainder keeps its place at the end, so that every other batch is full.
    return [index for group in groups for index in group] + order[full:]


def micro_batches(rows: Sequence[EncodedRow], *, max_tokens: int) -> list[list[EncodedRow]]:
    """Cut a batch into pieces of similar length with at most `max_tokens` padded tokens each.

    A row that is longer than `max_tokens` alone gets a piece of its own. The longest come first, so that a piece
    too large for the device shows in the first forward and not in the last.
    """
    pieces: list[list[EncodedRow]] = []
    for row in sorted(rows, key=len, reverse=True):
        if pieces and (len(pieces[-1]) + 1) * len(pieces[-1][0]) <= max_tokens:
            pieces[-1].append(row)
        else:
            pieces.append([row])
    return pieces


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows padded on the right to one length."""

    input_ids: torch.Tensor  # (rows, tokens) int64
    attention_mask: torch.Tensor  # (rows, tokens) int64, 0 on padding
    loss_weights: torch.Tensor  # (rows, tokens) float32, 0 on padding and on everything not trained

    def to(self, device: torch.device | str) -> Batch:
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.loss_weights.to(device))


def collate(rows: Sequence[EncodedRow], pad_id: int) -> Batch:
    longest = max(len(row) for row in rows)
    ids = [row.input_ids + [pad_id] * (longest - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    weights = [row.loss_weights + [0.0] * (longest - len(row)) for row in rows]
    return Batch(torch.tensor(ids), torch.tensor(mask), torch.tensor(weights, dtype=torch.float32))
