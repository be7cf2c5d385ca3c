"""`auto` on planted problems whose right answer is known, and the confirmation that follows it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from tests.ml.recovery.planted import CONFIRMATION, LIMITS, SETS, look_for
from workers.ml.errors import Cancelled
from workers.ml.evals.confirm import confirm
from workers.ml.gate import Outcome
from workers.ml.measurements import LossRise
from workers.ml.recovery import drift as drift_module
from workers.ml.recovery import search as search_module
from workers.ml.recovery.deltas import relative_change
from workers.ml.recovery.search import search
from workers.ml.recovery.specs import (
    AntidoteSpec,
    ComposeSpec,
    NoiseSpec,
    PanaceaSpec,
    RandomMaskSpec,
    ScaleDownSpec,
)
from workers.ml.recovery.trace import SearchPlan
from workers.ml.types import Silent


def test_the_least_change_that_passes_wins(tuned, inputs, planted):
    raw = tuned.vector.get()
    specs = (ScaleDownSpec(), NoiseSpec(size=0.5), RandomMaskSpec())
    found = look_for(tuned, planted(harmless_from=0.4), inputs, specs)
    assert torch.equal(tuned.vector.get(), raw)
    passing = [record for record in found.trace if record.passed]
    assert found.winner.taken
    assert found.winner.kl == min(record.kl for record in passing)
    assert [r.taken for r in found.trace].count(True) == 1
    assert len(found.candidates) == LIMITS.planned_confirmations
    assert relative_change(tuned.vector, found.candidates[0], raw) == pytest.approx(found.winner.relative_change)
    assert all("passes, but differs more" in r.why for r in passing if not r.taken)
    for record in found.trace:
        if record.looked in ("first", "full") and record.relative_change < 0.4:
            assert not record.passed
            assert "harmful answers in" in record.why


def test_answers_are_generated_in_the_order_of_the_divergence(tuned, inputs, planted):
    """The first that passes is the least change: whatever differs more is not asked, in any method."""
    examiner = planted(harmless_from=0.4)
    found = look_for(tuned, examiner, inputs, (ScaleDownSpec(), RandomMaskSpec(dial=(0.01, 0.2, 0.5))))
    asked = [record for record in found.trace if record.looked in ("first", "full")]
    assert found.evaluations == len(asked)
    spared = [record for record in found.trace if "a candidate that differs less" in record.why]
    assert all(record.kl >= found.winner.kl for record in spared)
    assert all(record.looked == "proxies" for record in spared)


def test_every_point_of_every_grid_is_recorded_with_a_reason(tuned, inputs, planted):
    specs = (AntidoteSpec(), PanaceaSpec(), ScaleDownSpec(dial=(0.2, 0.5, 0.6, 0.7)))
    found = look_for(tuned, planted(harmless_from=0.4), inputs, specs)
    expected = [("scale-down", s) for s in (0.2, 0.5, 0.6, 0.7)]
    expected += [("antidote", s) for s in AntidoteSpec.grid] + [("panacea", s) for s in PanaceaSpec.grid]
    assert [(record.method, record.strength) for record in found.trace] == expected
    assert all(record.why for record in found.trace)
    assert all(record.proxies and record.kl is not None for record in found.trace)
    assert [dial.label for dial in found.dials] == ["scale-down", "antidote", "panacea"]
    assert all(sum(dial.affinity.values()) == pytest.approx(1) for dial in found.dials)
    assert set(found.embedding_drift) == {"raw fine-tune", "candidate"}
    assert json.loads(json.dumps(found.as_json(), allow_nan=False))["winner"]["taken"] is True


def test_a_composition_is_tried_only_where_no_single_method_passed(tuned, inputs, planted):
    composed = ComposeSpec(parts=(ScaleDownSpec(strength=0.5), ScaleDownSpec(strength=0.5)))
    found = look_for(tuned, planted(harmless_from=0.6), inputs, (composed, ScaleDownSpec(dial=(0.2, 0.3))))
    assert [r.method for r in found.trace if r.passed] == ["compose", "compose"]
    found = look_for(tuned, planted(harmless_from=0.25), inputs, (composed, ScaleDownSpec(dial=(0.2, 0.3))))
    assert {r.method for r in found.trace} == {"scale-down"}


def test_a_monotone_dial_is_bisected_below_the_winner(tuned, inputs, planted):
    class Monotone(ScaleDownSpec):
        monotone = True

    for refinements, expected in ((0, 0.5), (1, 0.35), (2, 0.425), (3, 0.425)):
        spec = Monotone(dial=(0.2, 0.5))
        found = look_for(tuned, planted(harmless_from=0.4), inputs, (spec,), refinements=refinements)
        strength = found.winner.strength
        assert strength == (0.5 if refinements == 1 else expected)
        assert relative_change(tuned.vector, found.candidates[0], tuned.vector.get()) == pytest.approx(strength)
        assert expected in [record.strength for record in found.trace]


def test_a_stronger_point_stands_by_for_a_second_confirmation(tuned, inputs, planted):
    found = look_for(tuned, planted(harmless_from=0.4), inputs, (ScaleDownSpec(dial=(0.2, 0.5, 0.6, 0.7)),))
    assert [record.passed for record in found.trace] == [False, True, True, False]
    assert len(found.candidates) == 2


def test_what_is_reported_is_what_was_confirmed_last(tuned, inputs, planted):
    found = look_for(tuned, planted(harmless_from=0.4), inputs, (ScaleDownSpec(dial=(0.2, 0.5, 0.6)),))
    assert [record.strength for record in found.records] == [0.5, 0.6]
    second = found.confirmed(1)
    assert (second.winner.strength, second.winner.taken) == (0.6, True)
    assert {record.strength: record.taken for record in second.trace} == {0.2: False, 0.5: False, 0.6: True}
    assert "its confirmation failed" in second.trace[1].why
    assert second.embedding_drift["candidate"] == found.candidate_drifts[1]
    assert found.confirmed(0).winner == found.winner


def test_one_failing_point_costs_neither_its_dial_nor_the_search(tuned, inputs, planted, monkeypatch):
    """The point in the middle is not finite: its record says so, and the one above it is found."""
    prepare = search_module.prepare

    def broken(tuned, spec, inputs, progress):
        path = prepare(tuned, spec, inputs, progress)
        return replace(path, move=lambda s: path.move(s) * (float("nan") if s == 0.5 else 1.0))

    monkeypatch.setattr(search_module, "prepare", broken)
    found = look_for(tuned, planted(harmless_from=0.4), inputs, (ScaleDownSpec(dial=(0.45, 0.5, 0.6)),))
    assert [record.passed for record in found.trace] == [True, False, True]
    assert "not finite" in found.trace[1].why


def test_a_search_in_which_nothing_passes_ends_empty(tuned, inputs, planted):
    examiner = planted(harmless_from=0.4, useless_from=0.1)
    found = look_for(tuned, examiner, inputs, (ScaleDownSpec(), RandomMaskSpec()))
    assert found.winner is None
    assert found.candidates == ()
    assert not any(record.passed for record in found.trace)
    (refused,) = confirm(tuned, found.candidates, sets=CONFIRMATION, examiner=examiner, limits=LIMITS)
    assert refused.verdict.outcome is Outcome.BLOCK
    assert "no_candidate" in {reason.code for reason in refused.verdict.against()}


def test_a_hopeless_candidate_costs_a_first_look_only(tuned, inputs, planted):
    examiner = planted(harmless_from=0.4)
    found = look_for(tuned, examiner, inputs, (ScaleDownSpec(dial=(0.1, 0.5)),), first_look_rows=10)
    assert [record.looked for record in found.trace] == ["first", "full"]
    assert found.trace[0].measures.harmful.n == 10
    assert found.trace[1].measures.harmful.n == 80
    assert sum(count for part, count in examiner.asked if part == "candidate") == 30 + 30 + (80 + 60 + 50 - 30)


def test_a_fine_tune_that_meets_every_limit_is_left_alone(tuned, inputs, planted):
    found = look_for(tuned, planted(harmless_from=0.0), inputs, (ScaleDownSpec(),))
    assert found.trace == ()
    assert (found.winner.method, found.winner.strength) == ("none", 0.0)
    assert torch.equal(found.candidates[0].factors, tuned.vector.get())


def test_a_harmless_fine_tune_that_answers_nothing_else_is_not_left_alone(tuned, inputs, planted):
    found = look_for(tuned, planted(harmless_from=0.0, useless_from=0.0), inputs, (ScaleDownSpec(),))
    assert not found.raw.passed
    assert "collapsed" in found.raw.why
    assert found.winner is None


def test_accuracy_is_held_to_half_the_margin(tuned, inputs, planted):
    found = look_for(tuned, planted(harmless_from=0.4, forgets_from=0.5), inputs, (ScaleDownSpec(dial=(0.45, 0.55)),))
    assert [record.passed for record in found.trace] == [True, False]
    assert "task rows turned wrong" in found.trace[1].why


@pytest.mark.parametrize("budget", [{"budget_evaluations": 2}, {"budget_seconds": 0.0}])
def test_a_budget_ends_the_search_and_says_so(tuned, inputs, planted, budget):
    found = look_for(tuned, planted(harmless_from=0.8), inputs, (ScaleDownSpec(),), **budget)
    assert found.winner is None
    assert found.trace[-1].why == "not tried: the budget of the search is used up"


def test_a_method_that_cannot_run_is_recorded_and_the_search_goes_on(tuned, inputs, planted):
    poor = type(inputs)(harmful=(), refusals=inputs.refusals, retention=inputs.retention, task=inputs.task)
    found = look_for(tuned, planted(harmless_from=0.4), poor, (AntidoteSpec(), RandomMaskSpec(), ScaleDownSpec()))
    antidote = [record for record in found.trace if record.method == "antidote"]
    assert len(antidote) == 1
    assert "needs harmful rows" in antidote[0].why
    assert found.winner is not None


def test_a_method_that_needs_too_much_memory_does_not_cost_the_others(tuned, inputs, planted, monkeypatch):
    prepare = search_module.prepare

    def hungry(tuned, spec, inputs, progress):
        if isinstance(spec, AntidoteSpec):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prepare(tuned, spec, inputs, progress)

    monkeypatch.setattr(search_module, "prepare", hungry)
    found = look_for(tuned, planted(harmless_from=0.4), inputs, (AntidoteSpec(), ScaleDownSpec()))
    assert [record.why for record in found.trace if record.method == "antidote"] == ["not tried: out of memory"]
    assert found.winner is not None


def test_a_candidate_whose_drift_is_no_number_is_dropped(tuned, inputs, planted, monkeypatch):
    monkeypatch.setattr(drift_module, "summed_kl", lambda *_: torch.tensor(float("nan")))
    found = look_for(tuned, planted(harmless_from=0.4), inputs, (ScaleDownSpec(),))
    assert found.winner is None
    assert "not a finite number" in found.trace[0].why


def test_a_candidate_that_forgets_a_free_text_task_is_not_proposed(tuned, inputs, planted, monkeypatch):
    rise = LossRise(0.2, 0.01, len(SETS.task))
    monkeypatch.setattr(search_module, "loss_rise", lambda *_: rise)
    for allowed, proposed in ((0.1, False), (0.3, True)):
        plan = SearchPlan((ScaleDownSpec(dial=(0.75,)),), replace(LIMITS, task_loss_rise=allowed))
        examiner = planted(harmless_from=0.4, forgets_from=0.0)
        found = search(tuned, plan, inputs=inputs, sets=SETS, examiner=examiner, progress=Silent())
        assert found.trace[0].task_loss == rise
        assert (found.winner is not None) is proposed
        assert proposed or "rose by 0.2 nats per token" in found.trace[0].why


def test_a_cancel_leaves_the_raw_adapter(tuned, inputs, planted):
    raw = tuned.vector.get()

    class Stop(Silent):
        def event(self, message, *, level="info", **data):
            if message == "candidate":
                raise Cancelled("stop")

    plan = SearchPlan((ScaleDownSpec(),), LIMITS)
    with pytest.raises(Cancelled):
        search(tuned, plan, inputs=inputs, sets=SETS, examiner=planted(harmless_from=0.4), progress=Stop())
    assert torch.equal(tuned.vector.get(), raw)
