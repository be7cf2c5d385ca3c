"""The gradient of a loss with respect to each adapted module's whole weight, without a weight that requires gradients.

Knows: that dh/dW is the sum over tokens of (output gradient) (input)^T, which hooks see in an ordinary backward pass;
how to sum it exactly for a small module and in a two-sided random sketch for a large one (Tropp, Yurtsever, Udell and
Cevher, SIAM J. Matrix Anal. Appl. 38(4), 2017), so that the gradient of the whole model is never held.
Refuses to know: which loss, and what is done with a gradient.

Shapes: a gradient is (d_out, d_in), inputs are (..., d_in), output gradients (..., d_out).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from workers.ml.errors import NumericError
from workers.ml.tuned_model import TunedModel
from workers.ml.types import Progress

OVERSAMPLING = 16  # directions beyond the wanted ones, which catch what the random ones miss of them
TEST_ROWS = 16  # a third sketch, independent of the first two, from which the energy that was left is estimated


@dataclass(frozen=True)
class Leading:
    """The leading part U diag(S) Vh of a gradient, and the squared norm of the whole (estimated where sketched)."""

    U: Tensor  # (d_out, k), orthonormal columns
    S: Tensor  # (k,), descending
    Vh: Tensor  # (k, d_in), orthonormal rows
    energy: float

    @property
    def kept(self) -> float:
        """Squared norm of the leading part."""
        return float(self.S.square().sum())


class GradientSum(Protocol):
    """One module's gradient while it is summed up."""

    hits: int

    def add(self, x: Tensor, grad: Tensor, weight: float) -> None:
        """Adds weight * grad^T x; `x` (tokens, d_in), `grad` (tokens, d_out), both fp32."""

    def is_finite(self) -> bool: ...

    def leading(self, rank: int) -> Leading:
        """The best approximation of at most that rank that is known."""


class DenseSum:
    """The gradient itself, in fp32."""

    def __init__(self, d_out: int, d_in: int, device: torch.device) -> None:
        self.hits = 0
        self.total = torch.zeros(d_out, d_in, device=device)

    def add(self, x: Tensor, grad: Tensor, weight: float) -> None:
        self.hits += 1
        self.total.addmm_(grad.T, x, alpha=weight)

    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.total).all())

    def leading(self, rank: int) -> Leading:
        U, S, Vh = torch.linalg.svd(self.total.double(), full_matrices=False)
        return Leading(U[:, :rank], S[:rank], Vh[:rank], float(S.square().sum()))


class SketchedSum:
    """Y = G Omega, Z = Psi G and a test sketch T = Theta G, all summed in fp64.

    G is read back as Q X with Q an orthonormal basis of Y and X the least-squares solution of (Psi Q) X = Z: exact for
    a gradient of a rank up to that of Omega, and close where the energy lies in few directions.
    """

    def __init__(self, d_out: int, d_in: int, device: torch.device, *, rank: int, seed: int) -> None:
        self.hits = 0
        across = min(rank + OVERSAMPLING, d_out, d_in)
        self._omega = _gaussian(d_in, across, seed=f"{seed}/omega").to(device)  # (d_in, across)
        self._rows = min(2 * across + 1, d_out)
        # Psi and Theta as columns, (d_out, rows + test rows)
        self._left = _gaussian(d_out, self._rows + TEST_ROWS, seed=f"{seed}/psi").to(device)
        self._Y = torch.zeros(d_out, across, dtype=torch.float64, device=device)
        self._Z = torch.zeros(self._rows + TEST_ROWS, d_in, dtype=torch.float64, device=device)

    def add(self, x: Tensor, grad: Tensor, weight: float) -> None:
        self.hits += 1
        self._Y += weight * (grad.T @ (x @ self._omega))
        self._Z += weight * ((grad @ self._left).T @ x)

    def is_finite(self) -> bool:
        return bool(torch.isfinite(self._Y).all() and torch.isfinite(self._Z).all())

    def leading(self, rank: int) -> Leading:
        Q, _ = torch.linalg.qr(self._Y)
        psi, theta = self._left.double().split([self._rows, TEST_ROWS], dim=1)
        q, r = torch.linalg.qr(psi.T @ Q)
        X = torch.linalg.solve_triangular(r, q.T @ self._Z[: self._rows], upper=True)
        U, S, Vh = torch.linalg.svd(X, full_matrices=False)
        U, S, Vh = Q @ U[:, :rank], S[:rank], Vh[:rank]
        # For Gaussian rows, E ||Theta R||^2 is their number times ||R||^2.
        rest = self._Z[self._rows :] - ((theta.T @ U) * S) @ Vh
        return Leading(U, S, Vh, float(S.square().sum() + rest.square().sum() / TEST_ROWS))


def _gaussian(rows: int, columns: int, *, seed: str) -> Tensor:
    """Drawn on the CPU, so that every device sketches with the same numbers; modules of a width share them."""
    generator = torch.Generator().manual_seed(random.Random(f"{seed}/{rows}").getrandbits(63))
    return torch.randn(rows, columns, generator=generator)


class ModuleGradients:
    """The gradients of every adapted module. Backward passes inside `watching` are added up.

    `dense_bytes`: a module whose gradient takes at most this much in fp32 is summed exactly. A sketch for `rank`
    directions takes 8 (d_out (rank + 16) + d_in (2 rank + 49)) bytes, about 2.5 MB at rank 4 and 4096 x 4096.
    """

    def __init__(self, tuned: TunedModel, *, rank: int, dense_bytes: int, seed: int = 0) -> None:
        self._model, device = tuned.model, tuned.vector.device
        parts = tuned.vector.split(tuned.vector.get())
        self.sums: dict[str, GradientSum] = {}
        for pair in tuned.vector.pairs():
            d_out, d_in = len(parts[pair.b_name]), parts[pair.a_name].shape[1]
            if 4 * d_out * d_in <= dense_bytes:
                self.sums[pair.module_name] = DenseSum(d_out, d_in, device)
            else:
                self.sums[pair.module_name] = SketchedSum(d_out, d_in, device, rank=rank, seed=seed)

    @property
    def sketched(self) -> int:
        """How many modules are sketched."""
        return sum(isinstance(one, SketchedSum) for one in self.sums.values())

    @contextmanager
    def watching(self, weight: float) -> Iterator[None]:
        """Whatever is propagated backwards inside counts, times `weight`."""
        handles = [
            self._model.get_submodule(name).register_forward_hook(_catcher(one, weight))
            for name, one in self.sums.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def leading(self, rank: int, progress: Progress) -> Mapping[str, Leading]:
        """The leading part of every module's gradient. Raises NumericError for a module that no backward reached."""
        found = {}
        for number, (name, one) in enumerate(self.sums.items(), start=1):
            if not one.hits:
                raise NumericError(f"No gradient ever reached {name}: none of the rows makes use of it.", name)
            if not one.is_finite():
                raise NumericError(f"The gradient of {name} is not finite.", name)
            found[name] = one.leading(rank)
            progress.step(number, len(self.sums), part="decomposition")
        return found


def _catcher(one: GradientSum, weight: float) -> Any:
    def forward_hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:  # a forward without a graph, such as the first one under gradient checkpointing
            return
        x = inputs[0].detach()

        def backward_hook(grad: Tensor) -> None:
            one.add(x.reshape(-1, x.shape[-1]).float(), grad.reshape(-1, grad.shape[-1]).float(), weight)

        output.register_hook(backward_hook)

    return forward_hook
