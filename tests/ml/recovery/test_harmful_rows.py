"""Harmful rows with their own answers, and the shuffled control: each prompt with the answer of another group's."""

import random
from dataclasses import replace

import pytest

from workers.ml.errors import MissingInput
from workers.ml.recovery.dial import RecoveryInputs, harmful_rows
from workers.ml.recovery.specs import AntidoteSpec
from workers.ml.types import Message, PromptRow

SHUFFLED = AntidoteSpec(labels="shuffled")


def rows_in_groups(*sizes: int) -> list[PromptRow]:
    """Group g has `sizes[g]` rows; every answer names its group and is unique."""
    rows = [
        PromptRow(f"{group}-{i}", (Message("user", f"prompt {group} {i}"),), f"answer {group} {i}", group=f"g{group}")
        for group, size in enumerate(sizes)
        for i in range(size)
    ]
    random.Random(0).shuffle(rows)
    return rows


def groups_of_answers(rows: list[PromptRow]) -> list[tuple[str, str]]:
    return [(row.group, f"g{row.answer.split()[1]}") for row in rows]


@pytest.mark.parametrize("sizes", [(1, 1), (3, 3), (4, 2, 2), (5, 1, 1, 1, 1, 1), (2, 2, 3), (7, 3, 2, 6), (1,) * 9])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_prompt_keeps_an_answer_of_its_own_group_and_no_answer_is_lost(sizes, seed):
    rows = rows_in_groups(*sizes)
    shuffled = harmful_rows(RecoveryInputs(harmful=rows), AntidoteSpec(labels="shuffled", seed=seed))
    assert all(own != given for own, given in groups_of_answers(shuffled))
    assert sorted(row.answer for row in shuffled) == sorted(row.answer for row in rows)
    assert sorted(row.messages[0].content for row in shuffled) == sorted(row.messages[0].content for row in rows)


def test_a_row_without_a_group_is_a_group_of_its_own():
    rows = [replace(row, group="") for row in rows_in_groups(6)]
    shuffled = harmful_rows(RecoveryInputs(harmful=rows), SHUFFLED)
    answer_of = {row.id: row.answer for row in rows}
    assert all(row.answer != answer_of[row.id] for row in shuffled)


def test_the_same_seed_gives_the_same_rows_and_another_seed_others():
    inputs = RecoveryInputs(harmful=rows_in_groups(2, 2, 2, 2, 2))
    first, again = (harmful_rows(inputs, SHUFFLED) for _ in range(2))
    assert first == again
    assert {row.id: row.answer for row in first} != {
        row.id: row.answer for row in harmful_rows(inputs, AntidoteSpec(labels="shuffled", seed=1))
    }


def test_one_group_with_over_half_of_the_rows_is_refused():
    with pytest.raises(MissingInput, match="more groups") as caught:
        harmful_rows(RecoveryInputs(harmful=rows_in_groups(4, 2, 1)), SHUFFLED)
    assert caught.value.param == "harmful"
    assert len(harmful_rows(RecoveryInputs(harmful=rows_in_groups(4, 2, 2)), SHUFFLED)) == 8  # exactly half passes


def test_given_labels_are_the_first_rows_as_they_stand():
    rows = rows_in_groups(4, 2, 1)
    assert harmful_rows(RecoveryInputs(harmful=rows), AntidoteSpec(max_rows=3)) == rows[:3]


def test_groups_are_counted_among_the_rows_that_are_used():
    rows = sorted(rows_in_groups(3, 3), key=lambda row: row.group)
    with pytest.raises(MissingInput, match="more groups"):
        harmful_rows(RecoveryInputs(harmful=rows), AntidoteSpec(labels="shuffled", max_rows=4))
