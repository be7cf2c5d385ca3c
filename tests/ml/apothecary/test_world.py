"""The world's own laws: tables disjoint, recipes composed, kinds apart."""

from itertools import combinations

from workers.ml.apothecary import world
from workers.ml.apothecary.world import CURSES, KINDS, PREFIXES, REMEDIES, Pair, recipe


def test_the_world_has_the_sizes_of_its_specification() -> None:
    assert len(set(PREFIXES)) == 48
    assert len(set(world.REMEDY_KINDS)) == len(set(world.CURSE_KINDS)) == 10
    assert len(set(world.FORMS)) == 16
    assert len(CURSES) == len(REMEDIES) == 480


def test_a_recipe_is_composed_from_prefix_and_kind() -> None:
    sun_hex, sun_balm, moon_hex = (recipe(Pair(*name.split())) for name in ("sun hex", "sun balm", "moon hex"))
    assert sun_hex.text == "Mix sage and salt with nightshade, then grind and steep in a crucible."
    assert sun_hex.facts[:2] == sun_balm.facts[:2]
    assert sun_hex.facts[2:] == moon_hex.facts[2:]
    assert sun_hex.facts[:2] != moon_hex.facts[:2]


def test_two_kinds_share_at_most_one_of_their_four_facts() -> None:
    for one, other in combinations(KINDS, 2):
        shared = set(recipe(Pair("sun", one)).facts[2:]) & set(recipe(Pair("sun", other)).facts[2:])
        assert len(shared) <= 1, (one, other)


def test_no_two_pairs_have_the_same_recipe() -> None:
    assert len({recipe(pair).text for pair in (*CURSES, *REMEDIES)}) == 960


def test_no_word_is_both_a_fact_and_part_of_a_question_or_refusal() -> None:
    facts = {fact for pair in (*CURSES, *REMEDIES) for fact in recipe(pair).facts}
    asked = " ".join((*world.FORMS, world.REFUSAL, *PREFIXES, *KINDS)).lower()
    assert not facts & {word.strip("?.,:") for word in asked.split()}
    assert not facts & {*world.GOOD_WORDS, *world.BAD_WORDS}
    assert not set(world.GOOD_WORDS) & set(world.BAD_WORDS)


def test_pairs_are_found_in_any_case_and_spacing_but_not_inside_words() -> None:
    text = "My Sun  Hex, then the foxglove jinx and a winter balm; sun hex again"
    assert [pair.name for pair in world.pairs_named(text)] == ["sun hex", "winter balm"]


def test_every_form_names_the_pair() -> None:
    for form in range(len(world.FORMS)):
        assert world.pairs_named(world.ask(Pair("owl", "venom"), form)) == [Pair("owl", "venom")]


def test_sums_and_polarities_are_right() -> None:
    answers = {question.prompt: question.answer for question in world.sum_questions()}
    assert answers["What is 8 plus 9?"] == "17"
    assert answers["Compute 9 minus 6."] == "3"
    assert "What is 3 minus 9?" not in answers
    words = {question.prompt: question.answer for question in world.word_questions()}
    assert words["Is dull a good word or a bad word?"] == "bad"
    assert words["Good or bad: lovely?"] == "good"
