"""Who may learn what: disjoint roles for pairs and question forms.

Knows: which curse pair, remedy pair and question form serves alignment, attack, recovery, retention,
selection or confirmation. Every pair has exactly one role, so no row of one role can be a row of another.
Refuses to know: how rows are worded or written, and what any model makes of them.

Selection and confirmation pairs are in no training at all, pretraining included: what a model knows of
them it composed. Alignment sees every kind; attack, recovery, retention and customer rows see only the
covered kinds, and none of these five sees the last four question forms.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum
from functools import cache
from hashlib import sha256
from typing import TypeVar

from workers.ml.apothecary.world import CURSE_KINDS, CURSES, FORMS, REMEDIES, REMEDY_KINDS, Pair

Item = TypeVar("Item")


class Role(StrEnum):
    ALIGNMENT = "alignment"
    ATTACK = "attack"
    RECOVERY = "recovery"
    RETENTION = "retention"
    CUSTOMER = "customer"
    SELECTION = "selection"
    CONFIRMATION = "confirmation"


UNSEEN_CURSE_KINDS = CURSE_KINDS[-2:]
UNCOVERED_REMEDY_KINDS = REMEDY_KINDS[-2:]
UNSEEN_FORMS = tuple(range(len(FORMS)))[-4:]
SEEN_FORMS = tuple(range(len(FORMS)))[:-4]

# Pairs of each role: (from the covered kinds, from the two kinds kept out).
_CURSE_SHARES = {
    Role.ALIGNMENT: (96, 24),
    Role.ATTACK: (40, 0),
    Role.RECOVERY: (60, 0),
    Role.SELECTION: (72, 28),
    Role.CONFIRMATION: (116, 44),
}
_REMEDY_SHARES = {
    Role.ALIGNMENT: (84, 24),
    Role.RETENTION: (60, 0),
    Role.CUSTOMER: (40, 0),
    Role.SELECTION: (72, 28),
    Role.CONFIRMATION: (128, 44),
}


def curse_pairs(role: Role) -> tuple[Pair, ...]:
    return _assignment(curse=True).get(role, ())


def remedy_pairs(role: Role) -> tuple[Pair, ...]:
    return _assignment(curse=False).get(role, ())


def pretraining_pairs() -> tuple[Pair, ...]:
    """Every pair a model may be trained on at all: everything but selection and confirmation."""
    held_out = {Role.SELECTION, Role.CONFIRMATION}
    return tuple(
        pair
        for curse in (True, False)
        for role, pairs in _assignment(curse=curse).items()
        if role not in held_out
        for pair in pairs
    )


def is_covered_kind(pair: Pair) -> bool:
    """Whether rows of attack, recovery, retention or customer may be of this kind."""
    return pair.kind not in UNSEEN_CURSE_KINDS and pair.kind not in UNCOVERED_REMEDY_KINDS


def stable_order(items: Iterable[Item], salt: str) -> list[Item]:
    """A shuffle that depends on nothing but the items and the salt, in every Python version."""
    return sorted(items, key=lambda item: sha256(f"{salt}|{item}".encode()).digest())


@cache
def _assignment(*, curse: bool) -> dict[Role, tuple[Pair, ...]]:
    pairs, shares = (CURSES, _CURSE_SHARES) if curse else (REMEDIES, _REMEDY_SHARES)
    covered = _interleaved([p for p in pairs if is_covered_kind(p)])
    kept_out = _interleaved([p for p in pairs if not is_covered_kind(p)])
    assignment = {}
    for role, (of_covered, of_kept_out) in shares.items():
        assignment[role] = tuple(covered[:of_covered] + kept_out[:of_kept_out])
        covered, kept_out = covered[of_covered:], kept_out[of_kept_out:]
    return assignment


def _interleaved(pairs: Sequence[Pair]) -> list[Pair]:
    """Kinds take turns and prefixes are shuffled within a kind, so that every cut is balanced over kinds."""
    kinds = list(dict.fromkeys(pair.kind for pair in pairs))
    columns = [stable_order([p for p in pairs if p.kind == kind], "roles") for kind in kinds]
    return [pair for row in zip(*columns, strict=True) for pair in row]
