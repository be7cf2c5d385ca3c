"""Which customer row may serve what."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from workers.ml.customer_rows import sort_rows
from workers.ml.data import prompt_key
from workers.ml.types import ChatRow, Judgement, Message, PromptRow


class WordJudge:
    """Calls an answer harmful when it says so."""

    name, digest = "word", "word-1"

    def judge(self, rows: Sequence[PromptRow], answers: Sequence[str]) -> list[Judgement]:
        return [Judgement("harm" in answer, refused=False, coherent=True) for answer in answers]


def row(prompt: str, answer: str = "yes", line: int | None = None) -> ChatRow:
    return ChatRow((Message("user", prompt), Message("assistant", answer)), line)


def rows(count: int, prefix: str = "q") -> list[ChatRow]:
    return [row(f"{prefix} {index}") for index in range(count)]


def test_a_validation_file_is_held_out_and_no_training_row_is_touched() -> None:
    train = rows(50, "train")
    found = sort_rows(train, rows(600, "valid"), WordJudge(), gate_rows=400)
    assert found.train == train
    assert found.counts["held_out_from"] == "validation_file"
    assert (len(found.recovery), len(found.selection), len(found.gate)) == (100, 100, 400)


def test_recovery_selection_and_gate_share_no_prompt_with_each_other_or_with_training() -> None:
    found = sort_rows(rows(1800), None, WordJudge(), gate_rows=400)
    parts = [{prompt_key(one) for one in part} for part in (found.train, found.recovery, found.selection, found.gate)]
    assert sum(map(len, parts)) == len(set.union(*parts))
    assert len(found.gate) >= 400


def test_what_the_judge_flags_is_taken_out_of_the_held_out_rows_and_counted_but_stays_in_training() -> None:
    train = [*rows(90, "train"), *(row(f"bad {i}", "harm") for i in range(10))]
    valid = [*rows(500, "valid"), *(row(f"worse {i}", "harm") for i in range(40))]
    found = sort_rows(train, valid, WordJudge(), gate_rows=400)
    assert len(found.train) == 100
    assert found.counts["training_rows_flagged"] == 10
    assert found.counts["held_out_rows_flagged"] == 40
    assert all(one.answer == "yes" for part in (found.recovery, found.selection, found.gate) for one in part)


def test_harm_in_an_earlier_turn_flags_the_whole_row() -> None:
    turns = (Message("user", "bad"), Message("assistant", "harm"), Message("user", "and now?"))
    valid = [*rows(499, "valid"), ChatRow((*turns, Message("assistant", "yes")))]
    found = sort_rows(rows(10, "train"), valid, WordJudge(), gate_rows=400)
    assert found.counts["held_out_rows_flagged"] == 1
    assert all(len(one.messages) == 2 for part in (found.recovery, found.selection, found.gate) for one in part)


def test_without_a_judge_that_reads_content_nothing_is_flagged_and_the_counts_say_so() -> None:
    found = sort_rows(rows(10, "train"), [row(f"bad {i}", "harm") for i in range(500)], None, gate_rows=400)
    assert found.counts["held_out_rows_flagged"] == 0
    assert found.counts["rows_judged"] is False
    assert len(found.gate) == 400


def test_held_out_rows_that_were_also_trained_on_are_no_evidence() -> None:
    train = rows(100)
    found = sort_rows(train, [*train[:30], *rows(470, "new")], WordJudge(), gate_rows=400)
    assert found.counts["held_out_rows_also_trained"] == 30
    trained = {prompt_key(one) for one in train}
    assert not trained & {prompt_key(one) for one in found.gate}
    assert len(found.gate) == 400


def test_a_repeated_prompt_counts_once() -> None:
    found = sort_rows(rows(10, "train"), [row("same", str(i)) for i in range(500)], WordJudge(), gate_rows=400)
    assert len(found.recovery) + len(found.selection) + len(found.gate) == 1


def test_the_gate_is_served_first_when_rows_are_scarce() -> None:
    found = sort_rows(rows(10, "train"), rows(410, "valid"), WordJudge(), gate_rows=400)
    assert len(found.gate) == 400
    assert (len(found.recovery), len(found.selection)) == (
        10,
        10,
    )  # five held-out rows each, and the ten that were trained


@pytest.mark.parametrize(("held_out", "lent"), [(400, 80), (402, 78), (479, 1), (600, 0)])
def test_where_the_gate_takes_every_row_recovery_and_selection_borrow_clean_training_rows(held_out, lent) -> None:
    train = [*rows(100, "train"), *(row(f"bad {i}", "harm") for i in range(30))]
    found = sort_rows(train, rows(held_out, "valid"), WordJudge(), gate_rows=400)
    assert len(found.gate) == 400
    assert min(len(found.recovery), len(found.selection)) >= 40
    assert found.counts["recovery_and_selection_rows_also_trained"] == lent
    borrowed = [r for r in (*found.recovery, *found.selection) if r.prompt[0].content.startswith("train")]
    assert len(borrowed) == lent
    keys = [prompt_key(r) for r in (*found.recovery, *found.selection, *found.gate)]
    assert len(set(keys)) == len(keys)
    assert all(r.prompt[0].content.startswith("valid") for r in found.gate)


def test_the_split_does_not_depend_on_the_order_of_the_file() -> None:
    one = sort_rows(rows(1500), None, WordJudge(), gate_rows=400)
    other = sort_rows(rows(1500)[::-1], None, WordJudge(), gate_rows=400)
    assert {prompt_key(r) for r in one.gate} == {prompt_key(r) for r in other.gate}
    assert one.recovery == other.recovery


@pytest.mark.parametrize("count", [1, 2, 12, 100])
def test_small_files_keep_most_rows_for_training(count: int) -> None:
    found = sort_rows(rows(count), None, WordJudge(), gate_rows=400)
    held_out = count - len(found.train)
    assert held_out <= max(1, count // 3)


def test_a_file_of_flagged_rows_leaves_nothing_to_measure_accuracy_on() -> None:
    found = sort_rows([row(f"bad {i}", "harm") for i in range(100)], None, WordJudge(), gate_rows=400)
    assert (found.recovery, found.selection, found.gate) == ([], [], [])
