"""RESTA: oracle O8, and that the unaligned copy stays where it was made."""

import json

import pytest
import torch

from workers.ml.candidate import applied, joined
from workers.ml.recovery.calibration import answer_loss, encode_answers
from workers.ml.recovery.methods import resta
from workers.ml.recovery.specs import RestaSpec
from workers.ml.types import Silent

FAST = RestaSpec(steps=4, rank=2, learning_rate=1e-2)


def deltas(vector, values):
    parts = vector.split(values)
    return {p.module_name: p.scaling * parts[p.b_name] @ parts[p.a_name] for p in vector.pairs()}


def moved(vector, candidate):
    return {name: term.dense() for name, term in joined(vector, candidate).items()}


@pytest.mark.parametrize(("b", "expected"), [(0.5, [1.15, 2, 2]), (1.0, [0.9, 2.5, 2])])
def test_the_sum_of_weights_matches_the_oracle(tuned, b, expected):
    """Aligned (1, 2, 3), unaligned (1.5, 1, 3), fine-tuned (1.4, 1.5, 2), as the first row of a layer."""
    aligned = torch.tensor([1.0, 2, 3])
    pair = tuned.vector.pairs()[0]
    values = {name: torch.zeros(tuned.vector.numel) for name in ("tuned", "unaligned")}
    for name, weights in (("tuned", [1.4, 1.5, 2]), ("unaligned", [1.5, 1, 3])):
        parts = tuned.vector.split(values[name])
        parts[pair.b_name][0, 0] = 1 / pair.scaling
        parts[pair.a_name][0, :3] = torch.tensor(weights) - aligned
    found = resta._moved(tuned.vector, values["tuned"], values["unaligned"], b, 2)
    whole = moved(tuned.vector, found)[pair.module_name]
    assert (aligned + whole[0, :3]).tolist() == pytest.approx(expected, abs=1e-6)
    assert float(whole[1:].abs().max()) == 0


def test_the_result_is_the_update_minus_a_multiple_of_the_harmful_one(tuned, inputs):
    raw = tuned.vector.get()
    path = resta.prepare(tuned, FAST, inputs, Silent())
    whole = {strength: moved(tuned.vector, path.at(strength)) for strength in (0.5, 1.0)}
    for name, start in deltas(tuned.vector, raw).items():
        half, full = whole[0.5][name] - start, whole[1.0][name] - start
        assert float(half.norm()) > 0
        assert torch.allclose(2 * half, full, atol=1e-5)
        assert int(torch.linalg.matrix_rank(full, rtol=1e-4)) <= 2


def test_the_copy_is_trained_from_the_aligned_base_on_harmful_answers(tuned, inputs):
    """Adding the safety vector makes its answers less likely, the more of it the less."""
    tuned.vector.set(0.05 * tuned.vector.get())
    path = resta.prepare(tuned, RestaSpec(steps=20, rank=4, learning_rate=1e-2), inputs, Silent())
    assert path.facts["harmful_loss_last"] < 0.95 * path.facts["harmful_loss_first"]
    rows = encode_answers(tuned, inputs.harmful)
    losses = []
    for strength in (0.0, 0.01, 0.1):
        with applied(tuned, path.at(strength)):
            losses.append(answer_loss(tuned, rows))
    assert losses == sorted(losses)


def test_fresh_factors_are_the_aligned_base_and_use_the_rank_asked_for(tuned):
    fresh = resta.fresh_factors(tuned.vector, rank=2, seed=5)
    assert torch.equal(fresh, resta.fresh_factors(tuned.vector, rank=2, seed=5))
    assert not torch.equal(fresh, resta.fresh_factors(tuned.vector, rank=2, seed=6))
    parts = tuned.vector.split(fresh)
    for pair in tuned.vector.pairs():
        A = parts[pair.a_name]
        assert not parts[pair.b_name].any() and not A[2:].any() and bool(A[:2].any())
        assert float(A.abs().max()) <= A.shape[1] ** -0.5


def test_a_rank_above_the_jobs_is_the_jobs(tuned, inputs):
    own = len(tuned.vector.split(tuned.vector.get())[tuned.vector.pairs()[0].a_name])
    assert resta.prepare(tuned, RestaSpec(steps=1, rank=64), inputs, Silent()).facts["rank"] == own


def test_dropping_keeps_the_mean_of_the_update(tuned):
    raw = tuned.vector.get()
    assert resta.dropped(tuned.vector, raw, ratio=0.0, seed=0) is raw
    name = tuned.vector.pairs()[0].module_name
    draws = [deltas(tuned.vector, resta.dropped(tuned.vector, raw, ratio=0.5, seed=s))[name] for s in range(400)]
    expected = deltas(tuned.vector, raw)[name]
    spread = torch.stack(draws).std(dim=0) / 400**0.5
    assert bool(((torch.stack(draws).mean(dim=0) - expected).abs() < 5 * spread + 1e-6).all())
    parts = tuned.vector.split(resta.dropped(tuned.vector, raw, ratio=0.5, seed=0))
    zeros = torch.cat([(parts[pair.b_name] == 0).flatten() for pair in tuned.vector.pairs()]).float().mean()
    assert float(zeros) == pytest.approx(0.5, abs=0.05)


def test_no_block_of_the_result_is_the_unaligned_copy_and_no_fact_names_it(tuned, inputs, monkeypatch):
    tuned.vector.set(0.2 * tuned.vector.get())  # as large as what a few steps make
    kept = {}
    original = resta.train_patch

    def train(*args):
        kept["unaligned"], losses = original(*args)
        return kept["unaligned"], losses

    monkeypatch.setattr(resta, "train_patch", train)
    path = resta.prepare(tuned, FAST, inputs, Silent())
    candidate, bad = path.at(1.0), deltas(tuned.vector, kept["unaligned"])
    for name, term in candidate.beside.items():
        cosine = torch.nn.functional.cosine_similarity(term.dense().flatten(), bad[name].flatten(), dim=0)
        assert abs(float(cosine)) < 0.95
    assert all(isinstance(value, (int, float)) for value in path.facts_of(1.0).values())
    assert len(json.dumps(path.facts_of(1.0))) < 500
