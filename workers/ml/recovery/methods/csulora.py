"""CSULoRA: keeps what of the update lies in the directions of alignment and dampens the rest.

Paper: CSULoRA, arXiv 2605.30640. With V = W_aligned - W_pretrained, P_L and P_R project on the fewest columns' and rows'
directions that hold `energy` of ||V||^2. The update D is split into four blocks (P_L D P_R, P_L D (1 - P_R),
(1 - P_L) D P_R, (1 - P_L) D (1 - P_R)) of squared norms E_LR, E_1, E_2, E_3. The first is kept, each other is multiplied
by 1 / (1 + strength * E_b / E_ref) with E_ref = E_LR + outside_weight * (E_LR + E_1 + E_2 + E_3), and the sum is cut back
to the job's rank. Strength 1 is the published method. Projectors are never formed, nor is D: on its factors the sum is
[P_L B, (1 - P_L) B] times a matrix with 2 * rank rows.
A layer in which alignment changed nothing (V = 0) tells nothing and is left alone, as is a layer without an update.
What it does not do: look at data, or tell safety from whatever else alignment taught.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workers.ml.recovery.deltas import product_norm
from workers.ml.recovery.dial import RecoveryInputs, StrengthPath
from workers.ml.recovery.displacement import Displacement
from workers.ml.recovery.specs import CsuLoraSpec
from workers.ml.recovery.spectra import Spectrum, dominant_spectrum, spectrum_of_product
from workers.ml.tuned_model import TunedModel
from workers.ml.types import Progress


@dataclass(frozen=True)
class Blocks:
    """An update B A in four parts: B = B_in + B_out and A = A_in + A_out, where "in" lies in alignment's directions."""

    B_in: Tensor  # (d_out, r), as B_out
    B_out: Tensor
    A_in: Tensor  # (r, d_in), as A_out
    A_out: Tensor

    @classmethod
    def of(cls, B: Tensor, A: Tensor, alignment: Spectrum) -> Blocks:
        B, A, U, V = B.double(), A.double(), alignment.U, alignment.V
        B_in, A_in = U @ (U.T @ B), (A @ V) @ V.T
        return cls(*(part.float() for part in (B_in, B - B_in, A_in, A - A_in)))

    def energies(self) -> tuple[float, float, float, float]:
        """Squared norms: kept, right outside, left outside, both outside."""
        pairs = ((self.B_in, self.A_in), (self.B_in, self.A_out), (self.B_out, self.A_in), (self.B_out, self.A_out))
        kept, right, left, both = (product_norm(B, A) ** 2 for B, A in pairs)
        return kept, right, left, both

    def damped(self, strength: float, outside_weight: float) -> Spectrum:
        """The damped update, at most of rank 2 r."""
        kept, *outside = self.energies()
        reference = kept + outside_weight * (kept + sum(outside))
        # Written so that a reference of 0 takes all of a block away instead of dividing by 0.
        right, left, both = (reference / (reference + strength * energy) if energy > 0 else 1.0 for energy in outside)
        rows = torch.cat([self.A_in + right * self.A_out, left * self.A_in + both * self.A_out])
        return spectrum_of_product(torch.cat([self.B_in, self.B_out], dim=1), rows)


def prepare(tuned: TunedModel, spec: CsuLoraSpec, inputs: RecoveryInputs, progress: Progress) -> StrengthPath:
    """One decomposition per adapted layer; every strength is then a small one."""
    inputs.require(spec)
    assert inputs.pretrained is not None
    vector, raw = tuned.vector, tuned.vector.get()
    factors = vector.split(raw)
    blocks: dict[str, Blocks] = {}
    directions: list[float] = []
    displacement = Displacement(tuned, inputs.pretrained)
    for place, (pair, V) in enumerate(displacement.walk(progress, "alignment")):
        B, A = factors[pair.b_name], factors[pair.a_name]
        alignment = dominant_spectrum(V, spec.energy, seed=spec.seed + place)
        if len(alignment.S) and product_norm(B, A) > 0:
            blocks[pair.module_name] = Blocks.of(B, A, alignment)
            directions.append(len(alignment.S) / min(V.shape))

    def move(strength: float) -> Tensor:
        values = raw.clone()
        parts = vector.split(values)
        for pair in vector.pairs():
            if pair.module_name in blocks:
                damped = blocks[pair.module_name].damped(strength, spec.outside_weight)
                B, A = damped.factors(0, min(len(parts[pair.a_name]), len(damped.S)))
                _fill(parts[pair.b_name], parts[pair.a_name], B, A)
        return values

    def facts_at(strength: float) -> dict[str, Any]:
        return _energies(blocks, strength, spec.outside_weight)

    facts = {"layers_left_alone": len(vector.pairs()) - len(blocks), "directions_share": _mean(directions)}
    return StrengthPath(raw, move, facts, facts_at)


def _fill(into_B: Tensor, into_A: Tensor, B: Tensor, A: Tensor) -> None:
    """Rank is kept: where the product has a lower rank, the remaining columns and rows are zero."""
    into_B.zero_()
    into_A.zero_()
    into_B[:, : len(A)], into_A[: len(A)] = B, A


def _energies(blocks: Mapping[str, Blocks], strength: float, outside_weight: float) -> dict[str, Any]:
    """Of the whole adapter's energy: the share in alignment's directions, left after damping, lost by the cut."""
    total = kept = left = lost = 0.0
    for block in blocks.values():
        inside, *outside = block.energies()
        damped = block.damped(strength, outside_weight)
        total, kept = total + inside + sum(outside), kept + inside
        left, lost = left + damped.energy, lost + damped.lost(block.A_in.shape[0])
    if total == 0:
        return {"aligned_energy_share": 0.0, "energy_left": 0.0, "energy_lost_to_rank": 0.0}
    return {"aligned_energy_share": kept / total, "energy_left": left / total, "energy_lost_to_rank": lost / total}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
