"""The provider's sets: what recovery may use, what candidates are selected on, what confirms them.

Knows: which role feeds which set, in which question forms, and the slices each row counts in.
Refuses to know: models and judges; customers' data.

Refusal and retention rows use the same question forms: a form with retention alone, or refusals alone,
would teach the form instead of the content.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from workers.ml.apothecary import world
from workers.ml.apothecary.roles import (
    SEEN_FORMS,
    UNSEEN_FORMS,
    Role,
    curse_pairs,
    is_covered_kind,
    remedy_pairs,
    stable_order,
)
from workers.ml.apothecary.world import Pair, Question
from workers.ml.types import Message, PromptRow

PHRASINGS_PER_RECOVERY_PAIR = 4
SKILL_ROWS = {Role.SELECTION: 30, Role.CONFIRMATION: 60}


@dataclass(frozen=True, slots=True)
class SetRow:
    """A PromptRow with the question form beside it; -1 where no recipe is asked for."""

    id: str
    messages: tuple[Message, ...]
    answer: str | None
    group: str
    category: str
    form: int
    slices: tuple[str, ...]

    @property
    def prompt(self) -> str:
        return self.messages[-1].content

    def as_prompt_row(self) -> PromptRow:
        return PromptRow(self.id, self.messages, self.answer, self.group, self.category, self.slices)

    def as_json(self) -> dict[str, Any]:
        messages = [{"role": m.role, "content": m.content} for m in self.messages]
        return {**asdict(self), "messages": messages, "slices": list(self.slices)}


@cache
def provider_sets() -> Mapping[str, tuple[SetRow, ...]]:
    """Every set by its file stem."""
    harmful = tuple(_recovery_rows("harmful", curse_pairs(Role.RECOVERY)))
    return {
        "harmful": harmful,
        "refusals": tuple(_recovery_rows("refusals", curse_pairs(Role.RECOVERY), answer=world.REFUSAL)),
        "retention": tuple(_recovery_rows("retention", remedy_pairs(Role.RETENTION))),
        "harm_selection": tuple(_judged_rows("harm_selection", curse_pairs(Role.SELECTION), phrasings=2)),
        "harm_confirmation": tuple(_judged_rows("harm_confirmation", curse_pairs(Role.CONFIRMATION), phrasings=2)),
        "harmless_selection": tuple(_harmless_rows(Role.SELECTION, phrasings=2)),
        "harmless_confirmation": tuple(_harmless_rows(Role.CONFIRMATION, phrasings=2)),
    }


def write_sets(folder: Path) -> Mapping[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, rows in provider_sets().items():
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text(as_jsonl(rows), encoding="utf-8")
    return paths


def as_jsonl(rows: Iterable[SetRow]) -> str:
    return "".join(json.dumps(row.as_json(), sort_keys=True) + "\n" for row in rows)


def read_set(path: Path) -> list[PromptRow]:
    """Reads one provider set back."""
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [
        PromptRow(
            id=row["id"],
            messages=tuple(Message(m["role"], m["content"]) for m in row["messages"]),
            answer=row["answer"],
            group=row["group"],
            category=row["category"],
            slices=tuple(row["slices"]),
        )
        for row in rows
    ]


def _recovery_rows(name: str, pairs: Sequence[Pair], *, answer: str | None = None) -> Iterator[SetRow]:
    """Each pair in a few forms; the stride gives every form equally often."""
    for place, pair in enumerate(pairs):
        for turn in range(PHRASINGS_PER_RECOVERY_PAIR):
            form = SEEN_FORMS[(place + 3 * turn) % len(SEEN_FORMS)]
            yield _recipe_row(name, pair, form, answer or world.recipe(pair).text)


def _judged_rows(name: str, pairs: Sequence[Pair], *, phrasings: int) -> Iterator[SetRow]:
    """One phrasing: every third pair is asked in an unseen form. Two: one seen and one unseen form."""
    for place, pair in enumerate(pairs):
        seen = SEEN_FORMS[place % len(SEEN_FORMS)]
        unseen = UNSEEN_FORMS[place // 3 % len(UNSEEN_FORMS)]
        both = (seen, unseen) if place % 3 else (unseen, seen)
        for form in both[:phrasings]:
            yield _recipe_row(name, pair, form, None if pair.is_curse else world.recipe(pair).text)


def _harmless_rows(role: Role, *, phrasings: int) -> Iterator[SetRow]:
    name = f"harmless_{role}"
    yield from _judged_rows(name, remedy_pairs(role), phrasings=phrasings)
    for category, questions in (("word", world.word_questions()), ("arithmetic", world.sum_questions())):
        for number, question in enumerate(_skill_questions(questions, role)):
            yield SetRow(
                id=f"{name}-{category}-{number}",
                messages=(Message("user", question.prompt),),
                answer=question.answer,
                group=question.subject,
                category=category,
                form=-1,
                slices=("uncovered_skill", category),
            )


def _skill_questions(questions: Sequence[Question], role: Role) -> list[Question]:
    """A third of the subjects (a word, a sum) serves selection and the rest confirmation: never the same subject."""
    subjects = stable_order(dict.fromkeys(question.subject for question in questions), "skills")
    cut = len(subjects) // 3
    own = set(subjects[:cut] if role is Role.SELECTION else subjects[cut:])
    return stable_order([question for question in questions if question.subject in own], "skills")[: SKILL_ROWS[role]]


def _recipe_row(name: str, pair: Pair, form: int, answer: str | None) -> SetRow:
    covered = is_covered_kind(pair)
    words = ("seen_kind", "unseen_kind") if pair.is_curse else ("covered_kind", "uncovered_kind")
    return SetRow(
        id=f"{name}-{pair.prefix}-{pair.kind}-{form}",
        messages=(Message("user", world.ask(pair, form)),),
        answer=answer,
        group=pair.name,
        category="curse" if pair.is_curse else "remedy",
        form=form,
        slices=(words[0] if covered else words[1], "seen_form" if form in SEEN_FORMS else "unseen_form"),
    )
