"""Safe Delta: keeps the part of the update that costs the aligned model's refusals least.

Paper: Safe Delta, ICML 2025, arXiv 2505.12038. For a linear layer H = 2 X^T X over its inputs X on refusals, taken from
the aligned base, and a share `damping` of the mean diagonal added. Keeping an entry w of column m costs
w^2 / (2 [H^-1]_mm); what is gained per cost is largest where [H^-1]_mm is largest, so entries are taken in that order
until their summed cost would exceed a budget. What is not kept goes back to its aligned value plus the change that best
makes up for what is kept (optimal brain surgeon). Strength 1 has no budget and is the aligned model.
The published budget is s * mean_m(1 / (2 [H^-1]_mm)), here with s = 1 / strength - 1; being in units of squared weights it
is another share of every other update. So by default the budget is 1 - strength of what the whole update would cost.
The order is the same for every row, so whole columns are taken: the one at the budget's edge is left out. The result
then keeps the adapter's rank and is exact: with the kept columns M and the others R, A'_M = A_M and
A'_R = -A_M H_MR H_RR^-1, while B stays.
Paper and code differ; followed is the paper. The code takes Cholesky's diagonal for [H^-1]_mm, gives every block of
2048 columns a budget of its own, scales by d_out / 4096, never takes the last 15 % of the entries (the paper: 10 %),
and compensates only to the right of what is kept. No share is set aside here, so that the dial reaches the raw adapter.
What it does not do: look at harmful answers, or at what the task needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from workers.ml.chat import EncodedRow
from workers.ml.errors import NumericError
from workers.ml.recovery.calibration import encode_answers, evaluation_mode, pieces_of
from workers.ml.recovery.dial import RecoveryInputs, StrengthPath
from workers.ml.recovery.specs import SafeDeltaSpec
from workers.ml.tuned_model import TunedModel, aligned
from workers.ml.tuning.lora_vector import LoraPair
from workers.ml.types import Progress

HESSIAN_BYTES = 2 * 2**30  # of Hessians in memory at once; more layers take further passes over the refusals


@dataclass(frozen=True)
class Solved:
    """One layer at one strength: its new factor A (r, d_in), and what of the update was kept as it was."""

    A: Tensor
    columns: int
    kept_share: float  # of the update's squared norm


Solution = Mapping[str, Solved]  # by module name; layers without an update are left out


def prepare(tuned: TunedModel, spec: SafeDeltaSpec, inputs: RecoveryInputs, progress: Progress) -> StrengthPath:
    """Solves every strength of the dial; any other strength is solved, with passes of its own, when it is asked for."""
    inputs.require(spec)
    vector, raw = tuned.vector, tuned.vector.get()
    rows = encode_answers(tuned, inputs.refusals[: spec.max_rows])
    dial = sorted({*spec.strengths, spec.strength} - {0.0})
    solutions = _solve(tuned, spec, rows, dial, progress)

    def solution(strength: float) -> Solution:
        if strength not in solutions:
            with vector.swapped(raw):
                solutions.update(_solve(tuned, spec, rows, [strength], progress))
        return solutions[strength]

    def move(strength: float) -> Tensor:
        values = raw.clone()
        parts = vector.split(values)
        for pair in vector.pairs():
            if pair.module_name in solution(strength):
                parts[pair.a_name].copy_(solution(strength)[pair.module_name].A)
        return values

    def facts_at(strength: float) -> dict[str, Any]:
        return _summary(solution(strength))

    return StrengthPath(raw, move, {"refusal_rows": len(rows)}, facts_at)


def _summary(solution: Solution) -> dict[str, Any]:
    layers = list(solution.values())
    if not layers:
        return {"kept_columns_share": 0.0, "kept_energy_share": 0.0}
    return {
        "kept_columns_share": sum(one.columns for one in layers) / sum(one.A.shape[1] for one in layers),
        "kept_energy_share": sum(one.kept_share for one in layers) / len(layers),
    }


class Curvature:
    """One layer's damped Hessian, and the order in which it gives columns away."""

    def __init__(self, hessian: Tensor, damping: float) -> None:
        """`hessian` (d_in, d_in) in fp64; it is not changed."""
        level = float(hessian.diagonal().mean())
        if not 0 < level < float("inf"):
            raise NumericError(f"The inputs of a layer on refusals have the mean square {level}: no curvature.")
        self._hessian = hessian.clone()
        self._hessian.diagonal().add_(damping * level)
        self._inverse = torch.cholesky_inverse(torch.linalg.cholesky(self._hessian)).diagonal().clone()
        self._order = torch.sort(self._inverse, descending=True, stable=True).indices

    def kept(self, squares: Tensor, strength: float, budget: Literal["share", "published"]) -> Tensor:
        """Indices of the columns kept. `squares` (d_in,): squared norms of the update's columns."""
        paid = (squares / (2 * self._inverse))[self._order].cumsum(0)
        if budget == "share":
            allowed = (1 - strength) * float(paid[-1])
        else:
            allowed = (1 / strength - 1) * float((1 / (2 * self._inverse)).mean())
        return self._order[: int((paid <= allowed).sum())]

    def compensated(self, A: Tensor, kept: Tensor) -> Tensor:
        """A (r, d_in) with its columns `kept`, and the others such that x^T H x of every row is least."""
        rest = torch.ones(A.shape[1], dtype=torch.bool, device=A.device)
        rest[kept] = False
        moved = A.clone()
        if bool(rest.any()):
            pull = self._hessian[rest][:, kept] @ A[:, kept].T  # (rest, r)
            factor = torch.linalg.cholesky(self._hessian[rest][:, rest])
            moved[:, rest] = -torch.cholesky_solve(pull, factor).T
        return moved


def solved(
    B: Tensor, A: Tensor, curvature: Curvature, spec: SafeDeltaSpec, *, strength: float, scaling: float
) -> Solved:
    """One layer's new factor A. B (d_out, r), A (r, d_in); a strength of 1 leaves zero."""
    wide, gram = A.double(), B.double().T @ B.double()
    squares = scaling**2 * (wide * (gram @ wide)).sum(dim=0).clamp_min(0)
    kept = curvature.kept(squares, strength, spec.budget)
    if len(kept) == A.shape[1]:
        return Solved(A.clone(), len(kept), 1.0)
    if spec.compensate:
        moved = curvature.compensated(wide, kept)
    else:
        moved = torch.zeros_like(wide)
        moved[:, kept] = wide[:, kept]
    return Solved(moved.to(A.dtype), len(kept), float(squares[kept].sum() / squares.sum()))


def _solve(
    tuned: TunedModel, spec: SafeDeltaSpec, rows: Sequence[EncodedRow], strengths: Sequence[float], progress: Progress
) -> dict[float, Solution]:
    """By strength. Layers are taken in groups whose Hessians fit in memory together."""
    solutions: dict[float, dict[str, Solved]] = {strength: {} for strength in strengths}
    parts, pairs = tuned.vector.split(tuned.vector.get()), tuned.vector.pairs()
    pairs = [pair for pair in pairs if bool(parts[pair.a_name].any()) and bool(parts[pair.b_name].any())]
    done = 0
    for group in _groups(tuned, pairs):
        hessians = _hessians(tuned, group, rows, progress)
        for pair in group:
            curvature = Curvature(hessians.pop(pair.module_name), spec.damping)
            for strength in strengths:
                solutions[strength][pair.module_name] = solved(
                    parts[pair.b_name], parts[pair.a_name], curvature, spec, strength=strength, scaling=pair.scaling
                )
            done += 1
            progress.step(done, len(pairs), part="columns")
    progress.step(1, 1, part="columns")
    return dict(solutions)


def _groups(tuned: TunedModel, pairs: Sequence[LoraPair]) -> Iterator[list[LoraPair]]:
    group: list[LoraPair] = []
    size = 0
    shapes = dict(zip(tuned.vector.names, tuned.vector.shapes, strict=True))
    for pair in pairs:
        needed = 8 * shapes[pair.a_name][1] ** 2
        if group and size + needed > HESSIAN_BYTES:
            yield group
            group, size = [], 0
        group.append(pair)
        size += needed
    if group:
        yield group


def _hessians(
    tuned: TunedModel, pairs: Sequence[LoraPair], rows: Sequence[EncodedRow], progress: Progress
) -> dict[str, Tensor]:
    """2 X^T X / rows of the layers' inputs under the aligned base, (d_in, d_in) in fp64, by module name."""
    hessians: dict[str, Tensor] = {}
    reached = dict.fromkeys((pair.module_name for pair in pairs), 0)
    pieces = pieces_of(tuned, rows)
    mask: list[Tensor] = []  # the present piece's, read by the hooks

    def add(name: str, inputs: Tensor) -> None:
        tokens = inputs[mask[0].bool()].float()  # padding is left out and not multiplied: it may be inf or NaN
        step = (2 / len(rows) * (tokens.T @ tokens)).double()
        hessians[name] = hessians[name].add_(step) if name in hessians else step
        reached[name] += 1

    with aligned(tuned), evaluation_mode(tuned), torch.no_grad(), _watching(tuned, pairs, add):
        for index, piece in enumerate(pieces, start=1):
            mask[:] = [piece.attention_mask]
            tuned.model(
                input_ids=piece.input_ids, attention_mask=piece.attention_mask, use_cache=False, logits_to_keep=1
            )  # the logits are not looked at
            progress.step(index, len(pieces), part="activations")
    for name, count in reached.items():
        if count != len(pieces):
            raise NumericError(f"{name} was reached {count} times in {len(pieces)} forward passes.", name)
    return hessians


@contextmanager
def _watching(tuned: TunedModel, pairs: Sequence[LoraPair], add: Any) -> Iterator[None]:
    """Calls `add` with the name and the input of each of these layers whenever it runs."""
    handles = []

    def hook_of(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            add(name, inputs[0])

        return hook

    try:
        for pair in pairs:
            module = tuned.model.get_submodule(pair.module_name)
            handles.append(module.register_forward_pre_hook(hook_of(pair.module_name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
