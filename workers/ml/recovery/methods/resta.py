"""RESTA: adds the difference between the aligned model and a copy of it that was made harmful.

Paper: RESTA, ACL 2024, arXiv 2402.11746. M' = M + strength * (M_aligned - M_unaligned). The unaligned copy is trained on
harmful answers as a LoRA D_u on the aligned base, so the safety vector is -D_u and M' = W_0 + D - strength * D_u, which
is a LoRA of the two ranks together. Its vehicle is the job's own adapter: B zero and A drawn anew, trained for a few
steps, after which the raw factors come back; so it has the job's targets and scaling, and at most its rank.
DARE (`drop_ratio` q) is published on single entries of D: each is dropped with probability q, the others are multiplied
by 1 / (1 - q). That has full rank, so here entries of the factor B are dropped: the mean over draws is still D, the rank
stays, and the entries of a row of D live and die in r groups instead of one by one.
The unaligned copy is dangerous: it is kept in memory only, no fact names a number of it, and the two terms are split
anew by singular values, so that no block of a released adapter is the copy with its sign changed. What a release still
tells of it to somebody who knows the method is a reason to keep this one for comparisons.
What it does not do: protect the task; the vector also takes away what harmful answers share with all others.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from workers.ml.candidate import Candidate, LowRank
from workers.ml.recovery.calibration import encode_answers
from workers.ml.recovery.deltas import delta_norm
from workers.ml.recovery.dial import RecoveryInputs, StrengthPath
from workers.ml.recovery.patching import Term, train_patch
from workers.ml.recovery.specs import RestaSpec
from workers.ml.recovery.spectra import spectrum_of_product
from workers.ml.tuned_model import TunedModel
from workers.ml.tuning.lora_vector import LoraVector
from workers.ml.types import Progress


def prepare(tuned: TunedModel, spec: RestaSpec, inputs: RecoveryInputs, progress: Progress) -> StrengthPath:
    """Trains the unaligned copy once; every strength is then one sum."""
    inputs.require(spec)
    vector, raw = tuned.vector, tuned.vector.get()
    rows = encode_answers(tuned, inputs.harmful[: spec.max_rows])
    with vector.swapped(fresh_factors(vector, rank=spec.rank, seed=spec.seed)):
        unaligned, losses = train_patch(tuned, spec, [Term("harmful_loss", rows, spec.batch_rows)], progress)
    start = dropped(vector, raw, ratio=spec.drop_ratio, seed=spec.seed)
    rank = min(spec.rank, *(len(vector.split(raw)[pair.a_name]) for pair in vector.pairs()))

    def move(strength: float) -> Candidate:
        return _moved(vector, start, unaligned, strength, rank)

    facts = {
        "harmful_rows": len(rows),
        "rank": rank,
        "harmful_loss_first": losses[0]["harmful_loss"],
        "harmful_loss_last": losses[-1]["harmful_loss"],
        "safety_vector_norm": delta_norm(vector, unaligned),
        "dropped_ratio": spec.drop_ratio,
    }
    return StrengthPath(raw, move, facts)


def fresh_factors(vector: LoraVector, *, rank: int, seed: int) -> Tensor:
    """An untrained adapter: B zero, A as PEFT draws it (uniform up to 1 / sqrt(d_in)).

    Rows of A beyond `rank` are zero. With B zero too they get no gradient, so training leaves them out.
    """
    values = torch.zeros(vector.numel)
    generator = torch.Generator().manual_seed(seed)
    for pair in vector.pairs():
        A = vector.split(values)[pair.a_name]
        bound = 1 / math.sqrt(A.shape[1])
        A[:rank] = torch.empty_like(A[:rank]).uniform_(-bound, bound, generator=generator)
    return values.to(vector.device)


def dropped(vector: LoraVector, values: Tensor, *, ratio: float, seed: int) -> Tensor:
    """DARE on the factors B: a share `ratio` of their entries is zero, the others are rescaled; 0 changes nothing."""
    if ratio == 0:
        return values
    kept, parts = values.clone(), vector.split(values)
    generator = torch.Generator().manual_seed(seed)
    for pair in vector.pairs():
        B = parts[pair.b_name]
        keep = (torch.rand(B.shape, generator=generator) >= ratio).to(B.device)
        vector.split(kept)[pair.b_name].copy_(torch.where(keep, B / (1 - ratio), 0.0))
    return kept


def _moved(vector: LoraVector, start: Tensor, unaligned: Tensor, strength: float, rank: int) -> Candidate:
    """Start plus `strength` times the safety vector: the leading part as the job's factors, the rest beside them."""
    values, beside = start.clone(), {}
    tuned, bad = vector.split(start), vector.split(unaligned)
    for pair in vector.pairs():
        (B, A), (B_u, A_u) = ((parts[pair.b_name], parts[pair.a_name]) for parts in (tuned, bad))
        left = torch.cat([B, -strength * B_u[:, :rank]], dim=1)
        whole = spectrum_of_product(left, torch.cat([A, A_u[:rank]]))
        own, into = min(len(A), len(whole.S)), vector.split(values)
        into[pair.b_name].zero_()
        into[pair.a_name].zero_()
        into[pair.b_name][:, :own], into[pair.a_name][:own] = whole.factors(0, own)
        B2, A2 = whole.factors(own, own + rank)
        if len(A2):
            beside[pair.module_name] = LowRank(pair.scaling * B2, A2)
    return Candidate(values, beside)
