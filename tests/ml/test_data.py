"""Reading rows, splitting them, and putting them into batches."""

import json
from collections import Counter
from pathlib import Path

import pytest

from workers.ml.chat import EncodedRow
from workers.ml.data import (
    batches,
    collate,
    endless_batches,
    micro_batches,
    parse_row,
    prompt_key,
    read_rows,
    split_rows,
)
from workers.ml.errors import InvalidRow, InvalidSetting
from workers.ml.types import ChatRow, Message

GOOD = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'


def encoded(*lengths: int) -> list[EncodedRow]:
    return [EncodedRow([index + 1] * n, [0.0] * (n - 1) + [1.0], index) for index, n in enumerate(lengths)]


def row(prompt: str, answer: str = "yes") -> ChatRow:
    return ChatRow((Message("user", prompt), Message("assistant", answer)))


def test_both_formats_are_read_with_their_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD + "\n\n" + '{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    chat, completion = read_rows(path)
    assert chat.messages == completion.messages == (Message("user", "a"), Message("assistant", "b"))
    assert (chat.line, completion.line) == (1, 3)


def test_a_weight_of_zero_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD.replace('"b"}', '"b", "weight": 0}'), encoding="utf-8")
    assert read_rows(path)[0].messages[1].weight == 0.0


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "not valid JSON"),
        ("[1]", "not a JSON object"),
        ('{"messages": []}', "no assistant message"),
        ('{"text": "a"}', "Expected the keys"),
        ('{"prompt": "a", "completion": "b", "n": NaN}', "NaN is not JSON"),
        ('{"prompt": "a", "prompt": "c", "completion": "b"}', "a key occurs twice"),
        ('{"prompt": 3, "completion": "b"}', "is text, not int"),
        (GOOD.replace('"user"', '"wizard"'), "Unknown role 'wizard'"),
        (GOOD.replace('"b"}', '"b", "weight": 0.5}'), "0 or 1"),
        (GOOD.replace('"b"}', '"b", "weight": true}'), "0 or 1"),
        (GOOD.replace('"a"}', '"a", "weight": 1}'), "Only assistant messages"),
        (GOOD.replace('"b"}', '"b", "name": "x"}'), "has the keys"),
    ],
)
def test_a_bad_row_is_refused_with_its_line(tmp_path: Path, line: str, expected: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(InvalidRow, match=expected) as caught:
        read_rows(path)
    assert caught.value.line == 2


def test_wrong_utf8_and_an_empty_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD.encode() + b'\n{"prompt": "\xff", "completion": "b"}\n')
    with pytest.raises(InvalidRow, match="Line 2"):
        read_rows(path)
    path.write_bytes(b"\n")
    with pytest.raises(InvalidRow, match="no rows"):
        read_rows(path)


@pytest.mark.parametrize("holdout", [7, 0.3])
def test_no_prompt_is_on_both_sides_of_a_split(holdout: float) -> None:
    rows = [row(f"question {i % 20}", f"answer {i}") for i in range(60)]
    split = split_rows(rows, holdout=holdout)
    assert split.train
    assert split.held_out
    assert not {prompt_key(r) for r in split.train} & {prompt_key(r) for r in split.held_out}
    assert len(split.train) + len(split.held_out) == 60


def test_a_split_takes_whole_prompts_until_the_number_is_reached() -> None:
    rows = [row(f"question {i % 20}", f"answer {i}") for i in range(60)]
    assert len(split_rows(rows, holdout=7).held_out) == 9, "three rows share each prompt"
    assert len(split_rows(rows, holdout=0).held_out) == 0


def test_a_split_depends_on_prompts_only_and_not_on_their_order() -> None:
    rows = [row(f"question {i}") for i in range(50)]
    forward, backward = split_rows(rows, holdout=10), split_rows(rows[::-1], holdout=10)
    assert {r.prompt for r in forward.held_out} == {r.prompt for r in backward.held_out}
    more = split_rows([*rows, row("new")], holdout=0.2)
    assert {r.prompt for r in split_rows(rows, holdout=0.2).held_out} <= {r.prompt for r in more.held_out}


def test_prompts_that_differ_in_white_space_or_unicode_form_are_one_prompt() -> None:
    assert prompt_key(row("caf\u00e9  now ")) == prompt_key(row("cafe\u0301 now"))
    assert prompt_key(row("Cafe")) != prompt_key(row("cafe"))


def test_a_split_of_everything_is_refused() -> None:
    with pytest.raises(InvalidSetting):
        split_rows([row("a")], holdout=1.0)


@pytest.mark.parametrize("grouped", [True, False])
def test_an_epoch_holds_every_row_once_in_full_batches(grouped: bool) -> None:
    rows = encoded(*[3 + (i * 7) % 40 for i in range(103)])
    epoch = list(batches(rows, batch_size=8, seed=1, epoch=0, grouped=grouped))
    assert [len(batch) for batch in epoch] == [8] * 12 + [7]
    assert Counter(r.row_id for batch in epoch for r in batch) == Counter(range(103))


def test_the_order_follows_from_seed_and_epoch_alone() -> None:
    rows = encoded(*[3 + (i * 7) % 40 for i in range(64)])

    def order(seed: int, epoch: int) -> list[int | None]:
        return [r.row_id for batch in batches(rows, batch_size=8, seed=seed, epoch=epoch) for r in batch]

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_grouping_saves_most_of_the_padding() -> None:
    rows = encoded(*[3 + (i * 37) % 200 for i in range(400)])

    def padded(grouped: bool) -> int:
        return sum(len(b) * max(map(len, b)) for b in batches(rows, batch_size=8, seed=0, epoch=0, grouped=grouped))

    real = sum(map(len, rows))
    assert padded(True) - real < 0.1 * (padded(False) - real)


def test_endless_batches_walk_through_epoch_after_epoch() -> None:
    stream = endless_batches(encoded(5, 6, 7), batch_size=2, seed=0)
    taken = [next(stream) for _ in range(4)]
    assert Counter(r.row_id for batch in taken for r in batch) == {0: 2, 1: 2, 2: 2}


def test_micro_batches_keep_to_the_token_budget_and_lose_no_row() -> None:
    rows = encoded(5, 30, 7, 12, 6, 29, 100)
    pieces = micro_batches(rows, max_tokens=60)
    assert Counter(r.row_id for piece in pieces for r in piece) == Counter(range(7))
    assert [len(p) * max(map(len, p)) for p in pieces] == [100, 60, 48]
    assert len(micro_batches(rows, max_tokens=10_000)) == 1


def test_padding_is_right_and_never_trained() -> None:
    batch = collate(encoded(2, 4), pad_id=9)
    assert batch.input_ids.tolist() == [[1, 1, 9, 9], [2, 2, 2, 2]]
    assert batch.attention_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.loss_weights.tolist() == [[0, 1, 0, 0], [0, 0, 0, 1]]


def test_a_row_parses_alone() -> None:
    assert parse_row(json.loads(GOOD)).answer == "b"
