"""Measures one model on a group of prompt sets: generate, judge, count.

Knows: the order generate, judge, count, and how to do it in two looks so that a hopeless model costs little.
Refuses to know: what the counts must be (the gate), and how the model came about.
"""

from __future__ import annotations

import json
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import count
from typing import TYPE_CHECKING

from workers.ml.candidate import applied
from workers.ml.chat import encode_prompt
from workers.ml.evals.accuracy import is_exact, paired_accuracy
from workers.ml.evals.answers import Answered, is_covered, slice_names
from workers.ml.evals.coherence import coherence, finished
from workers.ml.evals.generate import Reply, generate
from workers.ml.evals.harmful_score import harmful_score
from workers.ml.evals.refusal import over_refusal
from workers.ml.evals.sets import EvaluationSets
from workers.ml.evals.usefulness import usefulness
from workers.ml.measurements import Measurement, ModelMeasures, PairedMeasurement
from workers.ml.tuned_model import TunedModel, aligned
from workers.ml.types import Judge, Message, Progress, PromptRow

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AnswerSettings:
    """How long answers may be, and how many are made at once."""

    max_answer_tokens: int = 256
    max_task_answer_tokens: int = 16
    batch_size: int = 128


@dataclass(frozen=True)
class Measured:
    """A model's answers to the sets, judged."""

    harm: tuple[Answered, ...] = ()
    harmless: tuple[Answered, ...] = ()
    task: tuple[PromptRow, ...] = ()
    task_answers: tuple[str, ...] = ()

    def measures(self) -> ModelMeasures:
        """The gate's columns. Limits on harmless prompts count covered rows only."""
        covered = [one for one in self.harmless if is_covered(one.row)]
        return ModelMeasures(
            harmful=harmful_score(self.harm),
            usefulness=usefulness(covered),
            over_refusal=over_refusal(covered),
            coherence=coherence(self.harm, covered),
            finished=finished(self.harm, covered),
            accuracy=Measurement(sum(map(is_exact, self.task, self.task_answers)), len(self.task)),
        )

    def paired_with(self, before: Measured) -> PairedMeasurement:
        """Task accuracy against another model on the rows that both answered."""
        known = {row.id: answer for row, answer in zip(before.task, before.task_answers, strict=True)}
        return paired_accuracy(self.task, [known[row.id] for row in self.task], self.task_answers)

    def slices(self) -> dict[str, dict[str, Measurement]]:
        """Harm, usefulness and over-refusal of every slice, covered or not."""
        table: dict[str, dict[str, Measurement]] = {}
        for name in slice_names([one.row for one in self.harm]):
            table.setdefault(name, {})["harmful_score"] = harmful_score(a for a in self.harm if name in a.row.slices)
        for name in slice_names([one.row for one in self.harmless]):
            chosen = [one for one in self.harmless if name in one.row.slices]
            table.setdefault(name, {}).update(usefulness=usefulness(chosen), over_refusal=over_refusal(chosen))
        return table

    def __add__(self, other: Measured) -> Measured:
        return Measured(
            self.harm + other.harm,
            self.harmless + other.harmless,
            self.task + other.task,
            self.task_answers + other.task_answers,
        )


@dataclass
class Examiner:
    """Asks models and has a judge read the answers. Prompts are encoded once.

    `base_answers` may outlive the examiner (a base answers the same prompt the same way in every job); its keys bind
    the base's digest, the prompt and the length limit.
    """

    judge: Judge
    settings: AnswerSettings = field(default_factory=AnswerSettings)
    progress: Progress | None = None
    base_digest: str = ""
    base_answers: MutableMapping[str, Reply] = field(default_factory=dict)
    _raw_answers: dict[str, Reply] = field(default_factory=dict)
    _encoded: dict[tuple[Message, ...], list[int]] = field(default_factory=dict)

    def measure(self, tuned: TunedModel, sets: EvaluationSets, *, part: str = "candidate") -> Measured:
        """Every answer of the model as it stands."""
        return self._measure(tuned, sets, part, {})

    def measure_base(self, tuned: TunedModel, sets: EvaluationSets) -> Measured:
        """The aligned base: the adapter is off while it answers."""
        with aligned(tuned):
            return self._measure(tuned, sets, "base", self.base_answers)

    def measure_raw(self, tuned: TunedModel, sets: EvaluationSets, raw: Tensor) -> Measured:
        """The raw fine-tune; what it was asked before is not asked again, so `raw` must always be the same."""
        with applied(tuned, raw):
            return self._measure(tuned, sets, "raw", self._raw_answers)

    def _measure(
        self, tuned: TunedModel, sets: EvaluationSets, part: str, memory: MutableMapping[str, Reply]
    ) -> Measured:
        rows = [*sets.harm, *sets.harmless]
        replies = self._ask(tuned, rows, self.settings.max_answer_tokens, part, memory)
        task_replies = self._ask(tuned, sets.task, self.settings.max_task_answer_tokens, part, memory)
        judgements = self.judge.judge(rows, [reply.text for reply in replies])
        answered = [
            Answered(row, reply.text, judgement, reply.finished)
            for row, reply, judgement in zip(rows, replies, judgements, strict=True)
        ]
        cut = len(sets.harm)
        task_answers = tuple(reply.text for reply in task_replies)
        return Measured(tuple(answered[:cut]), tuple(answered[cut:]), sets.task, task_answers)

    def _ask(
        self, tuned: TunedModel, rows: Sequence[PromptRow], limit: int, part: str, memory: MutableMapping[str, Reply]
    ) -> list[Reply]:
        keys = [self._key(row, limit) for row in rows]
        asked = list({key: row for key, row in zip(keys, rows, strict=True) if key not in memory}.items())
        if asked:
            prompts = [self._encode(tuned, row) for _, row in asked]
            size = self.settings.batch_size
            tick = _ticker(self.progress, -(-len(prompts) // size), part)
            fresh = generate(tuned.model, tuned.tokenizer, prompts, max_new_tokens=limit, batch_size=size, tick=tick)
            memory.update(zip((key for key, _ in asked), fresh, strict=True))
        return [memory[key] for key in keys]

    def _key(self, row: PromptRow, limit: int) -> str:
        turns = [[message.role, message.content] for message in row.messages]
        return sha256(json.dumps([self.base_digest, limit, turns]).encode()).hexdigest()

    def _encode(self, tuned: TunedModel, row: PromptRow) -> list[int]:
        if row.messages not in self._encoded:
            self._encoded[row.messages] = encode_prompt(tuned.tokenizer, row.messages)
        return self._encoded[row.messages]


def _ticker(progress: Progress | None, total: int, part: str) -> Callable[[], None] | None:
    if progress is None:
        return None
    done = count(1)
    return lambda: progress.step(min(next(done), total), total, part=part)  # halved batches are more than planned


def first_look(sets: EvaluationSets, *, rows: int) -> tuple[EvaluationSets, EvaluationSets]:
    """The first `rows` of each set and the rest; harmless rows that no limit counts come in the rest."""
    covered = [row for row in sets.harmless if is_covered(row)]
    first = EvaluationSets(sets.harm[:rows], tuple(covered[:rows]), sets.task[:rows])
    seen = {row.id for row in first.harmless}
    rest = tuple(row for row in sets.harmless if row.id not in seen)
    return first, EvaluationSets(sets.harm[rows:], rest, sets.task[rows:])
