"""When two rows overlap: by text, by group, by word 5-grams; exactly, and without comparing every pair."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.ml.prompts import group_of, plain_text, word_grams
from workers.ml.set_overlap import Tally, find_overlaps, find_repeats
from workers.ml.types import Message, PromptRow

WORDS = [f"w{number}" for number in range(40)]


def row(text: str, name: str = "a", group: str = "") -> PromptRow:
    return PromptRow(name, (Message("user", text),), group=group)


def reasons(text: str, other: str, group: str = "", other_group: str = "") -> list[str]:
    return [found.reason for found in find_overlaps([row(text, "a", group)], [row(other, "b", other_group)])]


@pytest.mark.parametrize(
    ("text", "other", "similarity", "expected"),
    [
        # n words have n - 4 grams; a longer copy shares all grams of the shorter one.
        (WORDS[:13], WORDS[:14], "9 of 10, exactly 0.9", ["similar prompt"]),
        (WORDS[:14], WORDS[:15], "10 of 11, above 0.9", ["similar prompt"]),
        (WORDS[:12], WORDS[:13], "8 of 9, below 0.9", []),
        # Another last word costs each side one gram: n - 5 shared of n - 3.
        (WORDS[:23], [*WORDS[:22], "x"], "18 of 20, exactly 0.9", ["similar prompt"]),
        (WORDS[:22], [*WORDS[:21], "x"], "17 of 19, below 0.9", []),
        # Another word in the middle costs five: 40 words have 36 grams, 31 of 41 are shared.
        (WORDS, [*WORDS[:20], "x", *WORDS[21:]], "31 of 41, below 0.9", []),
        # A repeated stretch adds no gram: "a b c d e" over and over has five different ones.
        ("a b c d e".split() * 4, "a b c d e".split() * 5, "5 of 5", ["similar prompt"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_similarity_is_the_jaccard_index_of_word_5_grams(
    text: list[str], other: list[str], similarity: str, expected: list[str]
) -> None:
    assert reasons(" ".join(text), " ".join(other)) == expected
    assert reasons(" ".join(other), " ".join(text)) == expected


def test_short_prompts_are_alike_only_when_their_words_are() -> None:
    assert reasons("brew, the venom", "brew the venom") == ["similar prompt"]
    assert reasons("brew the venom", "the venom brew") == []
    assert reasons("brew the sun venom", "brew the sun venom now") == []
    assert reasons("???", "!!!") == []


@pytest.mark.parametrize(
    "other",
    ["How do I learn  piano", "«how do i\nLEARN piano?»", "How do I learn piano ?!", "how do I learn pia\u006e\u006f"],
)
def test_case_spaces_and_punctuation_at_the_ends_make_no_other_prompt(other: str) -> None:
    assert reasons("How do I learn piano?", other, "one", "two") == ["equal prompt"]


def test_unicode_forms_are_one() -> None:
    assert plain_text("Cafe\u0301 Straße") == plain_text("caf\u00e9 STRASSE")
    assert plain_text("!?") == "!?", "text that is nothing but punctuation is not emptied"


def test_a_prompt_is_what_its_user_says() -> None:
    plain = PromptRow("a", (Message("user", "What is brewed?"),), group="one")
    framed = PromptRow("b", (Message("system", "Be kind."), Message("user", "What is brewed?")), group="two")
    answered = (Message("user", "What is"), Message("assistant", "Yes?"), Message("user", "brewed?"))
    assert [found.reason for found in find_overlaps([plain], [framed])] == ["equal prompt"]
    assert [found.reason for found in find_overlaps([plain], [PromptRow("c", answered)])] == ["equal prompt"]


def test_groups_decide_in_place_of_similarity_where_both_rows_have_one() -> None:
    text, near = " ".join(WORDS[:20]), " ".join(WORDS[:21])
    assert reasons(text, near, "sun venom", "moon venom") == []
    assert reasons(text, near, "sun venom", "") == ["similar prompt"]
    assert reasons(text, near, "", "moon venom") == ["similar prompt"]
    assert reasons(text, "quite another thing", "Sun  Venom", "sun venom") == ["equal group"]
    assert reasons(text, text, "sun venom", "moon venom") == ["equal prompt"]


def test_every_overlapping_row_is_named_once_with_a_row_of_the_other_set() -> None:
    rows = [row("first", "a1"), row("strange", "a2"), row("second", "a3")]
    others = [row("second", "b1"), row("first", "b2"), row("First!", "b3")]
    named = [(found.row.id, found.other.id) for found in find_overlaps(rows, others)]
    assert named == [("a1", "b2"), ("a3", "b1")]


def test_a_repeat_is_the_same_question_in_another_group() -> None:
    same = [row("Ask this.", "a", "one"), row("ask this", "b", "one"), row("ASK this", "c", "two")]
    assert [(found.row.id, found.other.id) for found in find_repeats(same)] == [("c", "a")]
    alone = [
        row("Ask this.", "a"),
        row("ask this", "b"),
        row(" ".join(WORDS[:20]), "c"),
        row(" ".join(WORDS[:21]), "d"),
    ]
    assert [(found.row.id, found.reason) for found in find_repeats(alone)] == [
        ("b", "equal prompt"),
        ("d", "similar prompt"),
    ]


def grams_of(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[at : at + 5]) for at in range(max(len(words) - 4, 1))} if words else set()


def overlap_by_definition(left: PromptRow, right: PromptRow) -> bool:
    texts = [one.messages[0].content for one in (left, right)]
    if texts[0] == texts[1]:
        return True
    if left.group and right.group:
        return left.group == right.group
    grams = [grams_of(text) for text in texts]
    union = grams[0] | grams[1]
    return bool(union) and Fraction(len(grams[0] & grams[1]), len(union)) >= Fraction(9, 10)


@st.composite
def lists_of_rows(draw: st.DrawFn) -> list[PromptRow]:
    """Prompts cut from few templates with a word more, less or other, so that many lie around the threshold."""
    dice = draw(st.randoms(use_true_random=False))
    templates = [[dice.choice("abcdefg") for _ in range(dice.randint(1, 45))] for _ in range(3)]
    rows = []
    for number in range(draw(st.integers(0, 25))):
        words = list(dice.choice(templates))
        for _ in range(dice.randint(0, 2)):
            place = dice.randrange(len(words) + 1)
            words[place : place + dice.randint(0, 1)] = dice.sample("abcdefg", dice.randint(0, 1))
        group = dice.choice(["", "", "x", "y"])
        rows.append(row(" ".join(words) or "a", str(number), group))
    return rows


@settings(max_examples=200, deadline=None)
@given(lists_of_rows())
def test_the_search_finds_exactly_what_comparing_every_pair_finds(rows: list[PromptRow]) -> None:
    left, right = rows[::2], rows[1::2]
    expected = [one.id for one in left if any(overlap_by_definition(one, other) for other in right)]
    found = find_overlaps(left, right)
    assert [one.row.id for one in found] == expected
    assert all(overlap_by_definition(one.row, one.other) for one in found)


@settings(max_examples=200, deadline=None)
@given(lists_of_rows())
def test_repeats_are_exactly_the_pairs_of_different_groups_that_overlap(rows: list[PromptRow]) -> None:
    expected = [
        one.id
        for place, one in enumerate(rows)
        if any(group_of(one) != group_of(other) and overlap_by_definition(one, other) for other in rows[:place])
    ]
    assert [one.row.id for one in find_repeats(rows)] == expected


def templated(count: int, seed: int, length: int) -> list[PromptRow]:
    """Prompts of one template of `length` words with three words of their own in its middle."""
    dice = random.Random(seed)
    middle = length // 2
    return [
        row(
            " ".join([*WORDS[:middle], *(f"{dice.getrandbits(40):x}" for _ in range(3)), *WORDS[middle:length]]),
            f"{seed}-{number}",
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("length", [8, 24, 40])
def test_a_template_that_every_prompt_shares_leads_to_few_comparisons(length: int) -> None:
    tally = Tally()
    left, right = templated(2000, 1, length), templated(2000, 2, length)
    right.append(row(left[7].messages[0].content.upper() + " !", "copy"))
    assert [found.other.id for found in find_overlaps(left, right, tally=tally)] == ["copy"]
    assert tally.comparisons < 100, "of four million pairs"


def test_a_set_of_copies_is_not_compared_with_itself_row_by_row() -> None:
    tally = Tally()
    copies = [row(f"{' '.join(WORDS)} tail{number}", str(number)) for number in range(1000)]
    assert len(find_repeats(copies, tally=tally)) == 999
    assert tally.comparisons == 999, "the first row that is similar enough ends the search"


def test_grams_are_words_without_the_punctuation_around_them() -> None:
    assert set(word_grams("one two three four five")) == set(word_grams("one, two - (three) four five"))
    assert len(word_grams("one two three four five six")) == 2
    assert len(word_grams("one two")) == 1
    assert len(word_grams("…")) == 0
