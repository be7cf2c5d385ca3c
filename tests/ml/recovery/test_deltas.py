"""Norms of weight changes that are never formed, and the balanced gauge (oracles O3, O5)."""

import pytest
import torch

from workers.ml.recovery.deltas import (
    balanced,
    balanced_factors,
    delta_norm,
    difference_norm,
    product_norm,
    relative_change,
    unit_scaling,
)

A = torch.tensor([[1.0, -2, 0.5], [0.2, 1, 3]])
B = torch.tensor([[1.0, 0.5], [-2, 1]])


def test_the_product_norm_matches_the_oracle():
    assert product_norm(B, A) == pytest.approx(6.300794, abs=1e-6)
    assert product_norm(B, A) == pytest.approx(float((B @ A).norm()), rel=1e-6)


def test_the_difference_norm_keeps_its_digits_for_tiny_changes():
    near = A + 1e-6
    exact = float((B.double() @ near.double() - B.double() @ A.double()).norm())
    assert difference_norm((B, near), (B, A)) == pytest.approx(exact, rel=1e-6)
    assert difference_norm((B, A), (B, A)) == 0.0
    other = torch.tensor([[3.0, 1], [0, 2]])
    assert difference_norm((other, A), (B, A)) == pytest.approx(float((other @ A - B @ A).norm()), rel=1e-6)


@pytest.mark.parametrize("mix", [torch.eye(2) * 10, torch.tensor([[2.0, 1], [0.5, -3]])])
def test_balanced_factors_keep_the_product_and_forget_the_split(mix):
    mixed_B, mixed_A = balanced_factors(B @ mix, torch.linalg.inv(mix) @ A)
    plain_B, _ = balanced_factors(B, A)
    assert torch.allclose(mixed_B @ mixed_A, B @ A, atol=1e-5)
    assert torch.allclose(mixed_B.T @ mixed_B, mixed_A @ mixed_A.T, atol=1e-5)
    assert torch.allclose((plain_B.T @ plain_B).diag(), (mixed_B.T @ mixed_B).diag(), atol=1e-5)


def test_a_rank_larger_than_the_layer_keeps_its_shape():
    wide_B, tall_A = torch.randn(3, 5), torch.randn(5, 4)
    new_B, new_A = balanced_factors(wide_B, tall_A)
    assert (new_B.shape, new_A.shape) == (wide_B.shape, tall_A.shape)
    assert torch.allclose(new_B @ new_A, wide_B @ tall_A, atol=1e-5)


def test_an_adapter_is_measured_with_its_scaling(tuned):
    vector, raw = tuned.vector, tuned.vector.get()
    parts = vector.split(raw)
    squares = sum(float((p.scaling * parts[p.b_name] @ parts[p.a_name]).norm()) ** 2 for p in vector.pairs())
    assert delta_norm(vector, raw) == pytest.approx(squares**0.5, rel=1e-5)
    assert relative_change(vector, raw, raw) == 0.0
    halved = raw.clone()
    for pair in vector.pairs():
        vector.split(halved)[pair.b_name].mul_(0.5)
    assert relative_change(vector, halved, raw) == pytest.approx(0.5, rel=1e-5)


def test_a_change_of_a_zero_adapter_has_no_relative_size(tuned):
    zero = torch.zeros(tuned.vector.numel)
    assert relative_change(tuned.vector, tuned.vector.get(), zero) is None


def test_balancing_a_whole_adapter_leaves_the_model_as_it_was(tuned):
    ids = torch.arange(10)[None]
    with torch.no_grad():
        before = tuned.model(input_ids=ids).logits
        new = balanced(tuned.vector, tuned.vector.get())
        with tuned.vector.swapped(new):
            after = tuned.model(input_ids=ids).logits
    assert torch.allclose(before, after, atol=1e-4)
    assert not torch.equal(new, tuned.vector.get())
    assert unit_scaling(tuned.vector).unique().tolist() == pytest.approx([2**0.5])
