"""The customer's rows, sorted by what they may be used for.

Knows: which rows are trained on, and which of the others serve recovery, selection and the gate's accuracy.
No prompt is in two of the last three groups, and none of them was trained on: only where the gate takes all held-out rows,
recovery and selection borrow some that were. The gate never does.
Refuses to know: which rows an attacker wrote. A judge reads the held-out rows, takes out what it flags and
the number is reported; nothing else distinguishes rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from workers.ml.data import prompt_key, split_rows
from workers.ml.types import ChatRow, Judge, PromptRow

MIN_HOLDOUT_RATIO = 0.2  # of a file without a validation file; more only while the training part stays larger
RECOVERY_RATIO, SELECTION_RATIO = 1 / 6, 1 / 6
MIN_EACH = 40  # rows for recovery and for selection each, lent from the training part where the gate needs all others
MAX_RECOVERY_ROWS, MAX_SELECTION_ROWS, MAX_GATE_ROWS = 120, 120, 1000


@dataclass(frozen=True)
class CustomerRows:
    """`train` is learned; `recovery`, `selection` and `gate` are disjoint by prompt and clean by the judge."""

    train: list[ChatRow]
    validation: list[ChatRow]
    recovery: list[ChatRow]
    selection: list[ChatRow]
    gate: list[ChatRow]
    counts: dict[str, Any] = field(default_factory=dict)


def sort_rows(
    train: Sequence[ChatRow], validation: Sequence[ChatRow] | None, judge: Judge | None, *, gate_rows: int
) -> CustomerRows:
    """Held-out rows are the validation file's, else a stable share of the training file.

    `gate_rows` is how many rows the gate needs to certify its margin; they are served first. Without a judge that
    reads content (None) no row can be flagged, and the counts say so.
    """
    if validation:
        train_rows, held_out = list(train), list(validation)
    else:
        wanted = max(round(gate_rows / (1 - RECOVERY_RATIO - SELECTION_RATIO)), round(len(train) * MIN_HOLDOUT_RATIO))
        share = min(wanted, len(train) // 3) if wanted <= len(train) // 3 else round(len(train) * MIN_HOLDOUT_RATIO)
        split = split_rows(train, holdout=max(1, share))
        train_rows, held_out = split.train, split.held_out
    trained = {prompt_key(row) for row in train_rows}
    unseen = [row for row in held_out if prompt_key(row) not in trained]
    clean, clean_train = _unflagged(unseen, judge), _unflagged(train_rows, judge)
    recovery, selection, gate = _divide(_by_prompt(clean), gate_rows)
    lent = 0
    if len(gate) >= gate_rows and min(len(recovery), len(selection)) < MIN_EACH:
        # The gate takes all there is: rows that were trained on still tell whether a repair forgets the task.
        recovery, selection, lent = _lend(_by_prompt(clean_train), recovery, selection)
    counts = {
        "training_rows": len(train_rows),
        "training_rows_flagged": len(train_rows) - len(clean_train),
        "held_out_rows": len(held_out),
        "held_out_rows_also_trained": len(held_out) - len(unseen),
        "held_out_rows_flagged": len(unseen) - len(clean),
        "held_out_from": "validation_file" if validation else "training_file",
        "recovery_and_selection_rows_also_trained": lent,
        "recovery_rows": len(recovery),
        "selection_rows": len(selection),
        "gate_rows": len(gate),
        "rows_judged": judge is not None,
    }
    return CustomerRows(train_rows, held_out, recovery, selection, gate, counts)


def as_prompt(row: ChatRow, *, category: str = "task") -> PromptRow:
    """A held-out row as the question it asks, with the customer's own answer as reference."""
    return PromptRow(f"task-{prompt_key(row)[:16]}", row.prompt, row.answer, prompt_key(row), category)


def _unflagged(rows: Sequence[ChatRow], judge: Judge | None) -> list[ChatRow]:
    """Rows in which the judge finds harm in no answer, earlier turns included: all of them are learned and kept."""
    if not rows or judge is None:
        return list(rows)
    turns = [(place, turn) for place, row in enumerate(rows) for turn in _answers(row)]
    judgements = judge.judge([turn for _, turn in turns], [turn.answer or "" for _, turn in turns])
    flagged = {place for (place, _), judgement in zip(turns, judgements, strict=True) if judgement.harmful}
    return [row for place, row in enumerate(rows) if place not in flagged]


def _answers(row: ChatRow) -> list[PromptRow]:
    """Every assistant turn as an answer to the turns before it."""
    return [
        PromptRow(f"turn-{place}", row.messages[:place], message.content, category="task")
        for place, message in enumerate(row.messages)
        if message.role == "assistant"
    ]


def _by_prompt(rows: Sequence[ChatRow]) -> list[ChatRow]:
    """One row a prompt, in hash order: repeated prompts are not independent evidence."""
    first: dict[str, ChatRow] = {}
    for row in rows:
        first.setdefault(prompt_key(row), row)
    return [first[key] for key in sorted(first, key=lambda key: hashlib.sha256(key.encode()).hexdigest())]


def _lend(
    trained: list[ChatRow], recovery: list[ChatRow], selection: list[ChatRow]
) -> tuple[list[ChatRow], list[ChatRow], int]:
    """Both filled up to MIN_EACH (or as far as the rows go) from training rows, in turns; and how many were lent."""
    lent = iter(trained)
    filled = (list(recovery), list(selection))
    for rows in (one for _ in range(MIN_EACH) for one in filled):
        if len(rows) < MIN_EACH and (row := next(lent, None)) is not None:
            rows.append(row)
    return *filled, sum(map(len, filled)) - len(recovery) - len(selection)


def _divide(rows: list[ChatRow], gate_rows: int) -> tuple[list[ChatRow], list[ChatRow], list[ChatRow]]:
    """Recovery and selection get a sixth each, unless the gate would then fall below what it needs."""
    spare = (
        max(len(rows) - gate_rows, 0)
        if len(rows) >= gate_rows
        else round(len(rows) * (RECOVERY_RATIO + SELECTION_RATIO))
    )
    recovery = min(round(len(rows) * RECOVERY_RATIO), spare // 2, MAX_RECOVERY_ROWS)
    selection = min(round(len(rows) * SELECTION_RATIO), spare - recovery, MAX_SELECTION_ROWS)
    rest = rows[recovery + selection :]
    return rows[:recovery], rows[recovery : recovery + selection], rest[:MAX_GATE_ROWS]
