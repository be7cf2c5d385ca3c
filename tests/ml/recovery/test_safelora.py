"""SafeLoRA: oracle O7, the dial's counting rule and nested sets."""

import pytest
import torch

from workers.ml.recovery.deltas import module_changes
from workers.ml.recovery.methods import safelora
from workers.ml.recovery.methods.safelora import cosine, layers_projected, projected
from workers.ml.recovery.specs import SafeLoraSpec
from workers.ml.types import Silent

B, A = torch.tensor([[1.0], [1]]), torch.tensor([[1.0, 0]])


def test_the_projection_and_its_cosine_match_the_oracle():
    V = torch.diag(torch.tensor([2.0, 1]))
    C = V @ V.T / V.norm()
    assert C.diag().tolist() == pytest.approx([1.788854, 0.447214], abs=1e-6)
    assert (C @ C).diag().tolist() == pytest.approx([3.2, 0.2], abs=1e-6)  # not idempotent: no projector
    CB = projected(V, B, "published")
    assert CB.flatten().tolist() == pytest.approx([1.788854, 0.447214], abs=1e-6)
    assert torch.allclose(CB, C @ B, atol=1e-6)
    assert cosine(CB, B, A) == pytest.approx(0.85749, abs=1e-5)
    V = torch.diag(torch.tensor([2.0, 0]))
    assert projected(V, B, "published").flatten().tolist() == pytest.approx([2, 0])
    assert cosine(projected(V, B, "published"), B, A) == pytest.approx(0.70711, abs=1e-5)


def test_the_exact_projector_is_one():
    V = torch.diag(torch.tensor([2.0, 0]))
    once = projected(V, B, "exact")
    assert once.flatten().tolist() == pytest.approx([1, 0])
    assert torch.allclose(projected(V, once, "exact"), once)
    assert torch.allclose(projected(torch.diag(torch.tensor([2.0, 1])), B, "exact"), B)  # full rank: nothing changes
    tall = torch.tensor([[1.0, 0], [1, 0], [0, 0]])
    assert projected(tall, torch.tensor([[1.0], [0], [5]]), "exact").flatten().tolist() == pytest.approx([0.5, 0.5, 0])


def test_the_factored_product_equals_the_matrix_on_any_shape():
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((12, 30), (30, 12)):
        V, wide_B = torch.randn(rows, columns, generator=generator), torch.randn(rows, 4, generator=generator)
        C = V @ V.T / V.norm()
        assert torch.allclose(projected(V, wide_B, "published"), C @ wide_B, rtol=1e-5, atol=1e-5)
        wide_A = torch.randn(4, 9, generator=generator)
        flat = torch.nn.functional.cosine_similarity(
            (C @ wide_B @ wide_A).flatten(), (wide_B @ wide_A).flatten(), dim=0
        )
        assert cosine(C @ wide_B, wide_B, wide_A) == pytest.approx(float(flat), abs=1e-5)


def test_differences_as_small_as_rounding_still_have_a_direction():
    V = 1e-15 * torch.diag(torch.tensor([2.0, 1]))
    assert cosine(projected(V, B, "published"), B, A) == pytest.approx(0.85749, abs=1e-5)


def test_the_share_of_layers_is_rounded_to_the_nearest_and_never_to_none():
    assert [layers_projected(s, 10) for s in (0.01, 0.14, 0.15, 0.5, 1.0)] == [1, 1, 2, 5, 10]
    assert layers_projected(0.25, 14) == 4  # 3.5: a half counts up
    assert layers_projected(1.0, 0) == 0


def test_stronger_settings_project_the_same_layers_and_more(tuned, inputs):
    path = safelora.prepare(tuned, SafeLoraSpec(), inputs, Silent())
    layers, before = len(tuned.vector.pairs()), set()
    for strength in (0.1, 0.25, 0.5, 0.75, 1.0):
        moved = path.at(strength)
        changed = {name for name, change in module_changes(tuned.vector, moved, path.raw).items() if change > 0}
        assert set(path.facts_at(strength)["projected"]) == changed
        assert len(changed) == layers_projected(strength, layers)
        assert before < changed
        before = changed
        parts, raw = tuned.vector.split(moved.factors), tuned.vector.split(path.raw)
        assert all(torch.equal(parts[pair.a_name], raw[pair.a_name]) for pair in tuned.vector.pairs())


def test_a_threshold_limits_the_layers_and_minus_one_allows_none(tuned, inputs):
    everything = safelora.prepare(tuned, SafeLoraSpec(), inputs, Silent())
    median = everything.facts["median_cosine"]
    some = safelora.prepare(tuned, SafeLoraSpec(threshold=median), inputs, Silent())
    assert 0 < some.facts["eligible"] < everything.facts["eligible"] == len(tuned.vector.pairs())
    assert len(some.facts_at(1.0)["projected"]) == some.facts["eligible"]
    none = safelora.prepare(tuned, SafeLoraSpec(threshold=-1.0), inputs, Silent())
    assert none.facts["eligible"] == 0
    assert torch.equal(none.at(1.0).factors, none.raw)


def test_a_layer_without_displacement_is_not_touched(tuned, inputs, monkeypatch):
    pairs = tuned.vector.pairs()
    original = safelora.Displacement.of

    def of(self, pair):
        found = original(self, pair)
        return torch.zeros_like(found) if pair == pairs[0] else found

    monkeypatch.setattr(safelora.Displacement, "of", of)
    path = safelora.prepare(tuned, SafeLoraSpec(), inputs, Silent())
    assert path.facts["layers_left_alone"] == 1
    assert pairs[0].module_name not in path.facts_at(1.0)["projected"]
    assert path.at(1.0).is_finite()
