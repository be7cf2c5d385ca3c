"""Scale-down, noise and random masks: the controls every method is compared with (oracles O6, O10)."""

import pytest
import torch

from workers.ml.errors import NumericError
from workers.ml.recovery.deltas import balanced, relative_change, unit_scaling
from workers.ml.recovery.methods import noise, random_mask, scale_down
from workers.ml.recovery.specs import NoiseSpec, RandomMaskSpec, ScaleDownSpec
from workers.ml.types import Silent

IDS = torch.arange(12)[None]


def logits(tuned) -> torch.Tensor:
    with torch.no_grad():
        return tuned.model(input_ids=IDS).logits


def test_scaling_takes_the_stated_share_of_the_change(tuned, inputs):
    path = scale_down.prepare(tuned, ScaleDownSpec(), inputs, Silent())
    assert relative_change(tuned.vector, path.at(0.25).factors, path.raw) == pytest.approx(0.25, rel=1e-5)


def test_a_change_scaled_to_nothing_is_the_aligned_model_bit_for_bit(tuned, inputs):
    path = scale_down.prepare(tuned, ScaleDownSpec(), inputs, Silent())
    with tuned.model.disable_adapter():
        aligned = logits(tuned)
    with tuned.vector.swapped(path.at(1.0).factors):
        assert torch.equal(logits(tuned), aligned)


def test_restoring_masked_weights_is_zeroing_the_change():
    """O10: with a frozen base, going back to the aligned value is the same as dropping that entry of the delta."""
    tuned_w, aligned_w = torch.tensor([1, 0.5, -0.2, 0.8, 0.3]), torch.tensor([0.6, 0.9, -0.2, 1, 0.1])
    gradient = torch.tensor([0.5, -0.3, 0.9, 0.2, 0.1])
    drift = tuned_w - aligned_w
    candidates = drift * gradient > 0
    assert candidates.tolist() == [True, True, False, False, True]
    threshold = gradient.abs()[candidates].topk(2).values[-1]
    strict = candidates & (gradient.abs() > threshold)
    assert torch.where(strict, aligned_w, tuned_w).tolist() == pytest.approx([0.6, 0.5, -0.2, 0.8, 0.3])
    for mask in (strict, candidates & (gradient.abs() >= threshold), torch.zeros(5, dtype=torch.bool)):
        assert torch.allclose(torch.where(mask, aligned_w, tuned_w), aligned_w + drift.masked_fill(mask, 0))


def test_random_masks_prune_as_many_as_scores_would_and_nest(tuned, inputs):
    path = random_mask.prepare(tuned, RandomMaskSpec(granularity="global"), inputs, Silent())
    small, large = path.at(0.1).factors == 0, path.at(0.3).factors == 0
    assert int(small.sum()) == int(0.1 * tuned.vector.numel + 1e-9) == path.facts_at(0.1)["pruned"]
    assert bool((small <= large).all())


def test_another_seed_is_another_draw_and_the_same_seed_the_same_bytes(tuned, inputs):
    for prepare, spec in ((noise.prepare, NoiseSpec), (random_mask.prepare, RandomMaskSpec)):
        first, again, other = (prepare(tuned, spec(seed=s), inputs, Silent()).at(0.3).factors for s in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_norm_matched_noise_has_exactly_the_length_asked_for(tuned, inputs):
    path = noise.prepare(tuned, NoiseSpec(size=0.15), inputs, Silent())
    start, unit = balanced(tuned.vector, path.raw), unit_scaling(tuned.vector)
    length = float(((path.at(2.0).factors - start) * unit).norm())
    assert length == pytest.approx(0.3 * float((start * unit).norm()), rel=1e-4)
    absolute = noise.prepare(tuned, NoiseSpec(size=1.5, size_unit="norm", regauge=False), inputs, Silent())
    assert float((absolute.at(1.0).factors - absolute.raw).norm()) == pytest.approx(1.5, rel=1e-4)


def test_noise_by_standard_deviation_has_the_expected_norm(tuned, inputs):
    path = noise.prepare(tuned, NoiseSpec(size=0.01, size_unit="std", regauge=False), inputs, Silent())
    assert path.facts["noise_norm"] == pytest.approx(0.01 * tuned.vector.numel**0.5, rel=0.05)


def test_noise_relative_to_a_zero_adapter_is_refused(tuned, inputs):
    tuned.vector.set(torch.zeros(tuned.vector.numel))
    with pytest.raises(NumericError, match="adapter is zero"):
        noise.prepare(tuned, NoiseSpec(), inputs, Silent())
