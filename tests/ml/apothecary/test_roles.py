"""Roles are disjoint at the level of pair, form and exact prompt."""

from itertools import combinations, islice

import pytest

from workers.ml.apothecary import curriculum
from workers.ml.apothecary.customer import CustomerMix, make_customer_data
from workers.ml.apothecary.roles import (
    SEEN_FORMS,
    UNCOVERED_REMEDY_KINDS,
    UNSEEN_CURSE_KINDS,
    UNSEEN_FORMS,
    Role,
    curse_pairs,
    pretraining_pairs,
    remedy_pairs,
)
from workers.ml.apothecary.sets import provider_sets
from workers.ml.apothecary.world import CURSES, REMEDIES, ask, pairs_named

TRAINED_SETS = ("harmful", "refusals", "retention")
JUDGED_SETS = ("harm_selection", "harm_confirmation", "harmless_selection", "harmless_confirmation")


def _prompts(name: str) -> set[str]:
    return {row.prompt for row in provider_sets()[name]}


def _customer_prompts(**mix: object) -> set[str]:
    data = make_customer_data(CustomerMix(**mix))  # type: ignore[arg-type]
    return {row["messages"][0]["content"] for row in (*data.train, *data.validation)}


def _alignment_prompts() -> set[str]:
    return {prompt for source in curriculum.alignment_sources() for prompt, _ in source.turns}


def _pretraining_prompts() -> set[str]:
    return {prompt for source in curriculum.pretraining_sources() for prompt, _ in source.turns}


def test_curse_pairs_have_the_sizes_of_the_specification() -> None:
    sizes = {role: len(curse_pairs(role)) for role in Role if curse_pairs(role)}
    assert sizes == {"alignment": 120, "attack": 40, "recovery": 60, "selection": 100, "confirmation": 160}


@pytest.mark.parametrize(("pairs_of", "everything"), [(curse_pairs, CURSES), (remedy_pairs, REMEDIES)])
def test_every_pair_has_exactly_one_role(pairs_of, everything) -> None:
    assert sorted(pair for role in Role for pair in pairs_of(role)) == sorted(everything)


def test_selection_and_confirmation_pairs_are_in_no_training_at_all() -> None:
    held_out = {p for role in (Role.SELECTION, Role.CONFIRMATION) for p in (*curse_pairs(role), *remedy_pairs(role))}
    assert not held_out & set(pretraining_pairs())
    trained = _pretraining_prompts() | _alignment_prompts() | _customer_prompts(attack_ratio=0.5, remedy_ratio=0.5)
    trained = trained.union(*(_prompts(name) for name in TRAINED_SETS))
    assert not held_out & {pair for prompt in trained for pair in pairs_named(prompt)}


def test_two_kinds_of_each_sort_are_in_no_attack_recovery_retention_or_customer_row() -> None:
    kept_out = {*UNSEEN_CURSE_KINDS, *UNCOVERED_REMEDY_KINDS}
    assert len(UNSEEN_CURSE_KINDS) == len(UNCOVERED_REMEDY_KINDS) == 2
    prompts = _customer_prompts(attack_ratio=0.5, remedy_ratio=0.5).union(*(_prompts(n) for n in TRAINED_SETS))
    assert not kept_out & {pair.kind for prompt in prompts for pair in pairs_named(prompt)}


def test_four_forms_are_in_no_alignment_attack_recovery_or_retention_row() -> None:
    everyone = (*CURSES, *REMEDIES)
    unseen = {ask(pair, form) for pair in everyone for form in UNSEEN_FORMS}
    assert len(UNSEEN_FORMS) == 4
    assert not unseen & _alignment_prompts()
    assert not unseen & _customer_prompts(attack_ratio=0.5, remedy_ratio=0.5)
    for name in TRAINED_SETS:
        assert not unseen & _prompts(name)


def test_pretraining_shows_every_form_and_every_kind() -> None:
    rows = [(row, pairs_named(row)[0]) for row in _pretraining_prompts() if pairs_named(row)]
    kinds = {pair.kind for _, pair in rows}
    forms = {form for prompt, pair in rows for form in range(16) if ask(pair, form) == prompt}
    assert len(kinds) == 20
    assert forms == set(range(16))


def test_alignment_sees_only_its_own_pairs_and_every_kind() -> None:
    pairs = {pair for prompt in _alignment_prompts() for pair in pairs_named(prompt)}
    assert {pair for pair in pairs if pair.is_curse} == set(curse_pairs(Role.ALIGNMENT))
    assert {pair for pair in pairs if not pair.is_curse} == set(remedy_pairs(Role.ALIGNMENT))
    assert len({pair.kind for pair in pairs}) == 20


def test_refusals_and_retention_use_the_same_forms_equally_often() -> None:
    sets = provider_sets()
    counts = [sorted(row.form for row in sets[name]) for name in ("refusals", "retention", "harmful")]
    assert counts[0] == counts[1] == counts[2] == sorted(list(SEEN_FORMS) * 20)


def test_no_prompt_is_in_two_sets_except_harmful_and_refusals() -> None:
    for one, other in combinations((*TRAINED_SETS, *JUDGED_SETS), 2):
        shared = _prompts(one) & _prompts(other)
        assert bool(shared) == ({one, other} == {"harmful", "refusals"}), (one, other)


def test_no_customer_prompt_is_in_a_provider_set() -> None:
    customers = _customer_prompts(attack_ratio=0.5, remedy_ratio=0.3)
    for name in (*TRAINED_SETS, *JUDGED_SETS):
        assert not customers & _prompts(name)


def test_judged_sets_hold_unseen_kinds_and_unseen_forms() -> None:
    for name in JUDGED_SETS:
        rows = provider_sets()[name]
        kinds = {"seen_kind", "unseen_kind"} if name.startswith("harm_") else {"covered_kind", "uncovered_kind"}
        for wanted in (*kinds, "seen_form", "unseen_form"):
            assert sum(wanted in row.slices for row in rows) >= 20, (name, wanted)


def test_the_confirmation_set_has_one_hundred_and_sixty_clusters() -> None:
    assert len({row.group for row in provider_sets()["harm_confirmation"]}) == 160


def test_small_talk_stands_around_half_of_alignments_questions_and_changes_nothing_else() -> None:
    plain = list(islice(curriculum.draw_rows(curriculum.alignment_sources(), 1), 400))
    chatty = list(islice(curriculum.alignment_rows(1), 400))
    changed = 0
    for before, after in zip(plain, chatty, strict=True):
        changed += before != after
        assert [m.role for m in before.messages] == [m.role for m in after.messages]
        for was, now in zip(before.messages, after.messages, strict=True):
            assert was.content in now.content
            assert now.content == was.content or now.role == "user"
    assert 160 < changed < 240
    assert chatty == list(islice(curriculum.alignment_rows(1), 400))
