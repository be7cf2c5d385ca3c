"""A dense weight change brought back to the rank of an adapter.

Knows: the truncated singular value decomposition, exact where it is cheap and by subspace iteration elsewhere, always
from the same start, and what the truncation loses.
Refuses to know: how the dense change came about, and scaling factors.
"""

from __future__ import annotations

import torch
from torch import Tensor

EXACT_SIDE = 512  # up to here a full decomposition takes well under a second
OVERSAMPLING = 16  # extra columns, so that the last wanted direction converges too
ITERATIONS = 8


def refit(dense: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """B (d_out, rank), A (rank, d_in), balanced and fp32, with B @ A nearest to `dense`, and the share of energy lost.

    The share is ||dense - B A||^2 / ||dense||^2, 0 for a matrix of zeros. Where `dense` has a lower rank than asked
    for, the remaining columns and rows are zero.
    """
    matrix = dense.double()
    U, S, Vh = _leading(matrix, rank)
    root = S.sqrt()
    B, A = matrix.new_zeros(len(matrix), rank), matrix.new_zeros(rank, matrix.shape[1])
    B[:, : len(S)], A[: len(S)] = U * root, root[:, None] * Vh
    energy, lost = float(matrix.square().sum()), float((matrix - B @ A).square().sum())
    return B.float(), A.float(), lost / energy if energy > 0 else 0.0


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (d_out, k), S (k,), Vh (k, d_in): the leading singular triples, `rank` of them or as many as there are."""
    side, width = min(matrix.shape), rank + OVERSAMPLING
    if side <= max(EXACT_SIDE, width):
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        return U[:, :rank], S[:rank], Vh[:rank]
    # Drawn on the CPU by a generator of its own: the same start on every device, whatever was drawn before.
    start = torch.randn(matrix.shape[1], width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(matrix @ start.to(matrix.device)).Q
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    small, S, Vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ small)[:, :rank], S[:rank], Vh[:rank]
