"""Singular components of the weight change: `s * B @ A` of each module as a sum of sigma_k u_k v_k^T.

Knows: the decomposition without the (d_out, d_in) product, which components are more than rounding, and the adapter
that is left when some are dropped.
Refuses to know: why a component is dropped, models, and data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from workers.ml.errors import NumericError
from workers.ml.recovery.dial import StrengthPath
from workers.ml.recovery.scores import PruneOrder
from workers.ml.recovery.spectra import Spectrum, spectrum_of_product
from workers.ml.tuning.lora_vector import LoraVector

# Rounding of fp32 factors alone gives a product of deficient rank components of about 1e-7 of its largest.
SMALLEST = 1e-6


class Components:
    """The components of every module, largest first, in fp64; those of rounding are left out and never counted.

    `U` is (d_out, n), `V` (d_in, n), `S` (n,) without the adapter's scaling; n is at most the rank and may be 0.
    """

    def __init__(self, vector: LoraVector, raw: Tensor) -> None:
        """Raises NumericError where no module has a component."""
        self._vector, self._raw = vector, raw
        parts = vector.split(raw)
        self._pairs = {pair.module_name: pair for pair in vector.pairs()}
        self.spectra: dict[str, Spectrum] = {}
        for name, pair in self._pairs.items():
            found = spectrum_of_product(parts[pair.b_name], parts[pair.a_name])
            self.spectra[name] = found.first(int(found.S.gt(SMALLEST * found.S[0]).sum()))
        if not any(len(one.S) for one in self.spectra.values()):
            raise NumericError("The adapter changes nothing: there is no component to drop.")

    def sizes(self) -> dict[str, Tensor]:
        """(n,) for each module: the singular values of its weight change, scaling included."""
        return {name: self._pairs[name].scaling * one.S for name, one in self.spectra.items()}

    def balanced(self) -> Tensor:
        """The factors U sqrt(S), sqrt(S) V^T of the same weight change, component k in column and row k."""
        return self.without({name: torch.zeros(len(one.S), dtype=torch.bool) for name, one in self.spectra.items()})

    def without(self, dropped: Mapping[str, Tensor]) -> Tensor:
        """Factors in which the marked components, (n,) for each module named, are zero; other modules stay as they are.

        What is kept is exact to the rounding of its factors to fp32.
        """
        values = self._raw.clone()
        parts = self._vector.split(values)
        for name, marks in dropped.items():
            one, pair = self.spectra[name], self._pairs[name]
            root = torch.where(marks.to(one.S.device), 0.0, one.S.sqrt())
            B, A = parts[pair.b_name].zero_(), parts[pair.a_name].zero_()
            B[:, : len(root)] = (one.U * root).float()
            A[: len(root)] = (root[:, None] * one.V.T).float()
        return values


def dropping_path(components: Components, order: PruneOrder, raw: Tensor, *, facts: Mapping[str, Any]) -> StrengthPath:
    """The dial whose points are the raw adapter without the share of components that ranks first."""
    energies = {name: size.square() for name, size in components.sizes().items()}
    total = sum(float(energy.sum()) for energy in energies.values())
    count = sum(map(len, energies.values()))

    def dropped(strength: float) -> dict[str, Tensor]:
        return {name: mask for name, mask in order.masks(strength).items() if bool(mask.any())}

    def facts_at(strength: float) -> dict[str, Any]:
        marks = dropped(strength)
        lost = sum(float(energies[name][mask].sum()) for name, mask in marks.items())
        gone = sum(int(mask.sum()) for mask in marks.values())
        return {
            "dropped": gone,
            "dropped_ratio": gone / count,
            "kept_energy": max(0.0, 1 - lost / total),
            # Component 0 is the largest of its module.
            "modules": [
                {"module": name, "dropped": mask.nonzero().squeeze(1).tolist(), "of": len(mask)}
                for name, mask in marks.items()
            ],
        }

    move: Callable[[float], Tensor] = lambda strength: components.without(dropped(strength))  # noqa: E731
    return StrengthPath(raw, move, {"components": count, **facts}, facts_at)
