"""Antidote on rank components: drops whole singular components of the update, those harmful data uses most.

Paper: Antidote (ICML 2025, arXiv 2408.09600) on s * B @ A = sum of sigma_k u_k v_k^T; the form is this project's, and
so is the score `gradient`, its default. The result is an adapter of the job's rank, does not depend on how B and A share their scale, and explains
itself: "3 of 16 components of this module were removed".
`activation`: sigma_k * ||v_k^T X||, with ||.|| the root of the mean over harmful rows of the squares summed over their
tokens. It needs v_k^T x of every token: norms of the single channels would not do. One forward.
`gradient`: by how much the loss of harmful answers rises, to first order, when the component alone is dropped:
-<dL/d delta, sigma_k u_k v_k^T> = -B_k . dL/dB_k in the balanced gauge, from one gradient over the rows.
With `spare`, the size of the same score on the customer's or the retention rows counts against dropping. In either
direction: a fine-tune ends where the slope of its own loss is nearly zero, so that the sign left is chance, and taken
at its word it made the method drop what the task needs. Units: each set's scores are divided by the sum of their
absolute values over the whole adapter, so that what is compared are shares.
score = harmful share - spare_weight * sum over spared sets of |share|.
What it does not do: look at components together (each is judged as if dropped alone), or cut a component in two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.ml.chat import EncodedRow
from workers.ml.errors import NumericError
from workers.ml.recovery.activations import listen
from workers.ml.recovery.calibration import answer_gradient, encode_answers, encode_task, gradients_of_factors
from workers.ml.recovery.components import Components, dropping_path
from workers.ml.recovery.dial import RecoveryInputs, StrengthPath
from workers.ml.recovery.scores import ChannelNorms, prune_order
from workers.ml.recovery.specs import AntidoteRankSpec
from workers.ml.tuned_model import TunedModel
from workers.ml.types import Progress

Scores = dict[str, Tensor]  # by module name, (components,) in fp64


def prepare(tuned: TunedModel, spec: AntidoteRankSpec, inputs: RecoveryInputs, progress: Progress) -> StrengthPath:
    """One forward (or gradient) for each set of rows; every share of components is then read off one ranking."""
    inputs.require(spec)
    raw = tuned.vector.get()
    components = Components(tuned.vector, raw)
    harmful = encode_answers(tuned, inputs.harmful[: spec.max_rows])
    scores = _shares(component_scores(tuned, spec, components, harmful, progress))
    for role in spec.spare:
        rows = encode_task(tuned, inputs.task) if role == "task" else encode_answers(tuned, inputs.retention)
        spared = _shares(component_scores(tuned, spec, components, rows[: spec.max_rows], progress))
        scores = {name: score - spec.spare_weight * spared[name].abs() for name, score in scores.items()}
    order = prune_order(scores, spec.granularity)
    return dropping_path(components, order, raw, facts={"harmful_rows": len(harmful)})


def component_scores(
    tuned: TunedModel,
    spec: AntidoteRankSpec,
    components: Components,
    rows: Sequence[EncodedRow],
    progress: Progress,
) -> Scores:
    """How much the rows use each component of each module, as `spec.score` says."""
    by = {"activation": _activations, "gradient": _rises}[spec.score]
    return by(tuned, components, rows, progress)


def _activations(tuned: TunedModel, components: Components, rows: Sequence[EncodedRow], progress: Progress) -> Scores:
    pairs = {pair.module_name: pair for pair in tuned.vector.pairs()}
    projected = {name: _Projected(one.V) for name, one in components.spectra.items() if len(one.S)}
    listen(tuned, rows, {pairs[name].a_name: one for name, one in projected.items()}, progress=progress)
    return {
        name: sizes * projected[name].norms.value().double() if name in projected else sizes
        for name, sizes in components.sizes().items()
    }


class _Projected:
    """Hears a module's input and keeps the norm of its part along each right singular vector."""

    def __init__(self, V: Tensor) -> None:
        self._V = V.float()
        self.norms = ChannelNorms("rms")

    def add(self, activations: Tensor, counted: Tensor) -> None:
        self.norms.add(activations.float() @ self._V, counted)


def _rises(tuned: TunedModel, components: Components, rows: Sequence[EncodedRow], progress: Progress) -> Scores:
    vector, balanced = tuned.vector, components.balanced()
    with gradients_of_factors(tuned):
        vector.set(balanced)
        _, gradient = answer_gradient(tuned, rows, progress)
    if not torch.isfinite(gradient).all():
        raise NumericError("The gradient holds numbers that are not finite: there is no order to drop components in.")
    products = vector.split(balanced.neg() * gradient)
    return {
        pair.module_name: products[pair.b_name].double().sum(dim=0)[: len(components.spectra[pair.module_name].S)]
        for pair in vector.pairs()
    }


def _shares(scores: Scores) -> Scores:
    total = sum(float(score.abs().sum()) for score in scores.values())
    if not total > 0:
        raise NumericError("All scores are zero: the rows use no component of the adapter.")
    return {name: score / total for name, score in scores.items()}
