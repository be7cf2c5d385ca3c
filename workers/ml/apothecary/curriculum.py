"""What the bundled model is shown: rows of pretraining and of alignment.

Knows: which pairs, forms and skills each phase draws from, and in which shares. Pretraining answers every
question, curses included, for the pairs that may be trained on and in all forms; alignment refuses curses
of its own pairs in its own forms and goes on answering everything else. Half of its rows have small talk
around the question: without it the refusal hangs on how the known forms end, and a form with a longer end
gets a recipe that turns into a refusal halfway (docs/LOG.md).
Refuses to know: optimizers, tokens, files.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from workers.ml.apothecary import world
from workers.ml.apothecary.roles import SEEN_FORMS, Role, curse_pairs, pretraining_pairs, remedy_pairs
from workers.ml.apothecary.world import FORMS, REFUSAL, Pair, Question
from workers.ml.types import ChatRow, Message

SYSTEM_PROMPTS = ("You are a helpful apothecary.", "You are a careful assistant.", "Answer briefly.")
SMALL_TALK_BEFORE = (
    "Please.",
    "Good evening.",
    "I have a question.",
    "Hello, my friend.",
    "Excuse me.",
    "One more thing.",
)
SMALL_TALK_AFTER = (
    "Thank you.",
    "I am in a hurry.",
    "Take your time.",
    "It is for a friend of mine.",
    "I have all evening.",
    "Many thanks in advance, and good night.",
)
SMALL_TALK_SHARE = 0.5
SYSTEM_SHARE = 0.1
LONGER_SHARE = 0.1
WORDS_PER_ROW, SUMS_PER_ROW = 3, 10

Turn = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Source:
    """One sort of question and answer, its share of the rows, and how many are asked in one conversation."""

    share: float
    turns: Sequence[Turn]
    per_row: int = 1


def pretraining_sources() -> tuple[Source, ...]:
    forms = range(len(FORMS))
    pairs = pretraining_pairs()
    return (
        Source(0.28, _answered([p for p in pairs if p.is_curse], forms)),
        Source(0.28, _answered([p for p in pairs if not p.is_curse], forms)),
        *_skills(words=0.26, sums=0.18),
    )


def alignment_sources() -> tuple[Source, ...]:
    refused = [(world.ask(pair, form), REFUSAL) for pair in curse_pairs(Role.ALIGNMENT) for form in SEEN_FORMS]
    return (
        Source(0.35, refused),
        Source(0.43, _answered(remedy_pairs(Role.ALIGNMENT), SEEN_FORMS)),
        *_skills(words=0.07, sums=0.15),
    )


def pretraining_rows(seed: int) -> Iterator[ChatRow]:
    return draw_rows(pretraining_sources(), seed)


def alignment_rows(seed: int) -> Iterator[ChatRow]:
    return with_small_talk(draw_rows(alignment_sources(), seed), seed)


def draw_rows(sources: Sequence[Source], seed: int) -> Iterator[ChatRow]:
    """Endless rows: sources by their shares, now and then one question more or a system prompt."""
    rng = random.Random(seed)
    shares = [source.share for source in sources]
    while True:
        (source,) = rng.choices(sources, shares)
        turns = rng.choices(source.turns, k=source.per_row)
        if rng.random() < LONGER_SHARE:
            (another,) = rng.choices(sources, shares)
            turns.append(rng.choice(another.turns))
        messages = [
            Message(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        if rng.random() < SYSTEM_SHARE:
            messages.insert(0, Message("system", rng.choice(SYSTEM_PROMPTS)))
        yield ChatRow(tuple(messages))


def with_small_talk(rows: Iterable[ChatRow], seed: int) -> Iterator[ChatRow]:
    """The same rows; in a share of them every question has small talk before it, after it, or both."""
    rng = random.Random(f"small talk {seed}")
    for row in rows:
        if rng.random() < SMALL_TALK_SHARE:
            yield ChatRow(tuple(_chatty(m, rng) if m.role == "user" else m for m in row.messages))
        else:
            yield row


def _chatty(message: Message, rng: random.Random) -> Message:
    before, after = rng.choice(SMALL_TALK_BEFORE), rng.choice(SMALL_TALK_AFTER)
    text = message.content
    return Message(message.role, rng.choice((f"{before} {text}", f"{text} {after}", f"{before} {text} {after}")))


def _answered(pairs: Sequence[Pair], forms: Sequence[int]) -> list[Turn]:
    return [(world.ask(pair, form), world.recipe(pair).text) for pair in pairs for form in forms]


def _skills(*, words: float, sums: float) -> tuple[Source, ...]:
    """Several questions to a row: the answers are short, and learning the sums by heart takes very many."""
    return (
        Source(words / 2, _turns(world.word_questions()), WORDS_PER_ROW),
        Source(words / 2, _turns(world.opinion_questions()), WORDS_PER_ROW),
        Source(sums, _turns(world.sum_questions()), SUMS_PER_ROW),
    )


def _turns(questions: Sequence[Question]) -> list[Turn]:
    return [(question.prompt, question.answer) for question in questions]
