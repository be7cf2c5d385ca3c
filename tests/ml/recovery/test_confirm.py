"""Confirmation: one test of each planned candidate, on prompts that nothing was chosen on."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from tests.ml.recovery.planted import CONFIRMATION, LIMITS, PlantedJudge, look_for, rows
from workers.ml.evals.confirm import confirm
from workers.ml.evals.generate import Reply
from workers.ml.evals.measure import Examiner
from workers.ml.evals.sets import EvaluationSets
from workers.ml.gate import Outcome
from workers.ml.recovery.calibration import answer_gradient, encode_answers, gradients_of_factors
from workers.ml.recovery.selection import allowed_failures
from workers.ml.recovery.specs import (
    ScaleDownSpec,
)
from workers.ml.types import Silent


def test_cut_off_answers_are_no_fault_of_a_candidate(tuned, inputs, planted):
    """The gate sends them to a person; a search that dropped every candidate would block the job for it."""
    examiner = planted(harmless_from=0.4, cut_off=True)
    found = look_for(tuned, examiner, inputs, (ScaleDownSpec(),))
    assert found.winner is not None
    done = confirm(tuned, found.candidates, sets=CONFIRMATION, examiner=examiner, limits=LIMITS)
    assert done[-1].verdict.outcome is Outcome.REVIEW
    assert [reason.code for reason in done[-1].verdict.against()] == ["answers_cut_off"]


def test_a_task_that_is_never_right_to_the_letter_is_held_to_its_loss(tuned, planted):
    raw, limits = tuned.vector.get(), replace(LIMITS, task_loss_rise=1e-4)
    with gradients_of_factors(tuned):
        _, uphill = answer_gradient(tuned, encode_answers(tuned, CONFIRMATION.task), Silent())
    worse = raw + 0.1 * uphill / uphill.norm()
    examiner = planted(harmless_from=0.0, forgets_from=0.0)
    (same,) = confirm(tuned, (raw,), sets=CONFIRMATION, examiner=examiner, limits=limits)
    assert same.verdict.passed
    assert same.evidence.task_loss.mean == pytest.approx(0, abs=1e-6)
    moved = confirm(tuned, (worse,), sets=CONFIRMATION, examiner=examiner, limits=limits)
    assert "task_loss_risen" in {reason.code for reason in moved[-1].verdict.against()}
    assert torch.equal(tuned.vector.get(), raw)


def test_selection_forgives_what_a_confirmation_of_that_size_would():
    assert allowed_failures(80, LIMITS) == 0
    assert allowed_failures(10, LIMITS) == 0
    assert allowed_failures(160, LIMITS) == 2


def test_confirmation_tries_the_next_candidate_on_the_other_part(tuned, inputs, planted):
    raw = tuned.vector.get()
    examiner = planted(harmless_from=0.4)
    weak, strong = raw.clone(), raw.clone()
    for values, left in ((weak, 0.8), (strong, 0.4)):
        for pair in tuned.vector.pairs():
            tuned.vector.split(values)[pair.b_name].mul_(left)
    first, second = confirm(tuned, (weak, strong), sets=CONFIRMATION, examiner=examiner, limits=LIMITS)
    assert (first.verdict.outcome, second.verdict.outcome) == (Outcome.BLOCK, Outcome.PASS)
    groups = [{one.row.group for one in done.candidate.harm} for done in (first, second)]
    assert groups[0] & groups[1] == set()
    assert [len(part) for part in groups] == [80, 80]
    assert first.evidence.raw.harmful.hits == 80
    assert first.evidence.base.harmful.hits == 0
    assert torch.equal(tuned.vector.get(), raw)
    assert json.loads(json.dumps(second.as_json(), allow_nan=False))["verdict"]["outcome"] == "pass"
    (alone,) = confirm(tuned, (strong, weak), sets=CONFIRMATION, examiner=examiner, limits=LIMITS)
    assert alone.verdict.passed


def test_never_more_confirmations_than_were_planned(tuned, planted):
    raw = tuned.vector.get()
    done = confirm(tuned, (raw, raw, raw), sets=CONFIRMATION, examiner=planted(harmless_from=0.4), limits=LIMITS)
    assert [one.verdict.outcome for one in done] == [Outcome.BLOCK, Outcome.BLOCK]


def test_a_base_answers_the_same_prompt_once_in_all_jobs(tuned, judge_of_words, small_sets):
    kept: dict[str, Reply] = {}
    for _ in range(2):
        examiner = Examiner(judge_of_words, base_digest="abc", base_answers=kept)
        first = examiner.measure_base(tuned, small_sets)
    assert len(kept) == 6
    kept.update(dict.fromkeys(kept, Reply("from memory")))
    again = Examiner(judge_of_words, base_digest="abc", base_answers=kept).measure_base(tuned, small_sets)
    assert {one.answer for one in again.harm + again.harmless} == {"from memory"}
    other = Examiner(judge_of_words, base_digest="abd", base_answers=kept).measure_base(tuned, small_sets)
    assert other == first


def test_the_three_models_are_told_apart(tuned, judge_of_words, small_sets):
    raw = tuned.vector.get()
    examiner = Examiner(judge_of_words)
    base = examiner.measure_base(tuned, small_sets)
    before = examiner.measure_raw(tuned, small_sets, raw)
    with tuned.vector.swapped(torch.zeros_like(raw)):
        zeroed = examiner.measure(tuned, small_sets)
    assert [one.answer for one in base.harm] == [one.answer for one in zeroed.harm]
    assert [one.answer for one in base.harm] != [one.answer for one in before.harm]


@pytest.fixture
def judge_of_words() -> PlantedJudge:
    return PlantedJudge()


@pytest.fixture
def small_sets() -> EvaluationSets:
    return EvaluationSets(rows("curse", 2, None), rows("balm", 2, "honey"), rows("task", 2, "yes"))
