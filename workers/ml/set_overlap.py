"""Which rows of two sets are the same question in other clothes.

Knows: the three ways to overlap, and how to find every pair that does without comparing every pair.
Refuses to know: which sets must be apart (`provider_sets`). Standard library only.

Two rows overlap when they ask the same (equal plain text), or when both carry a group and it is the same group, or,
where at least one carries none, when the Jaccard similarity of their word 5-grams is 0.9 or more. Groups stand in for
similarity because they say it better: "brew the sun venom" and "brew the moon venom" differ in one word and are two
questions, while two phrasings of one question may share no gram.

The similarity is exact, not sampled. Sets x and y with |x ∩ y| / |x ∪ y| ≥ t share at least t·max(|x|, |y|) grams, so
that in any common order of grams they meet within the first |x| - ⌈t·|x|⌉ + 1 of each (Chaudhuri, Ganti and Kaushik
2006; Bayardo, Ma and Srikant 2007), and where they first meet bounds what they can still share (Xiao et al. 2008). With
rare grams first, templates that thousands of prompts have in common lead to almost no comparison.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from workers.ml.prompts import asked_text, group_key, group_of, word_grams
from workers.ml.types import PromptRow

# 9/10 in whole numbers: 0.9 is not a binary fraction, and a pair at exactly 0.9 is an overlap.
SHARE, OF = 9, 10

Reason = Literal["equal prompt", "equal group", "similar prompt"]


@dataclass(frozen=True, slots=True)
class Overlap:
    """`row` and `other` may not both be where they are."""

    row: PromptRow
    other: PromptRow
    reason: Reason


@dataclass(slots=True)
class Tally:
    """`comparisons`: pairs of rows whose grams were counted against each other."""

    comparisons: int = 0


def find_overlaps(
    rows: Sequence[PromptRow], others: Sequence[PromptRow], *, tally: Tally | None = None
) -> list[Overlap]:
    """For every row of `rows` that overlaps with `others`, in their order, one row it overlaps with."""
    asked, known = _texts(rows), _texts(others)
    grams = _ordered([*known, *asked], wanted=_needs_similarity([*rows, *others]))
    similar = _Similar(tally or Tally())
    texts: dict[str, PromptRow] = {}
    groups: dict[str, PromptRow] = {}
    for other, text, own in zip(others, known, grams[: len(known)], strict=True):
        texts.setdefault(text, other)
        if other.group:
            groups.setdefault(group_key(other.group), other)
        similar.add(other, own)
    found = []
    for row, text, own in zip(rows, asked, grams[len(known) :], strict=True):
        if text in texts:
            found.append(Overlap(row, texts[text], "equal prompt"))
        elif row.group and group_key(row.group) in groups:
            found.append(Overlap(row, groups[group_key(row.group)], "equal group"))
        elif (near := similar.find(row, own)) is not None:
            found.append(Overlap(row, near, "similar prompt"))
    return found


def find_repeats(rows: Sequence[PromptRow], *, tally: Tally | None = None) -> list[Overlap]:
    """Rows of one set that ask, in another group, what an earlier row asks: one piece of evidence counted twice."""
    asked = _texts(rows)
    similar = _Similar(tally or Tally())
    texts: dict[str, dict[str, PromptRow]] = defaultdict(dict)
    found = []
    for row, text, own in zip(rows, asked, _ordered(asked, wanted=_needs_similarity(rows)), strict=True):
        elsewhere = next((first for group, first in texts[text].items() if group != group_of(row)), None)
        if elsewhere is not None:
            found.append(Overlap(row, elsewhere, "equal prompt"))
        elif (near := similar.find(row, own)) is not None:
            found.append(Overlap(row, near, "similar prompt"))
        texts[text].setdefault(group_of(row), row)
        similar.add(row, own)
    return found


def _texts(rows: Sequence[PromptRow]) -> list[str]:
    return [asked_text(row.messages) for row in rows]


def _needs_similarity(rows: Sequence[PromptRow]) -> bool:
    return not all(row.group for row in rows)


def _ordered(texts: Sequence[str], *, wanted: bool) -> list[_Grams]:
    """The grams of each text, the rare ones first; of none where they are not wanted.

    How often a gram occurs is counted in as many buckets as there are grams, not in a dictionary of them: grams that
    share a bucket are merely thought more frequent than they are, which costs time and never a pair.
    """
    found = [word_grams(text) if wanted else array("q") for text in texts]
    mask = (1 << sum(map(len, found)).bit_length()) - 1
    counts = array("I", bytes(array("I").itemsize * (mask + 1)))
    for grams in found:
        for gram in grams:
            counts[gram & mask] += 1
    ordered = []
    for grams in found:
        order = array("q", sorted(sorted(grams), key=lambda gram: counts[gram & mask]))
        ordered.append(_Grams(order, alone=sum(1 for gram in order if counts[gram & mask] == 1)))
    return ordered


@dataclass(frozen=True, slots=True)
class _Grams:
    """One row's grams in the common order; the first `alone` of them occur in no other row."""

    order: array[int]
    alone: int

    def prefix(self) -> Iterator[tuple[int, int]]:
        """Place and gram of the part in which similar rows must meet; what nobody else has is skipped."""
        size = len(self.order)
        end = size - -(-size * SHARE // OF) + 1 if size else 0
        for place in range(self.alone, end):
            yield place, self.order[place]


class _Similar:
    """Rows by the grams of their prefix, then by how many grams they have and where the gram stands among these."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._rows: list[tuple[PromptRow, array[int]]] = []
        self._places: dict[int, dict[tuple[int, int], list[int]]] = defaultdict(dict)

    def add(self, row: PromptRow, grams: _Grams) -> None:
        number, size = len(self._rows), len(grams.order)
        self._rows.append((row, grams.order))
        for place, gram in grams.prefix():
            self._places[gram].setdefault((size, place), []).append(number)

    def find(self, row: PromptRow, grams: _Grams) -> PromptRow | None:
        """An added row that is similar enough, where groups do not decide between the two."""
        own, size = frozenset(grams.order), len(grams.order)
        seen: set[int] = set()
        for place, gram in grams.prefix():
            for (other_size, other_place), numbers in self._places.get(gram, {}).items():
                # Had they met earlier, they would have been compared then; from here on this is all they can share.
                if not _is_enough(min(size - place, other_size - other_place), size, other_size):
                    continue
                for number in numbers:
                    other, others_grams = self._rows[number]
                    if number in seen or (row.group and other.group):
                        continue
                    seen.add(number)
                    self._tally.comparisons += 1
                    if _is_enough(len(own.intersection(others_grams)), size, other_size):
                        return other
        return None


def _is_enough(shared: int, size: int, other_size: int) -> bool:
    return OF * shared >= SHARE * (size + other_size - shared)
