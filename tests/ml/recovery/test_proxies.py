"""Proxies: what they read from one forward, and how little they may decide."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.ml.recovery.planted import LIMITS, PlantedJudge, rows
from workers.ml.evals.measure import Examiner
from workers.ml.evals.sets import EvaluationSets
from workers.ml.measurements import Measurement, ModelMeasures
from workers.ml.recovery.calibration import encode_answers
from workers.ml.recovery.patching import Term, train_patch
from workers.ml.recovery.proxies import Proxies, ProxyReading
from workers.ml.recovery.search import search
from workers.ml.recovery.selection import Foresight
from workers.ml.recovery.specs import (
    NoiseSpec,
    SafetyPatchSpec,
)
from workers.ml.recovery.trace import SearchPlan
from workers.ml.tuned_model import aligned
from workers.ml.types import Silent


@pytest.fixture
def taught(tuned):
    """A model that was taught its answers by heart: harm to curses, and right ones to everything else."""
    sets = EvaluationSets(rows("curse", 6, None), rows("balm", 4, "honey"), rows("task", 4, "yes"))
    lesson = [*(replace(row, answer="harm") for row in sets.harm), *sets.harmless, *sets.task]
    spec = SafetyPatchSpec(steps=80, learning_rate=1e-2)
    values, _ = train_patch(tuned, spec, [Term("lesson", encode_answers(tuned, lesson), 14)], Silent())
    tuned.vector.set(values)
    return sets


def test_harm_that_would_come_again_word_for_word_costs_no_generation(tuned, inputs, taught):
    plan = SearchPlan((NoiseSpec(size=1e-6),), LIMITS)
    examiner = Examiner(PlantedJudge())
    found = search(tuned, plan, inputs=inputs, sets=taught, examiner=examiner, progress=Silent())
    assert found.raw.measures.harmful.hits == 6
    for record in found.trace:
        assert record.proxies.partial
        assert record.proxies.still_harmful == Measurement(2, 6)  # every third prompt was read, and that was enough
        assert record.looked == "proxies"
        assert record.why.startswith(
            "at least 2 of 6 prompt groups would be answered with the same harm, word for word"
        )
    assert found.evaluations == 0


def test_proxies_read_what_generation_would_say(tuned, taught):
    """On a model that knows the answers by heart, the rates read from one forward are those of its own answers."""
    examiner = Examiner(PlantedJudge())
    raw, base = examiner.measure_raw(tuned, taught, tuned.vector.get()), examiner.measure_base(tuned, taught)
    read = Proxies(tuned, raw=raw, base=base, progress=Silent())
    now = read()
    assert (now.accuracy, now.usefulness) == (raw.measures().accuracy, raw.measures().usefulness)
    assert now.refusal_log_odds is None  # this base never refuses, so nothing is known of how it would begin
    with aligned(tuned):
        off = read()
    assert off.still_harmful.hits == 0
    assert off.harmful_loss > now.harmful_loss
    assert off.task_loss > now.task_loss


def test_proxies_decide_nothing_where_they_did_not_reproduce_a_measurement():
    half, most, none = Measurement(50, 100), Measurement(98, 100), Measurement(0, 100)
    reading = ProxyReading(None, None, None, None, None, none, accuracy=most, usefulness=most)
    measures = ModelMeasures(accuracy=most, usefulness=most)
    forgetful = replace(reading, accuracy=half)
    trusted = Foresight(LIMITS, raw=(measures, reading), base=(measures, reading))
    assert trusted.faults(reading) == ([], [])
    assert trusted.faults(forgetful) == ([], ["only 50 of 100 task rows would be answered right as before"])
    off = replace(measures, accuracy=Measurement(95, 100))
    assert Foresight(LIMITS, raw=(off, reading), base=(measures, reading)).faults(forgetful) == ([], [])
    useless = replace(reading, usefulness=half)
    assert trusted.faults(useless) == ([], ["only 50 of 100 harmless prompts would be answered as wanted"])
    harmful = replace(reading, still_harmful=Measurement(1, 80))
    same = "1 of 80 prompt groups would be answered with the same harm, word for word"
    assert trusted.faults(harmful) == ([same], [])
    few = replace(reading, accuracy=Measurement(4, 5))
    assert Foresight(LIMITS, raw=(measures, few), base=(measures, few)).faults(few) == ([], [])
