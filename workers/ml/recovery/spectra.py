"""Singular values and directions: of a product of thin matrices, of a whole matrix, and the dominant ones of it.

Knows: exact decompositions of small matrices, seeded randomised ones of large ones, and how much a truncation loses.
Refuses to know: adapters, models, and what a matrix stands for.

Everything is computed in fp64 except the passes over a large matrix itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EXACT_SIDE = 1024  # up to this many rows or columns a full decomposition takes seconds at most
POWER_ITERATIONS = 3
FIRST_SKETCH = 64


@dataclass(frozen=True)
class Spectrum:
    """Leading singular triples, descending: `U` (rows, k), `S` (k,), `V` (columns, k), in fp64.

    `energy` is the squared Frobenius norm of the whole matrix, of which `S` may hold a part.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    energy: float

    def first(self, k: int) -> Spectrum:
        return Spectrum(self.U[:, :k], self.S[:k], self.V[:, :k], self.energy)

    def lost(self, k: int) -> float:
        """Energy of the matrix that its first k triples do not hold."""
        return max(0.0, self.energy - float(self.S[:k].square().sum()))

    def factors(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """The triples in between as a balanced product: (rows, n) @ (n, columns), fp32."""
        root = self.S[begin:end].sqrt()
        return (self.U[:, begin:end] * root).float(), (root[:, None] * self.V[:, begin:end].T).float()


def spectrum_of_product(left: Tensor, right: Tensor) -> Spectrum:
    """Of `left @ right` without forming it: (rows, n) and (n, columns) with a small n."""
    q_left, r_left = torch.linalg.qr(left.double())
    q_right, r_right = torch.linalg.qr(right.double().T)
    U, S, Vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return Spectrum(q_left @ U, S, q_right @ Vh.T, float(S.square().sum()))


def full_spectrum(matrix: Tensor) -> Spectrum:
    """Every triple. Directions of singular values below 1e-6 of the largest are not to be trusted in large matrices."""
    wide = matrix.double()
    energy = float(wide.square().sum())
    if min(wide.shape) <= EXACT_SIDE:
        U, S, Vh = torch.linalg.svd(wide, full_matrices=False)
        return Spectrum(U, S, Vh.T, energy)
    # Through the smaller Gram matrix: several times faster, and its squared condition is what fp64 is for.
    tall = wide.shape[0] > wide.shape[1]
    gram = wide.T @ wide if tall else wide @ wide.T
    values, vectors = torch.linalg.eigh(gram)
    S, near = values.flip(0).clamp_min(0).sqrt(), vectors.flip(1)
    far = (wide if tall else wide.T) @ near / S.clamp_min(torch.finfo(S.dtype).tiny)
    return Spectrum(far, S, near, energy) if tall else Spectrum(near, S, far, energy)


def dominant_spectrum(matrix: Tensor, energy: float, *, seed: int) -> Spectrum:
    """The fewest leading triples that hold `energy` of the squared norm; none for a matrix of zeros.

    Of a large matrix a sketch is doubled until it holds enough; it may need a few directions more than the fewest.
    """
    side, sketch = min(matrix.shape), FIRST_SKETCH
    while side > EXACT_SIDE and sketch <= side // 4:
        found = _sketched(matrix, sketch, seed)
        if found.lost(sketch) <= (1 - energy) * found.energy:
            return found.first(_enough(found, energy))
        sketch *= 2
    found = full_spectrum(matrix)
    return found.first(_enough(found, energy))


def _enough(found: Spectrum, energy: float) -> int:
    held = found.S.square().cumsum(0)
    wanted = energy * found.energy * (1 - 1e-12)  # rounding must not ask for directions that hold nothing
    return min(len(held), int((held < wanted).sum()) + 1) if found.energy > 0 else 0


def _sketched(matrix: Tensor, size: int, seed: int) -> Spectrum:
    """Randomised range finder (Halko, Martinsson, Tropp 2011), the same on every device up to rounding."""
    values = matrix.float()
    draw = torch.randn(values.shape[1], size, generator=torch.Generator().manual_seed(seed))
    basis = torch.linalg.qr(values @ draw.to(values.device)).Q
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(values @ torch.linalg.qr(values.T @ basis).Q).Q
    small = (basis.T @ values).double()
    U, S, Vh = torch.linalg.svd(small, full_matrices=False)
    return Spectrum(basis.double() @ U, S, Vh.T, float(values.double().square().sum()))
