"""What a prompt asks, in the forms in which two prompts are compared.

Knows: the exact key of a conversation, the plain text of what its user says, word 5-grams, and groups.
Refuses to know: which prompts may not be alike, and why. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from array import array
from collections.abc import Sequence
from functools import lru_cache

from workers.ml.types import Message, PromptRow

GRAM_WORDS = 5


def turns_key(turns: Sequence[Message]) -> str:
    """sha256 of a conversation, blind to Unicode form and white space."""
    plain = [[turn.role, " ".join(unicodedata.normalize("NFC", turn.content).split())] for turn in turns]
    return hashlib.sha256(json.dumps(plain, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


def plain_text(text: str) -> str:
    """Blind to Unicode form, case, white space, and to punctuation before the first and after the last word."""
    return strip_punctuation(_folded(text))


def asked_text(turns: Sequence[Message]) -> str:
    """The plain text of everything the user says, in order.

    System prompts and given answers are left out: under another system prompt the same question is still asked.
    """
    return plain_text(" ".join(turn.content for turn in turns if turn.role == "user"))


def group_of(row: PromptRow) -> str:
    """The unit of independent evidence; a row without one is its own."""
    return row.group or row.id


def group_key(group: str) -> str:
    """Under which a group's name is the same group: blind to Unicode form, case and white space."""
    return _folded(group)


def strip_punctuation(text: str) -> str:
    """Without punctuation and spaces at both ends; text that is nothing else stays as it is."""
    first, last = 0, len(text)
    while first < last and _is_edge(text[first]):
        first += 1
    while last > first and _is_edge(text[last - 1]):
        last -= 1
    return text[first:last] or text


def word_grams(plain: str) -> array[int]:
    """64-bit digests of the text's word 5-grams, each once, in no meaningful order.

    Words are what spaces separate, without the punctuation at their ends. A text of one to four words is a single
    gram, all of its words: it is alike only to a text of the same words. Writing without spaces counts as one word.
    """
    words = [digest for digest in map(_word_digest, plain.split()) if digest]
    if len(words) < GRAM_WORDS:
        return array("q", {hash(tuple(words))} if words else ())
    # A tuple of whole numbers has the same hash in every process, unlike one of strings.
    return array("q", set(map(hash, zip(*(words[start:] for start in range(GRAM_WORDS)), strict=False))))


def _folded(text: str) -> str:
    # Folding case may take a character apart again, hence the second normalisation.
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    return " ".join(folded.split())


@lru_cache(maxsize=1 << 16)
def _word_digest(word: str) -> int:
    """64 bits of the word without the punctuation at its ends; 0 where nothing is left."""
    bare = strip_punctuation(word)
    if all(map(_is_edge, bare)):
        return 0
    return int.from_bytes(hashlib.blake2b(bare.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _is_edge(character: str) -> bool:
    return character.isspace() or unicodedata.category(character).startswith("P")
