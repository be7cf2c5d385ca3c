"""The weight change of an adapter, measured and re-parametrised without ever forming a weight matrix.

Knows: for `delta = s * B @ A`: its norm, the distance between two of them, and the balanced gauge.
Refuses to know: why an adapter is changed, and data.

Shapes: A is (rank, d_in), B is (d_out, rank).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from workers.ml.candidate import Candidate, LowRank
from workers.ml.tuning.lora_vector import LoraVector


def product_norm(B: Tensor, A: Tensor) -> float:
    """Frobenius norm of B @ A as sqrt(tr((B^T B)(A A^T))), in fp64."""
    B, A = B.double(), A.double()
    return math.sqrt(max(0.0, float(((B.T @ B) * (A @ A.T).T).sum())))


def difference_norm(new: tuple[Tensor, Tensor], old: tuple[Tensor, Tensor]) -> float:
    """Frobenius norm of B1 @ A1 - B0 @ A0, by QR of the concatenated factors, so that small changes keep digits."""
    (B1, A1), (B0, A0) = new, old
    left = torch.cat([B1, B0 - B1], dim=1).double()  # B1 (A1 - A0) - (B0 - B1) A0
    right = torch.cat([A1 - A0, -A0], dim=0).double()
    r_left = torch.linalg.qr(left, mode="r").R
    r_right = torch.linalg.qr(right.T, mode="r").R
    return float(torch.linalg.matrix_norm(r_left @ r_right.T))


def delta_norm(vector: LoraVector, values: Tensor) -> float:
    """Norm of the whole adapter's weight change at `values`."""
    parts = vector.split(values)
    return math.sqrt(sum((p.scaling * product_norm(parts[p.b_name], parts[p.a_name])) ** 2 for p in vector.pairs()))


def module_changes(vector: LoraVector, new: Candidate | Tensor, old: Candidate | Tensor) -> dict[str, float]:
    """||delta_new - delta_old|| of every adapted module; `old` has no side terms."""
    new, old = (Candidate(one) if isinstance(one, Tensor) else one for one in (new, old))
    after, before = vector.split(new.factors), vector.split(old.factors)
    changes = {}
    for pair in vector.pairs():
        B, A = after[pair.b_name] * pair.scaling, after[pair.a_name]
        start = (before[pair.b_name] * pair.scaling, before[pair.a_name])
        side = new.beside.get(pair.module_name)
        if isinstance(side, LowRank):
            (B1, A1), (B0, A0) = (torch.cat([B, side.B], dim=1), torch.cat([A, side.A])), start
            pad = side.rank
            start = (torch.cat([B0, B0.new_zeros(len(B0), pad)], dim=1), torch.cat([A0, A0.new_zeros(pad, len(A0.T))]))
            changes[pair.module_name] = difference_norm((B1, A1), start)
        elif side is not None:
            change = (B @ A - start[0] @ start[1]).index_put((side.rows, side.columns), side.values, accumulate=True)
            changes[pair.module_name] = float(torch.linalg.matrix_norm(change.double()))
        else:
            changes[pair.module_name] = difference_norm((B, A), start)
    return changes


def relative_change(vector: LoraVector, new: Candidate | Tensor, old: Candidate | Tensor) -> float | None:
    """||delta_new - delta_old|| / ||delta_old||; None where the old change is zero and the new one is not."""
    change = math.sqrt(sum(norm**2 for norm in module_changes(vector, new, old).values()))
    if change == 0.0:
        return 0.0
    size = delta_norm(vector, old.factors if isinstance(old, Candidate) else old)
    return change / size if size > 0 else None


def balanced_factors(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """The factors U sqrt(S), sqrt(S) V^T of the same product: the split of scale on which B and A agree.

    Rank is kept: where the product has a lower rank, the remaining columns and rows are zero.
    """
    q_left, r_left = torch.linalg.qr(B.double())
    q_right, r_right = torch.linalg.qr(A.double().T)
    U, S, Vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    root = S.sqrt()
    balanced_B, balanced_A = torch.zeros_like(B), torch.zeros_like(A)
    balanced_B[:, : len(S)] = (q_left @ U * root).to(B.dtype)
    balanced_A[: len(S)] = (root[:, None] * (Vh @ q_right.T)).to(A.dtype)
    return balanced_B, balanced_A


def mixed(vector: LoraVector, start: Tensor, end: Tensor, share: float) -> Tensor:
    """Factors of the job's rank nearest to (1 - share) * delta_start + share * delta_end, module by module, balanced.

    For two points whose factors are different splits of their updates: between the factors themselves lies nothing.
    """
    before, after, parts = vector.split(start), vector.split(end), {}
    for pair in vector.pairs():
        a, b = pair.a_name, pair.b_name
        B = torch.cat([(1 - share) * before[b], share * after[b]], dim=1)
        wide_B, wide_A = balanced_factors(B, torch.cat([before[a], after[a]]))
        rank = len(before[a])
        parts[b], parts[a] = wide_B[:, :rank].contiguous(), wide_A[:rank].contiguous()
    return vector.join(parts)


def balanced(vector: LoraVector, values: Tensor) -> Tensor:
    """The same weight change with every pair of factors balanced."""
    parts = dict(vector.split(values))
    for pair in vector.pairs():
        parts[pair.b_name], parts[pair.a_name] = balanced_factors(parts[pair.b_name], parts[pair.a_name])
    return vector.join(parts)


def unit_scaling(vector: LoraVector) -> Tensor:
    """sqrt(scaling) for every coordinate: `values * unit_scaling` are the factors of an adapter with scaling 1.

    Norms of perturbations are measured there; in the stored factors the same number would move the weights more
    or less depending on lora_alpha.
    """
    parts = vector.split(torch.ones(vector.numel, device=vector.device))
    for pair in vector.pairs():
        for name in (pair.a_name, pair.b_name):
            parts[name].fill_(math.sqrt(pair.scaling))
    return vector.join(parts)
