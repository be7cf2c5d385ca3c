"""Singular directions: small and large matrices, thin products, and how many directions hold an energy."""

import pytest
import torch

from workers.ml.recovery import spectra
from workers.ml.recovery.spectra import dominant_spectrum, full_spectrum, spectrum_of_product


def matrix(rows: int, columns: int, *, decay: float = 0.5, seed: int = 0) -> torch.Tensor:
    """Singular values 1, decay, decay^2, ..."""
    generator = torch.Generator().manual_seed(seed)
    side = min(rows, columns)
    U = torch.linalg.qr(torch.randn(rows, side, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(columns, side, generator=generator, dtype=torch.float64)).Q
    return ((U * decay ** torch.arange(side)) @ V.T).float()


def test_a_product_is_decomposed_without_being_formed():
    left, right = torch.randn(9, 3, generator=torch.Generator().manual_seed(1)), matrix(3, 7)
    found = spectrum_of_product(left, right)
    assert torch.allclose((found.U * found.S) @ found.V.T, left.double() @ right.double())
    B, A = found.factors(0, 3)
    assert torch.allclose(B @ A, left @ right, atol=1e-5)
    assert found.lost(3) == 0.0
    assert found.energy == pytest.approx(float((left @ right).square().sum()), rel=1e-5)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_large_matrices_give_the_same_triples_through_their_gram_matrix(shape, monkeypatch):
    values = matrix(*shape, decay=0.8)
    small = full_spectrum(values)
    monkeypatch.setattr(spectra, "EXACT_SIDE", 4)
    large = full_spectrum(values)
    assert torch.allclose(small.S, large.S, atol=1e-6)
    assert torch.allclose((large.U * large.S) @ large.V.T, values.double(), atol=1e-6)


@pytest.mark.parametrize(("energy", "directions"), [(0.7, 1), (0.76, 2), (0.95, 3), (0.999, 5)])
def test_the_fewest_directions_that_hold_the_energy_are_kept(energy, directions):
    found = dominant_spectrum(matrix(40, 25), energy, seed=0)  # energies 3/4, 3/16, 3/64, ...
    assert len(found.S) == directions
    assert found.lost(directions) <= (1 - energy) * found.energy


def test_a_sketch_grows_until_it_holds_enough_and_is_the_same_each_time(monkeypatch):
    monkeypatch.setattr(spectra, "EXACT_SIDE", 4)
    monkeypatch.setattr(spectra, "FIRST_SKETCH", 2)
    values = matrix(80, 60, decay=0.9)
    exact = torch.linalg.svd(values.double())
    wanted = int((exact.S.square().cumsum(0) < 0.9 * exact.S.square().sum()).sum()) + 1
    found, again = (dominant_spectrum(values, 0.9, seed=3) for _ in range(2))
    assert torch.equal(found.U, again.U) and torch.equal(found.V, again.V)
    assert wanted <= len(found.S) <= wanted + 1
    assert torch.allclose(found.S[:5], exact.S[:5], rtol=1e-4)
    flat = torch.eye(60)  # no direction is dominant: the sketch gives up and everything is decomposed
    assert len(dominant_spectrum(flat, 0.9, seed=3).S) == 54


def test_of_nothing_no_direction_is_dominant():
    assert len(dominant_spectrum(torch.zeros(5, 4), 0.95, seed=0).S) == 0
