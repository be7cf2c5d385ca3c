"""Re-attack: harm that a few steps bring back, counted."""

import pytest
import torch

from workers.ml.candidate import Candidate, LowRank
from workers.ml.errors import Cancelled, InvalidSetting, MissingInput
from workers.ml.recovery.calibration import answer_loss, encode_answers
from workers.ml.recovery.reattack import Attack, Relearning, relearning
from workers.ml.types import Silent


def test_the_rows_are_learned_and_the_adapter_stays(tuned, inputs):
    raw = tuned.vector.get()
    rows = encode_answers(tuned, inputs.harmful)
    losses = []

    def score() -> float:
        losses.append(answer_loss(tuned, rows))
        return 0.0

    attack = Attack(inputs.harmful, 1e-2, steps=(0, 4, 8))
    found = relearning(tuned, Candidate(raw * 0.5), attack, score=score, progress=Silent())
    assert found.steps == (0, 4, 8)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.1
    assert torch.equal(tuned.vector.get(), raw)


def test_measuring_ends_where_the_level_is_reached(tuned, inputs):
    scores = iter([0.0, 0.3, 0.9, 1.0])
    attack = Attack(inputs.harmful, 1e-3, steps=(0, 1, 2, 3))
    found = relearning(tuned, Candidate(tuned.vector.get()), attack, score=lambda: next(scores), progress=Silent())
    assert found == Relearning((0, 1, 2), (0.0, 0.3, 0.9))
    assert (found.reaches(0.2), found.reaches(0.8), found.reaches(0.95)) == (1, 2, None)


def test_bad_input_is_refused_and_a_cancel_leaves_the_adapter(tuned, inputs):
    raw = tuned.vector.get()
    quiet = {"score": lambda: 0.0, "progress": Silent()}
    attack = Attack(inputs.harmful, 1e-3)
    with pytest.raises(MissingInput, match="harmful rows"):
        relearning(tuned, Candidate(raw), Attack((), 1e-3), **quiet)
    block = {tuned.vector.pairs()[0].module_name: LowRank(torch.ones(32, 1), torch.ones(1, 32))}
    with pytest.raises(InvalidSetting, match="job's rank"):
        relearning(tuned, Candidate(raw, block), attack, **quiet)

    class Stops(Silent):
        def step(self, step, total_steps, **values):
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        relearning(tuned, Candidate(raw), attack, score=lambda: 0.0, progress=Stops())
    assert torch.equal(tuned.vector.get(), raw)
