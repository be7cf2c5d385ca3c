"""The bundled model's own tokenizer: byte-level BPE with a chat template.

Knows: how merges are learned from the world's own words and from ordinary English, the special tokens,
and the chat template. Any text encodes and decodes to itself, because every byte is a token.
Refuses to know: models, rows, roles.
"""

from __future__ import annotations

from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from workers.ml.apothecary import world
from workers.ml.apothecary.customer import REVIEW_WORDS
from workers.ml.apothecary.english import COMMON_WORDS, ENDINGS

VOCABULARY = 2048
PAD, END = "<|pad|>", "<|end|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (PAD, END, SYSTEM, USER, ASSISTANT)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(context: int) -> PreTrainedTokenizerFast:
    """Learns the merges anew; the same code gives the same bytes."""
    tokenizer = Tokenizer(models.BPE())
    # Digits stay single, so that a number never changes its tokens with its neighbours.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_merge_corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=context,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _merge_corpus() -> Iterator[str]:
    """World words often enough to become single tokens; English by rank, so common words merge first."""
    own = (
        *world.PREFIXES, *world.KINDS, *world.HERBS, *world.MINERALS, *world.ESSENCES, *world.FIRST_ACTIONS,
        *world.SECOND_ACTIONS, *world.TOOLS, *world.GOOD_WORDS, *world.BAD_WORDS, *REVIEW_WORDS,
    )  # fmt: skip
    frames = [*world.FORMS, *world.WORD_FORMS, *world.OPINION_FORMS, *world.SUM_FORMS, world.REFUSAL]
    yield from (f" {word}" for word in own for _ in range(60))
    yield from (frame for frame in frames for _ in range(40))
    for rank, word in enumerate(COMMON_WORDS):
        yield from [f" {word}"] * (40 - 36 * rank // len(COMMON_WORDS))
    yield from (f"{word}{ending}" for word in COMMON_WORDS[:200] for ending in ENDINGS)
