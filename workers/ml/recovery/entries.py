"""Entries of the weight change `delta = s * B @ A`: which are masked, and what is left of the adapter without them.

Knows: the top share of entries by any score, exact over all modules together though one of them at a time is in memory;
a masked change as an exact sparse patch or refitted to the job's rank, and what the refit loses.
Refuses to know: where a score comes from, models, and data.

Memory: a few times the largest module, and the candidate itself. A patch keeps a value and two indices for each entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import Any, Literal

import torch
from torch import Tensor

from workers.ml.candidate import Candidate, SparsePatch
from workers.ml.errors import NumericError
from workers.ml.recovery.dial import StrengthPath
from workers.ml.recovery.refit import refit
from workers.ml.recovery.scores import Granularity, prune_count, top_mask
from workers.ml.tuning.lora_vector import LoraPair, LoraVector
from workers.ml.types import Progress

Form = Literal["adapter", "patch"]
Masks = Iterable[tuple[str, Tensor]]  # by module name, True where an entry is pruned, (d_out, d_in)

LOW_BITS = 16


def weight_change(parts: Mapping[str, Tensor], pair: LoraPair) -> Tensor:
    """(d_out, d_in) in fp32, rounded once: a product in fp32 may run in the short TF32 format on a GPU."""
    return (pair.scaling * (parts[pair.b_name].double() @ parts[pair.a_name].double())).float()


class TopEntries:
    """The top share of entries by score: of each row, of each module, or of all modules together.

    `scores` gives the scores of one module, (d_out, d_in), fp32 and not negative, and must give the same bytes whenever
    it is asked. Among equal scores the earlier entry is spared, in the order of `names` and of the entries in a module.
    """

    def __init__(
        self,
        names: Sequence[str],
        scores: Callable[[str], Tensor],
        granularity: Granularity,
        *,
        compat: bool = False,
    ) -> None:
        self._names, self._scores, self._granularity, self._compat = names, scores, granularity, compat
        self._cut_at = lru_cache(maxsize=8)(self._cut)
        self._coarse: Tensor | None = None

    def masks(self, ratio: float) -> Iterator[tuple[str, Tensor]]:
        """The module's name and its mask, True where an entry is pruned; masks of growing ratios are nested."""
        shared = self._cut_at(ratio) if self._granularity == "global" else None
        for name in self._names:
            scores = self._checked(name)
            if self._granularity == "row":
                yield name, top_mask(scores, self._count(scores.shape[-1], ratio))
            else:
                mask, over = (shared or self._cut_within(scores, ratio)).mask(scores)
                shared = shared and shared.after(over)
                yield name, mask

    def _cut_within(self, scores: Tensor, ratio: float) -> Cut:
        return find_cut(lambda: [scores], self._count(scores.numel(), ratio))

    def _cut(self, ratio: float) -> Cut:
        """Of all modules together. The first histogram does not depend on the ratio and is kept."""
        if self._coarse is None:
            self._coarse = _histogram(self._all(), lambda bits: bits >> LOW_BITS, 2 ** (31 - LOW_BITS))
        return find_cut(self._all, self._count(int(self._coarse.sum()), ratio), coarse=self._coarse)

    def _all(self) -> Iterator[Tensor]:
        return map(self._checked, self._names)

    def _count(self, size: int, ratio: float) -> int:
        return prune_count(size, ratio, compat=self._compat)

    def _checked(self, name: str) -> Tensor:
        scores = self._scores(name)
        if not torch.isfinite(scores).all():
            raise NumericError(f"The scores of {name} hold numbers that are not finite.", name)
        return scores


@dataclass(frozen=True)
class Cut:
    """Where a ranking is cut: entries at or above `threshold` (the bits of a score) but for the first `spared` ties."""

    threshold: int
    spared: int

    def mask(self, scores: Tensor) -> tuple[Tensor, int]:
        """True where an entry is pruned, and how many ties were spared here."""
        bits = scores.view(torch.int32)
        mask = bits >= self.threshold
        if not self.spared:
            return mask, 0
        ties = (bits == self.threshold).reshape(-1).nonzero().squeeze(1)[: self.spared]
        mask.view(-1)[ties] = False
        return mask, len(ties)

    def after(self, over: int) -> Cut:
        """The cut in the modules that follow, when `over` ties have been spared."""
        return Cut(self.threshold, self.spared - over)


def find_cut(matrices: Callable[[], Iterable[Tensor]], count: int, *, coarse: Tensor | None = None) -> Cut:
    """Where the `count` largest entries of several matrices begin, exactly, in two passes and with bounded memory.

    The bits of non-negative floats, read as integers, are ordered as the floats are. So a histogram of their upper half
    finds the bucket of the wanted score, and one of the lower half within that bucket finds the score itself.
    """
    if count == 0:
        return Cut(torch.iinfo(torch.int32).max, 0)
    if coarse is None:
        coarse = _histogram(matrices(), lambda bits: bits >> LOW_BITS, 2 ** (31 - LOW_BITS))
    upper, missing = _bucket(coarse, count)

    def lower(bits: Tensor) -> Tensor:
        return torch.bitwise_and(bits[bits >> LOW_BITS == upper], 2**LOW_BITS - 1)

    fine = _histogram(matrices(), lower, 2**LOW_BITS)
    low, taken = _bucket(fine, missing)
    return Cut((upper << LOW_BITS) + low, int(fine[low]) - taken)


def _histogram(matrices: Iterable[Tensor], digits: Callable[[Tensor], Tensor], size: int) -> Tensor:
    total = torch.zeros(size, dtype=torch.int64)
    for matrix in matrices:
        total += torch.bincount(digits(matrix.contiguous().view(torch.int32).reshape(-1)), minlength=size).cpu()
    return total


def _bucket(histogram: Tensor, count: int) -> tuple[int, int]:
    """The bucket that holds the count-th largest entry, and how many of its entries belong to the count largest."""
    at_least = histogram.flip(0).cumsum(0).flip(0)
    bucket = int((at_least >= count).sum()) - 1
    return bucket, count - int(at_least[bucket] - histogram[bucket])


def masked_path(
    vector: LoraVector,
    form: Form,
    masks: Callable[[float], Masks],
    *,
    facts: Mapping[str, Any],
    progress: Progress,
) -> StrengthPath:
    """The dial whose points are the raw adapter without the entries masked at each strength."""
    raw = vector.get()

    @lru_cache(maxsize=1)  # a point and its facts are asked for one after the other
    def point(strength: float) -> tuple[Candidate, dict[str, Any]]:
        left = _Left(vector, raw, form)
        for step, (name, mask) in enumerate(masks(strength), start=1):
            left.without(name, mask)
            progress.step(step, len(vector.pairs()), part="mask")
        return left.candidate(), left.facts()

    return StrengthPath(raw, lambda strength: point(strength)[0], dict(facts), lambda strength: point(strength)[1])


class _Left:
    """What is left of an adapter, module by module. A module without a masked entry keeps the bytes of its factors."""

    def __init__(self, vector: LoraVector, raw: Tensor, form: Form) -> None:
        self._pairs = {pair.module_name: pair for pair in vector.pairs()}
        self._form, self._raw, self._factors = form, vector.split(raw), raw.clone()
        self._parts = vector.split(self._factors)
        self._beside: dict[str, SparsePatch] = {}
        self._counts: dict[str, int] = {}
        self._entries = 0
        self._total = self._pruned = self._lost = (
            0.0  # energies: of the change, of what masks took, of what refits miss
        )
        self._digest = sha256()

    def without(self, name: str, mask: Tensor) -> None:
        """Takes the masked entries of one module away."""
        pair = self._pairs[name]
        delta = weight_change(self._raw, pair)
        pruned = delta.where(mask, 0.0)
        self._counts[name] = int(mask.sum())
        self._entries += mask.numel()
        self._total += float(delta.double().square().sum())
        self._pruned += float(pruned.double().square().sum())
        self._digest.update(mask.cpu().numpy().tobytes())
        if not self._counts[name]:
            return
        if self._form == "patch":
            self._beside[name] = SparsePatch.of(-pruned)
            return
        kept = delta - pruned
        B, A, share = refit(kept, len(self._parts[pair.a_name]))
        root = math.sqrt(pair.scaling)
        self._parts[pair.b_name].copy_(B / root)
        self._parts[pair.a_name].copy_(A / root)
        self._lost += share * float(kept.double().square().sum())

    def candidate(self) -> Candidate:
        return Candidate(self._factors, self._beside)

    def facts(self) -> dict[str, Any]:
        pruned, kept = sum(self._counts.values()), self._total - self._pruned
        facts: dict[str, Any] = {
            "counts": self._counts,
            "pruned": pruned,
            "pruned_ratio": pruned / self._entries,
            "kept_energy": kept / self._total if self._total else 1.0,
            "mask_sha256": self._digest.hexdigest(),
        }
        if self._form == "adapter":
            facts["refit_lost_share"] = self._lost / kept if kept > 0 else 0.0
            facts["pruning_kept"] = 1 - self._lost / self._pruned if self._pruned else 0.0
        return facts
