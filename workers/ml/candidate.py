"""A candidate in memory: the job's own factors at some point, and perhaps weight changes that stand beside them.

Knows: low-rank blocks and sparse patches per module, how a model computes with them without a weight of the base being
touched, and how factors and blocks become one adapter of a larger rank.
Refuses to know: which method proposes a candidate, why, and files.

Shapes: A is (rank, d_in), B is (d_out, rank); side terms have scaling 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workers.ml.errors import InvalidSetting
from workers.ml.tuning.lora_vector import LoraVector


@dataclass(frozen=True)
class LowRank:
    """A weight change B @ A."""

    B: Tensor  # (d_out, k)
    A: Tensor  # (k, d_in)

    @property
    def rank(self) -> int:
        return len(self.A)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.B, self.A)

    def forward(self, x: Tensor) -> Tensor:
        """The term's part of the layer's output, in fp32."""
        return F.linear(F.linear(x.float(), self.A), self.B)

    def dense(self) -> Tensor:
        return self.B @ self.A


@dataclass(frozen=True)
class SparsePatch:
    """A weight change at single places: `values[i]` is added at (`rows[i]`, `columns[i]`)."""

    rows: Tensor  # (n,) int64
    columns: Tensor  # (n,) int64
    values: Tensor  # (n,) fp32
    shape: tuple[int, int]  # (d_out, d_in)

    @classmethod
    def of(cls, dense: Tensor) -> SparsePatch:
        """The non-zero entries of a (d_out, d_in) matrix."""
        rows, columns = dense.nonzero(as_tuple=True)
        return cls(rows, columns, dense[rows, columns], (dense.shape[0], dense.shape[1]))

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.rows, self.columns, self.values)

    @property
    def density(self) -> float:
        return len(self.values) / (self.shape[0] * self.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        """The patch's part of the layer's output, in fp32."""
        places = torch.stack([self.rows, self.columns])
        matrix = torch.sparse_coo_tensor(places, self.values, self.shape, check_invariants=False)
        flat = x.float().reshape(-1, x.shape[-1])
        product: Tensor = torch.sparse.mm(matrix, flat.T)  # (d_out, tokens)
        return product.T.reshape(*x.shape[:-1], self.shape[0])

    def dense(self) -> Tensor:
        matrix = torch.zeros(self.shape, device=self.values.device)
        return matrix.index_put_((self.rows, self.columns), self.values, accumulate=True)


SideTerm = LowRank | SparsePatch
DENSE_FROM = 0.05  # there a sparse product takes many times as long, and a dense matrix four times the memory


@dataclass(frozen=True)
class Candidate:
    """`factors` is a flat LoRA vector; `beside` holds the side term of each module that has one."""

    factors: Tensor
    beside: Mapping[str, SideTerm] = field(default_factory=dict)

    @property
    def extra_rank(self) -> int:
        """By how much the rank grows when the blocks are joined to the factors; 0 without blocks."""
        return max((term.rank for term in self.beside.values() if isinstance(term, LowRank)), default=0)

    @property
    def is_adapter(self) -> bool:
        """Whether this candidate can be written as one LoRA adapter; a sparse patch cannot."""
        return not any(isinstance(term, SparsePatch) for term in self.beside.values())

    def tensors(self) -> Iterator[Tensor]:
        yield self.factors
        for name in sorted(self.beside):
            yield from self.beside[name].tensors()

    def is_finite(self) -> bool:
        return all(bool(torch.isfinite(tensor).all()) for tensor in self.tensors())

    @property
    def digest(self) -> str:
        """sha256 of every number and of the names of the modules with a side term."""
        digest = sha256("|".join(sorted(self.beside)).encode()) if self.beside else sha256()
        for tensor in self.tensors():
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


class Tuned(Protocol):
    """A model with an adapter, as far as a candidate needs to know it."""

    @property
    def vector(self) -> LoraVector: ...
    @property
    def side(self) -> SideTerms: ...


@contextmanager
def applied(tuned: Tuned, candidate: Candidate | Tensor) -> Iterator[None]:
    """The model computes as the candidate; afterwards exactly as before. A bare tensor is a candidate's factors."""
    if isinstance(candidate, Tensor):
        candidate = Candidate(candidate)
    with tuned.vector.swapped(candidate.factors), tuned.side.swapped(candidate.beside):
        yield


class SideTerms:
    """The side terms a model computes with at the moment. They are off wherever the adapter is off."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._terms: Mapping[str, SideTerm] = {}
        self._handles: list[Any] = []

    @contextmanager
    def swapped(self, terms: Mapping[str, SideTerm]) -> Iterator[None]:
        """Other terms for a moment, in place of and not on top of the present ones."""
        kept = self._terms
        try:
            self._install(terms)
            yield
        finally:
            self._install(kept)

    def _install(self, terms: Mapping[str, SideTerm]) -> None:
        while self._handles:
            self._handles.pop().remove()
        for name, term in terms.items():
            try:
                module = self._model.get_submodule(name)
            except AttributeError:
                raise InvalidSetting(
                    f"The model has no layer {name!r} for a side term to stand beside.", name
                ) from None
            self._handles.append(module.register_forward_hook(_adder(term)))
        self._terms = terms


def _adder(term: SideTerm) -> Any:
    matrix = term.dense() if isinstance(term, SparsePatch) and term.density >= DENSE_FROM else None

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if getattr(module, "disable_adapters", False):
            return output
        part = term.forward(inputs[0]) if matrix is None else F.linear(inputs[0].float(), matrix)
        return (output + part).to(output.dtype)

    return hook


def joined(vector: LoraVector, candidate: Candidate) -> dict[str, LowRank]:
    """Factors and blocks as one low-rank change a module: A' = [A; A2], B' = [s B, B2], scaling 1.

    Every module gets the same rank, padded with zeros where it has no block, as the stock layout wants it.
    """
    if not candidate.is_adapter:
        raise InvalidSetting("A sparse patch cannot be written as an adapter; ask the method for its adapter form.")
    extra, parts = candidate.extra_rank, vector.split(candidate.factors)
    if unknown := set(candidate.beside) - {pair.module_name for pair in vector.pairs()}:
        raise InvalidSetting(f"No adapted layer is named {min(unknown)!r}.")
    whole = {}
    for pair in vector.pairs():
        B, A = parts[pair.b_name] * pair.scaling, parts[pair.a_name]
        block = candidate.beside.get(pair.module_name)
        if extra:
            B2, A2 = B.new_zeros(len(B), extra), A.new_zeros(extra, A.shape[1])
            if isinstance(block, LowRank):
                B2[:, : block.rank], A2[: block.rank] = block.B, block.A
            B, A = torch.cat([B, B2], dim=1), torch.cat([A, A2])
        whole[pair.module_name] = LowRank(B, A)
    return whole
