"""Entries of the weight change: the exact top share over many matrices, and what is left of an adapter without them."""

import math

import pytest
import torch

from workers.ml.candidate import Candidate, SparsePatch
from workers.ml.errors import NumericError
from workers.ml.recovery.entries import TopEntries, find_cut, masked_path, weight_change
from workers.ml.recovery.scores import prune_order
from workers.ml.types import Silent

RATIOS = (0.0, 0.01, 0.05, 0.2, 0.5, 0.9, 1.0)


def matrices(kind: str) -> dict[str, torch.Tensor]:
    """Scores as they may come: all different, many equal, many zero, of very different sizes."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"a": (7, 12), "b": (30, 5), "c": (1, 9), "d": (16, 16)}
    drawn = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    if kind == "ties":
        return {name: (one * 4).floor() / 4 for name, one in drawn.items()}
    if kind == "zeros":
        return {name: one * (one > 0.7) for name, one in drawn.items()}
    if kind == "close":  # alike in the upper half of their bits
        return {name: 1 + one * 1e-4 for name, one in drawn.items()}
    if kind == "scales":
        return {name: one * 10.0 ** (10 * i - 20) for i, (name, one) in enumerate(drawn.items())}
    return drawn


@pytest.mark.parametrize("kind", ["distinct", "ties", "zeros", "close", "scales"])
@pytest.mark.parametrize("granularity", ["row", "tensor", "global"])
@pytest.mark.parametrize("compat", [False, True])
def test_masks_are_those_of_one_stable_sort_with_all_scores_in_memory(kind, granularity, compat):
    scores = matrices(kind)
    order = prune_order(scores, granularity, compat=compat)
    top = TopEntries(tuple(scores), scores.__getitem__, granularity, compat=compat)
    for ratio in RATIOS:
        wanted, found = order.masks(ratio), dict(top.masks(ratio))
        assert list(found) == list(scores)
        assert all(torch.equal(found[name], wanted[name]) for name in scores)


def test_every_count_is_met_exactly_even_if_all_entries_are_equal():
    equal = torch.full((5, 7), 0.25)
    for count in range(36):
        mask, spared = find_cut(lambda: [equal], count).mask(equal)
        assert int(mask.sum()) == count
        assert mask.flatten().tolist() == [False] * (35 - count) + [True] * count  # the lower indices are spared
        assert spared == (35 - count if count else 0)


def test_two_readings_of_a_dial_do_not_disturb_each_other():
    """Ties spared so far belong to one sweep: the sweeps of two strengths may run side by side."""
    scores = matrices("ties")
    top = TopEntries(tuple(scores), scores.__getitem__, "global")
    alone = {ratio: dict(top.masks(ratio)) for ratio in (0.3, 0.6)}
    together = {0.3: {}, 0.6: {}}
    for (name, small), (_, large) in zip(top.masks(0.3), top.masks(0.6), strict=True):
        together[0.3][name], together[0.6][name] = small, large
    assert all(torch.equal(alone[r][n], together[r][n]) for r in alone for n in scores)


def test_one_module_at_a_time_is_asked_for_and_a_global_dial_sweeps_thrice_at_first_and_twice_from_then_on():
    scores, asked = matrices("distinct"), []
    top = TopEntries(tuple(scores), lambda name: (asked.append(name), scores[name])[1], "global")
    list(top.masks(0.2))
    assert asked == [*scores] * 3  # two histograms and the mask
    list(top.masks(0.4))
    assert asked == [*scores] * 5
    list(top.masks(0.2))
    assert asked == [*scores] * 6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused(bad):
    with pytest.raises(NumericError, match="not finite"):
        list(TopEntries(("a",), lambda _: torch.tensor([[1.0, bad]]), "global").masks(0.5))


def top_of_change(vector, granularity="tensor"):
    parts, pairs = vector.split(vector.get()), {pair.module_name: pair for pair in vector.pairs()}
    return TopEntries(tuple(pairs), lambda name: weight_change(parts, pairs[name]).abs(), granularity)


def changes(vector, candidate: Candidate) -> dict[str, torch.Tensor]:
    """(d_out, d_in) of each module, whatever form it has."""
    parts = vector.split(candidate.factors)
    return {
        pair.module_name: weight_change(parts, pair)
        + (candidate.beside[pair.module_name].dense() if pair.module_name in candidate.beside else 0.0)
        for pair in vector.pairs()
    }


def test_a_patch_is_exactly_minus_the_change_at_the_masked_places(tuned):
    vector = tuned.vector
    top, raw = top_of_change(vector), vector.get()
    candidate = masked_path(vector, "patch", top.masks, facts={}, progress=Silent()).at(0.2)
    assert torch.equal(candidate.factors, raw)
    before = changes(vector, Candidate(raw))
    for name, mask in top.masks(0.2):
        patch = candidate.beside[name]
        assert isinstance(patch, SparsePatch)
        assert torch.equal(patch.dense(), -before[name].where(mask, 0.0))
        assert len(patch.values) == int(mask.sum()) == math.floor(0.2 * mask.numel())


def test_an_adapter_is_the_best_refit_of_what_the_mask_leaves_and_its_loss_is_reported(tuned):
    vector = tuned.vector
    top, before = top_of_change(vector), changes(vector, Candidate(vector.get()))
    path = masked_path(vector, "adapter", top.masks, facts={"known": 1}, progress=Silent())
    candidate, facts = path.at(0.2), path.facts_of(0.2)
    after, lost, wanted, pruned = changes(vector, candidate), 0.0, 0.0, 0.0
    for name, mask in top.masks(0.2):
        kept = before[name].masked_fill(mask, 0.0)
        U, S, Vh = torch.linalg.svd(kept.double())
        best = (U[:, :4] * S[:4]) @ Vh[:4]
        assert torch.allclose(after[name], best.float(), atol=1e-5)
        lost, wanted = lost + float(S[4:].square().sum()), wanted + float(S.square().sum())
        pruned += float(before[name].where(mask, 0.0).square().sum())
    assert candidate.beside == {}
    assert facts["refit_lost_share"] == pytest.approx(lost / wanted, rel=1e-4)
    assert facts["pruning_kept"] == pytest.approx(1 - lost / pruned, rel=1e-4)
    assert facts["kept_energy"] == pytest.approx(wanted / (wanted + pruned), rel=1e-4)
    assert facts["known"] == 1


def test_a_module_of_which_nothing_is_masked_keeps_the_bytes_of_its_factors(tuned):
    vector, raw = tuned.vector, tuned.vector.get()
    chosen = vector.pairs()[4]

    def masks(_: float):
        for pair in vector.pairs():
            parts = vector.split(raw)
            mask = torch.zeros(len(parts[pair.b_name]), parts[pair.a_name].shape[1], dtype=torch.bool)
            mask[0] = pair is chosen or pair == chosen
            yield pair.module_name, mask

    path = masked_path(vector, "adapter", masks, facts={}, progress=Silent())
    after, before = vector.split(path.at(0.1).factors), vector.split(raw)
    for name in vector.names:
        assert torch.equal(after[name], before[name]) == (name not in (chosen.a_name, chosen.b_name))
    assert path.facts_at(0.1)["counts"][chosen.module_name] == path.facts_at(0.1)["pruned"]


def test_facts_of_a_dial_count_what_was_asked_for(tuned):
    vector = tuned.vector
    path = masked_path(vector, "patch", top_of_change(vector, "global").masks, facts={}, progress=Silent())
    entries = sum(one.numel() for one in changes(vector, Candidate(vector.get())).values())
    facts = path.facts_at(0.05)
    assert facts["pruned"] == sum(facts["counts"].values()) == math.floor(0.05 * entries)
    assert facts["pruned_ratio"] == pytest.approx(0.05, abs=1e-4)
    assert facts["mask_sha256"] != path.facts_at(0.1)["mask_sha256"]
