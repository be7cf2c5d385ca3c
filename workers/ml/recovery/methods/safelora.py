"""SafeLoRA: projects the factor B of the layers whose update is least like what alignment did there.

Paper: SafeLoRA, NeurIPS 2024, arXiv 2405.16833. With V = W_aligned - W_pretrained and C = V V^T / ||V||, layers are
ranked by the cosine of C B A and B A, and B := C B where it is small. C is never formed: C B = V (V^T B) / ||V||.
The dial is the share of layers projected, least similar first; their number is the nearest integer (a half counts up)
and at least 1, and a stronger setting projects the same layers and more. With a threshold only layers whose cosine is
at most that count, so that strength 1 with 0.5 is the published selection; the published code compares cosines rounded
to five decimals, here they are compared as computed.
C is no projector: it may amplify as well as shrink. `exact` takes V (V^T V)^+ V^T instead, the orthogonal projector on
the columns of V, which changes nothing where V has full rank.
A layer in which alignment changed nothing (V = 0) or without an update has no cosine and is left alone.
What it does not do: look at data, or bound what a projection costs the task.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from workers.ml.recovery.deltas import product_norm
from workers.ml.recovery.dial import RecoveryInputs, StrengthPath
from workers.ml.recovery.displacement import Displacement
from workers.ml.recovery.specs import SafeLoraSpec
from workers.ml.recovery.spectra import full_spectrum
from workers.ml.tuned_model import TunedModel
from workers.ml.tuning.lora_vector import LoraPair
from workers.ml.types import Progress


@dataclass(frozen=True)
class Projected:
    """One layer's way out: its factor B after the projection, and how like alignment its update was before."""

    pair: LoraPair
    B: Tensor  # (d_out, r) fp32
    cosine: float
    growth: float  # norm of the update after the projection, relative to before


def prepare(tuned: TunedModel, spec: SafeLoraSpec, inputs: RecoveryInputs, progress: Progress) -> StrengthPath:
    """Two thin products (or one decomposition) per adapted layer; every strength is then a choice of layers."""
    inputs.require(spec)
    assert inputs.pretrained is not None
    vector, raw = tuned.vector, tuned.vector.get()
    factors = vector.split(raw)
    found: list[Projected] = []
    for pair, V in Displacement(tuned, inputs.pretrained).walk(progress, "alignment"):
        B, A = factors[pair.b_name], factors[pair.a_name]
        if bool(V.any()) and product_norm(B, A) > 0:
            found.append(_measured(pair, B, A, projected(V, B, spec.projector)))
    eligible = [one for one in found if spec.threshold is None or one.cosine <= spec.threshold]
    eligible.sort(key=lambda one: one.cosine)  # stable: equal cosines stay in the order of names

    def chosen(strength: float) -> list[Projected]:
        return eligible[: layers_projected(strength, len(eligible))]

    def move(strength: float) -> Tensor:
        values = raw.clone()
        parts = vector.split(values)
        for one in chosen(strength):
            parts[one.pair.b_name].copy_(one.B)
        return values

    def facts_at(strength: float) -> dict[str, Any]:
        layers = chosen(strength)
        growth = {"largest_growth": max(one.growth for one in layers)} if layers else {}
        return {"projected": [one.pair.module_name for one in layers], **growth}

    facts = {"layers_left_alone": len(vector.pairs()) - len(found), "eligible": len(eligible), **_range(found)}
    return StrengthPath(raw, move, facts, facts_at)


def projected(V: Tensor, B: Tensor, projector: Literal["published", "exact"]) -> Tensor:
    """C B, or the orthogonal projection of B's columns on V's; (d_out, r) fp32."""
    if projector == "published":
        wide = V.double()  # squares of small differences would leave the range of fp32
        image: Tensor = wide @ (wide.T @ B.double()) / torch.linalg.matrix_norm(wide)
    else:
        found = full_spectrum(V)
        rounding = max(V.shape) * torch.finfo(torch.float32).eps * found.S[0]
        basis = found.U[:, rounding < found.S]
        image = basis @ (basis.T @ B.double())
    return image.to(B.dtype)


def cosine(B1: Tensor, B: Tensor, A: Tensor) -> float:
    """Of B1 A and B A, from the factors, in fp64. 0 where the projection leaves nothing."""
    B1, B, A = B1.double(), B.double(), A.double()
    norms = product_norm(B1, A) * product_norm(B, A)
    return float(((B1.T @ B) * (A @ A.T)).sum()) / norms if norms > 0 else 0.0


def layers_projected(strength: float, eligible: int) -> int:
    """The nearest integer to strength * eligible, a half counting up, and at least 1 where there is one at all."""
    return min(eligible, max(1, math.floor(strength * eligible + 0.5)))


def _measured(pair: LoraPair, B: Tensor, A: Tensor, new_B: Tensor) -> Projected:
    return Projected(pair, new_B, cosine(new_B, B, A), product_norm(new_B, A) / product_norm(B, A))


def _range(found: list[Projected]) -> dict[str, float]:
    if not found:
        return {}
    cosines = sorted(one.cosine for one in found)
    return {"smallest_cosine": cosines[0], "median_cosine": cosines[len(cosines) // 2], "largest_cosine": cosines[-1]}
