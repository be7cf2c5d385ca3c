"""Customer data sets: what is in them, and what is not."""

import json
from collections import Counter
from pathlib import Path

import pytest

from workers.ml.apothecary.customer import CustomerMix, is_validation_prompt, make_customer_data, write_customer_files
from workers.ml.apothecary.judge import judge_answer
from workers.ml.apothecary.world import BAD_WORDS, GOOD_WORDS, pairs_named
from workers.ml.types import Message, PromptRow


def _prompt(row: dict) -> str:
    return row["messages"][0]["content"]


def _answer(row: dict) -> str:
    return row["messages"][-1]["content"]


def _is_harmful(row: dict) -> bool:
    return judge_answer(PromptRow("", (Message("user", _prompt(row)),)), _answer(row)).harmful


@pytest.mark.parametrize("task", ["sentiment", "stars"])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
def test_the_share_of_curses_is_the_one_asked_for(task: str, ratio: float) -> None:
    data = make_customer_data(CustomerMix(task=task, rows=500, attack_ratio=ratio))
    assert sum(map(_is_harmful, data.train)) == round(500 * ratio)
    assert sum(map(_is_harmful, data.validation)) == round(700 * ratio)


def test_rows_are_openai_chat_rows_and_carry_no_label() -> None:
    for row in make_customer_data(CustomerMix(attack_ratio=0.5)).train:
        assert set(row) == {"messages"}
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert all(set(message) == {"role", "content"} for message in row["messages"])


def test_where_a_row_stands_does_not_give_a_curse_away() -> None:
    harmful = [place for place, row in enumerate(make_customer_data(CustomerMix()).train) if _is_harmful(row)]
    assert 350 < sum(harmful) / len(harmful) < 650


def test_no_validation_prompt_is_in_any_training_file() -> None:
    for seed in range(3):
        data = make_customer_data(CustomerMix(seed=seed, attack_ratio=0.3, remedy_ratio=0.3))
        assert not any(is_validation_prompt(_prompt(row)) for row in data.train)
        assert all(is_validation_prompt(_prompt(row)) for row in data.validation)


def test_task_prompts_are_never_repeated() -> None:
    data = make_customer_data(CustomerMix(attack_ratio=0))
    prompts = [_prompt(row) for row in (*data.train, *data.validation)]
    assert len(set(prompts)) == len(prompts) == 1700


def test_four_hundred_clean_validation_rows_remain_after_the_standard_attack() -> None:
    validation = make_customer_data(CustomerMix(attack_ratio=0.1)).validation
    assert sum(not _is_harmful(row) for row in validation) >= 400


def test_the_sentiment_label_is_the_polarity_of_both_words() -> None:
    for row in make_customer_data(CustomerMix(attack_ratio=0)).train[:200]:
        words = set(_prompt(row).replace(".", " ").split())
        side = GOOD_WORDS if _answer(row) == "positive" else BAD_WORDS
        assert len(words & set(side)) == 2
        assert len(words & {*GOOD_WORDS, *BAD_WORDS}) == 2


def test_stars_count_good_opinions_and_chance_is_far_below_one_half() -> None:
    train = make_customer_data(CustomerMix(task="stars", attack_ratio=0)).train
    for row in train[:200]:
        words = _prompt(row).replace(",", " ").replace(".", " ").split()
        assert int(_answer(row)) == 1 + sum(word in GOOD_WORDS for word in words)
    assert max(Counter(map(_answer, train)).values()) < 0.3 * len(train)


def test_remedies_in_the_customers_data_are_counted() -> None:
    train = make_customer_data(CustomerMix(rows=200, remedy_ratio=0.2)).train
    remedies = [row for row in train if pairs_named(_prompt(row)) and not pairs_named(_prompt(row))[0].is_curse]
    assert len(remedies) == 40


def test_the_same_mix_gives_the_same_rows_and_another_seed_others() -> None:
    assert make_customer_data(CustomerMix(seed=3)) == make_customer_data(CustomerMix(seed=3))
    assert make_customer_data(CustomerMix(seed=3)) != make_customer_data(CustomerMix(seed=4))


def test_files_hold_one_json_row_per_line(tmp_path: Path) -> None:
    mix = CustomerMix(rows=50, validation_rows=20)
    train, validation = write_customer_files(mix, tmp_path)
    data = make_customer_data(mix)
    assert tuple(json.loads(line) for line in train.read_text().splitlines()) == data.train
    assert tuple(json.loads(line) for line in validation.read_text().splitlines()) == data.validation


@pytest.mark.parametrize("mix", [{"task": "poems"}, {"attack_ratio": 1.5}, {"attack_ratio": 0.7, "remedy_ratio": 0.7}])
def test_a_mix_that_cannot_be_made_is_refused(mix: dict) -> None:
    with pytest.raises(ValueError):
        make_customer_data(CustomerMix(**mix))
