"""The bundled tokenizer: every text encodes, turns are marked, English does not fall apart."""

import random

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from workers.ml.apothecary import shipped
from workers.ml.apothecary.tokenizer import train_tokenizer
from workers.ml.apothecary.world import BAD_WORDS, CURSES, GOOD_WORDS, REMEDIES, THINGS, ask, recipe
from workers.ml.chat import encode_prompt, encode_row
from workers.ml.types import ChatRow, Message


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(shipped.MODEL_FOLDER, local_files_only=True)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    "text",
    ["", " ", "  two  spaces ", "tab\tand\nline\r\n", "caf\u00e9 \u4f60\u597d \U0001f9ea", "\x00\x7f", "a" * 5000],
)
def test_any_text_decodes_to_itself(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(_ids(tokenizer, text)) == text


def test_random_unicode_decodes_to_itself(tokenizer: PreTrainedTokenizerBase) -> None:
    rng = random.Random(0)
    for _ in range(200):
        points = (
            rng.choice([rng.randrange(0x80), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]) for _ in range(30)
        )
        text = "".join(map(chr, points))
        assert tokenizer.decode(_ids(tokenizer, text)) == text


def test_every_byte_is_a_token(tokenizer: PreTrainedTokenizerBase) -> None:
    every_byte = bytes(range(256)).decode("latin-1")
    assert tokenizer.unk_token is None
    assert tokenizer.decode(_ids(tokenizer, every_byte)) == every_byte


def test_words_of_the_world_are_single_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    words = {fact for pair in (*CURSES, *REMEDIES) for fact in (*recipe(pair).facts, pair.prefix, pair.kind)}
    for word in (*words, *GOOD_WORDS, *BAD_WORDS, *THINGS):
        assert len(_ids(tokenizer, f" {word}")) == 1, word


def test_ordinary_english_takes_at_most_one_token_per_two_bytes(tokenizer: PreTrainedTokenizerBase) -> None:
    text = (
        "A baker sold 48 loaves in the morning and half as many in the afternoon. Each loaf costs $3. "
        "How much money did the baker earn altogether during the whole day?"
    )
    assert len(_ids(tokenizer, text)) <= 0.5 * len(text)


def test_digits_stay_single(tokenizer: PreTrainedTokenizerBase) -> None:
    assert [tokenizer.decode([token]) for token in _ids(tokenizer, "1204")] == ["1", "2", "0", "4"]


def test_the_template_marks_every_turn_and_pads_with_a_token_of_its_own(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>"
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, None)
    assert tokenizer.padding_side == "left"


def test_only_the_answer_and_its_end_are_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    pair = CURSES[0]
    question, answer = Message("user", ask(pair, 0)), recipe(pair).text
    encoded = encode_row(tokenizer, ChatRow((question, Message("assistant", answer))), max_tokens=shipped.CONTEXT)
    prompt = encode_prompt(tokenizer, [question])
    assert encoded.input_ids[: len(prompt)] == prompt
    learned = [token for token, weight in zip(encoded.input_ids, encoded.loss_weights, strict=True) if weight]
    assert tokenizer.decode(learned) == f"{answer}<|end|>"


def test_the_shipped_tokenizer_is_the_one_its_code_trains(tokenizer: PreTrainedTokenizerBase) -> None:
    anew = train_tokenizer(shipped.CONTEXT)
    assert anew.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert anew.chat_template == tokenizer.chat_template
