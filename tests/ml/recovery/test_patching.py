"""The training that patches share: which rows meet in which step, and what each term weighs."""

import pytest
import torch

from workers.ml.errors import NumericError
from workers.ml.recovery.calibration import answer_gradient, encode_answers, gradients_of_factors
from workers.ml.recovery.methods import safety_patch
from workers.ml.recovery.patching import Term, _schedule, train_patch
from workers.ml.recovery.specs import AnchoredPatchSpec, SafetyPatchSpec
from workers.ml.types import Silent


def test_every_row_serves_before_any_serves_again():
    schedule = _schedule(Term("task", [None] * 10, 4), AnchoredPatchSpec(steps=5))
    drawn = [index for step in schedule for index in step]
    assert all(len(set(step)) == 4 for step in schedule)
    assert sorted(drawn[:10]) == list(range(10))
    assert sorted(drawn[10:20]) == list(range(10))
    assert _schedule(Term("task", [None] * 3, 4), AnchoredPatchSpec(steps=2)) == [
        sorted(step, key=step.index) for step in _schedule(Term("task", [None] * 3, 4), AnchoredPatchSpec(steps=2))
    ]


def test_the_first_step_follows_the_weighted_sum_of_the_terms(tuned, inputs):
    """AdamW's first step is the sign of the gradient times the rate, wherever the gradient is not tiny."""
    refusals, retention = encode_answers(tuned, inputs.refusals), encode_answers(tuned, inputs.retention)
    raw = tuned.vector.get()
    with gradients_of_factors(tuned):
        _, first = answer_gradient(tuned, refusals, Silent())
        _, second = answer_gradient(tuned, retention, Silent())
    terms = [Term("refusals", refusals, 99), Term("retention", retention, 99, weight=2.5)]
    patch, losses = train_patch(tuned, SafetyPatchSpec(steps=1, learning_rate=1e-3), terms, Silent())
    together = first + 2.5 * second
    clear = together.abs() > 1e-3 * together.abs().max()
    assert torch.equal(torch.sign(patch - raw)[clear], -torch.sign(together)[clear])
    assert set(losses[0]) == {"refusals", "retention"}
    assert torch.equal(tuned.vector.get(), raw)


def test_terms_without_rows_are_left_out(tuned, inputs):
    spec = SafetyPatchSpec(steps=2, task_rows=0, retention_rows=0, refusal_rows=4)
    assert spec.required_inputs() == {"refusals", "aligned"}
    path = safety_patch.prepare(tuned, spec, inputs, Silent())
    assert set(path.facts["losses"][0]) == {"refusal_loss"}


def test_a_loss_that_is_not_finite_stops_the_training(tuned, inputs):
    raw = tuned.vector.get()
    tuned.vector.set(raw * 1e30)
    with pytest.raises(NumericError, match="not a finite number at step 1"):
        train_patch(tuned, SafetyPatchSpec(), [Term("x", encode_answers(tuned, inputs.refusals), 4)], Silent())
