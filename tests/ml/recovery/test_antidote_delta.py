"""Antidote on the update: oracles O3 (as a contrast) and O10, and scores against a plain computation."""

import math
from dataclasses import replace

import pytest
import torch

from tests.ml.conftest import TARGETS
from tests.ml.recovery.conftest import tune
from workers.ml.candidate import applied
from workers.ml.checkpoints import load_base
from workers.ml.errors import MissingInput, NumericError
from workers.ml.recovery.calibration import encode_answers, encode_task
from workers.ml.recovery.entries import TopEntries, weight_change
from workers.ml.recovery.methods import antidote_delta
from workers.ml.recovery.scores import ChannelNorms, prune_order, wanda_scores
from workers.ml.recovery.specs import AntidoteDeltaSpec
from workers.ml.settings import LoraSettings
from workers.ml.types import Silent

DELTA = 2 * torch.tensor([[1.0, 0.5], [-2, 1]]) @ torch.tensor([[1.0, -2, 0.5], [0.2, 1, 3]])  # O3's
IDS = torch.tensor([[7, 30, 31, 99, 4, 12]])


def mask_of(scores: torch.Tensor, ratio: float, granularity: str) -> list[list[int]]:
    return dict(TopEntries(("w",), lambda _: scores, granularity).masks(ratio))["w"].int().tolist()


def test_pruning_the_update_is_not_pruning_its_factors():
    """On O3's factors and calibration rows, whose channel norms are (1, 2, 1); ties spare the lower index."""
    norms = ChannelNorms("rms")
    norms.add(torch.diag(torch.tensor([1.0, 2, 1]))[None], torch.ones(1, 3))
    scores = wanda_scores(DELTA, norms.value())
    assert DELTA.flatten().tolist() == pytest.approx([2.2, -3, 4, -3.6, 10, 4])
    assert scores.flatten().tolist() == pytest.approx([2.2, 6, 4, 3.6, 20, 4])
    assert mask_of(scores, 1 / 3, "row") == [[0, 1, 0], [0, 1, 0]]
    assert mask_of(scores, 1 / 3, "global") == mask_of(scores, 1 / 3, "tensor") == [[0, 1, 0], [0, 1, 0]]
    assert mask_of(scores, 1 / 2, "tensor") == [[0, 1, 0], [0, 1, 1]]
    kept = DELTA.masked_fill(torch.tensor(mask_of(scores, 1 / 3, "row")).bool(), 0)
    assert kept.flatten().tolist() == pytest.approx([2.2, 0, 4, -3.6, 0, 4])  # O3: [[.2, 1, 0], [.4, 2, 0]]


def change_of(tuned) -> dict[str, torch.Tensor]:
    parts = tuned.vector.split(tuned.vector.get())
    return {pair.module_name: weight_change(parts, pair) for pair in tuned.vector.pairs()}


def plain_scores(tuned, rows) -> dict[str, torch.Tensor]:
    """One row at a time, through hooks on the adapted layers themselves."""
    seen = {pair.module_name: [] for pair in tuned.vector.pairs()}
    handles = [
        tuned.model.get_submodule(name).register_forward_pre_hook(lambda _m, args, kept=kept: kept.append(args[0][0]))
        for name, kept in seen.items()
    ]
    with torch.no_grad():
        for row in rows:
            tuned.model(input_ids=torch.tensor([row.input_ids]))
    for handle in handles:
        handle.remove()
    norms = {name: torch.stack([x.square().sum(0) for x in xs]).mean(0).sqrt() for name, xs in seen.items()}
    return {name: delta.abs() * norms[name] for name, delta in change_of(tuned).items()}


@pytest.mark.parametrize("granularity", ["row", "tensor", "global"])
def test_masks_are_those_of_a_plain_computation(tuned, inputs, granularity):
    scores = plain_scores(tuned, encode_answers(tuned, inputs.harmful))
    order = prune_order(scores, granularity)
    spec = AntidoteDeltaSpec(form="patch", granularity=granularity)
    path = antidote_delta.prepare(tuned, spec, inputs, Silent())
    for ratio in (0.05, 0.3):
        patches = path.at(ratio).beside
        wanted = order.masks(ratio)
        assert {name for name, mask in wanted.items() if mask.any()} == set(patches)
        for name, patch in patches.items():
            assert torch.equal(patch.dense() != 0, wanted[name])
    assert path.facts["harmful_rows"] == len(inputs.harmful)


@pytest.mark.parametrize("compat", [False, True])
def test_counts_are_those_of_the_knobs(tuned, inputs, compat):
    spec = AntidoteDeltaSpec(form="patch", granularity="row", compat=compat)
    path = antidote_delta.prepare(tuned, spec, inputs, Silent())
    for name, delta in change_of(tuned).items():
        width = delta.shape[1]
        each = width - int(width * (1 - 0.05)) if compat else math.floor(0.05 * width)
        assert path.facts_at(0.05)["counts"][name] == each * len(delta)


@pytest.mark.parametrize("shape", ["gqa", "qkv_bias"])
def test_a_patched_model_is_the_base_with_what_the_mask_leaves_of_the_update(shape, base_folders, inputs):
    """O10: restoring the masked weights to their aligned value is W0 + delta * (1 - mask)."""
    tuned = tune(load_base(base_folders(shape)), LoraSettings(rank=4, alpha=8, target_modules=TARGETS))
    spec = AntidoteDeltaSpec(form="patch", granularity="global")
    path = antidote_delta.prepare(tuned, spec, inputs, Silent())
    candidate = path.at(0.3)
    merged = load_base(base_folders(shape)).model
    with torch.no_grad():
        for name, delta in change_of(tuned).items():
            mask = candidate.beside[name].dense() != 0
            merged.get_submodule(name.removeprefix("base_model.model.")).weight += delta.masked_fill(mask, 0.0)
        with applied(tuned, candidate):
            assert torch.allclose(tuned.model(input_ids=IDS).logits, merged(input_ids=IDS).logits, atol=1e-5)
        raw = tuned.model(input_ids=IDS).logits
        assert not torch.allclose(raw, merged(input_ids=IDS).logits, atol=1e-2)


def test_a_mask_of_everything_is_the_aligned_model(tuned, inputs):
    for form in ("patch", "adapter"):
        path = antidote_delta.prepare(tuned, AntidoteDeltaSpec(form=form), inputs, Silent())
        assert path.facts_at(1.0)["kept_energy"] == pytest.approx(0.0, abs=1e-12)
        with torch.no_grad():
            with tuned.model.disable_adapter():
                aligned = tuned.model(input_ids=IDS).logits
            with applied(tuned, path.at(1.0)):
                assert torch.allclose(tuned.model(input_ids=IDS).logits, aligned, atol=1e-5)


def test_masks_and_refits_do_not_depend_on_the_split_of_scale(tuned, inputs):
    def result(form):
        path = antidote_delta.prepare(tuned, AntidoteDeltaSpec(form=form), inputs, Silent())
        candidate = path.at(0.2)
        parts = tuned.vector.split(candidate.factors)
        change = {pair.module_name: weight_change(parts, pair) for pair in tuned.vector.pairs()}
        return path.facts_at(0.2)["pruned"], [
            change[name] + (candidate.beside[name].dense() if form == "patch" else 0.0) for name in change
        ]

    plain = {form: result(form) for form in ("patch", "adapter")}
    other = tuned.vector.get()
    for pair in tuned.vector.pairs():
        tuned.vector.split(other)[pair.a_name].div_(8)  # a power of two, so that nothing is rounded anew
        tuned.vector.split(other)[pair.b_name].mul_(8)
    tuned.vector.set(other)
    for form, (pruned, change) in plain.items():
        found = result(form)
        assert found[0] == pruned
        assert all(torch.allclose(one, two, atol=1e-5) for one, two in zip(change, found[1], strict=True))


@pytest.mark.parametrize("granularity", ["row", "tensor", "global"])
def test_entries_that_task_and_retention_excite_most_are_spared(tuned, inputs, granularity):
    spec = AntidoteDeltaSpec(form="patch", granularity=granularity, spare=("task", "retention"), spare_ratio=0.3)
    candidate = antidote_delta.prepare(tuned, spec, inputs, Silent()).at(0.3)
    sets = {
        "harmful": encode_answers(tuned, inputs.harmful),
        "task": encode_task(tuned, inputs.task),
        "retention": encode_answers(tuned, inputs.retention),
    }
    top = {role: prune_order(plain_scores(tuned, rows), granularity).masks(0.3) for role, rows in sets.items()}
    pruned = 0
    for name, mask in top["harmful"].items():
        wanted = mask & ~top["task"][name] & ~top["retention"][name]
        assert (
            torch.equal(candidate.beside[name].dense() != 0, wanted) if wanted.any() else name not in candidate.beside
        )
        pruned += int(wanted.sum())
    assert 0 < pruned < sum(int(mask.sum()) for mask in top["harmful"].values())


def test_what_is_spared_is_required(tuned, inputs):
    with pytest.raises(MissingInput, match="retention"):
        antidote_delta.prepare(tuned, AntidoteDeltaSpec(spare=("retention",)), replace(inputs, retention=()), Silent())


def test_an_adapter_that_changes_nothing_is_refused(tuned, inputs):
    tuned.vector.set(torch.zeros(tuned.vector.numel))
    with pytest.raises(NumericError, match="no entry to prune"):
        antidote_delta.prepare(tuned, AntidoteDeltaSpec(), inputs, Silent())
