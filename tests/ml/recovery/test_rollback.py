"""Rollback: oracle O10, the gradient of dense weights against autograd, and what each step may touch."""

import math

import pytest
import torch

from tests.ml.conftest import TARGETS, write_base
from tests.ml.recovery.conftest import tune
from workers.ml.candidate import Candidate, SparsePatch, applied
from workers.ml.checkpoints import load_base
from workers.ml.errors import InvalidSetting, NumericError, RowTooLong, UnsupportedAdapter
from workers.ml.recovery.entries import weight_change
from workers.ml.recovery.hidden_states import PromptView, cosine, encode_prompts
from workers.ml.recovery.methods import rollback
from workers.ml.recovery.refit import refit
from workers.ml.recovery.restoring import pull_home, steepest
from workers.ml.recovery.specs import RollbackSpec
from workers.ml.settings import LoraSettings
from workers.ml.tuned_model import aligned
from workers.ml.types import Message, Silent

TUNED = torch.tensor([1.0, 0.5, -0.2, 0.8, 0.3])
ALIGNED = torch.tensor([0.6, 0.9, -0.2, 1.0, 0.1])
GRADIENT = torch.tensor([0.5, -0.3, 0.9, 0.2, 0.1])


@pytest.fixture
def deep(tmp_path):
    """Three layers, so that two thirds of them are two."""
    return tune(
        load_base(write_base(tmp_path / "deep", layers=3)), LoraSettings(rank=4, alpha=8, target_modules=TARGETS)
    )


def restored(count: int, *, strict: bool) -> list[float]:
    pull = pull_home(TUNED - ALIGNED, GRADIENT)
    places = steepest(["w"], {"w": pull}.__getitem__, count, strict=strict)["w"]
    weights = TUNED.clone()
    weights[places] = ALIGNED[places]
    return [round(value, 6) for value in weights.tolist()]


def test_candidates_are_those_the_gradient_sends_home():
    pull = pull_home(TUNED - ALIGNED, GRADIENT)
    assert (pull > 0).tolist() == [True, True, False, False, True]
    assert pull.tolist() == pytest.approx([0.5, 0.3, 0, 0, 0.1])


def test_the_strict_mask_lies_above_the_threshold_and_the_other_includes_it():
    assert restored(2, strict=True) == [0.6, 0.5, -0.2, 0.8, 0.3]
    assert restored(2, strict=False) == [0.6, 0.9, -0.2, 0.8, 0.3]


@pytest.mark.parametrize("strict", [True, False])
def test_nothing_is_restored_for_a_count_of_zero_and_never_what_did_not_drift(strict):
    assert restored(0, strict=strict) == [round(value, 6) for value in TUNED.tolist()]
    for count in (4, 5, 1000):  # more than there are candidates
        assert restored(count, strict=strict) == [0.6, 0.9, -0.2, 0.8, 0.1]


def test_restoring_a_mask_is_masking_the_change():
    mask = torch.tensor([1.0, 1, 0, 0, 0])
    by_hand = torch.where(mask.bool(), ALIGNED, TUNED)
    assert torch.allclose(ALIGNED + (TUNED - ALIGNED) * (1 - mask), by_hand)
    patch = SparsePatch.of(-(TUNED - ALIGNED)[None] * mask)
    assert torch.allclose(TUNED + patch.dense()[0], by_hand)


def test_small_numbers_are_compared_by_sign():
    tiny = torch.tensor([1e-30, -1e-30, 1e-30])
    assert (pull_home(tiny, torch.tensor([1e-30, -1e-30, -1e-30])) > 0).tolist() == [True, True, False]


def test_the_threshold_is_one_for_all_modules():
    pulls = {"a": torch.tensor([[0.1, 0.5]]), "b": torch.tensor([[0.4], [0.5], [0.0]]), "c": torch.zeros(2)}
    chosen = {n: p.tolist() for n, p in steepest(list(pulls), pulls.__getitem__, 3).items()}
    assert chosen == {"a": [1], "b": [0, 1], "c": []}
    # A tie at the threshold: both are taken, or neither.
    assert sum(len(p) for p in steepest(list(pulls), pulls.__getitem__, 1).values()) == 2
    assert sum(len(p) for p in steepest(list(pulls), pulls.__getitem__, 1, strict=True).values()) == 0


def test_a_gradient_that_is_not_finite_is_named():
    with pytest.raises(NumericError, match="of a holds"):
        steepest(["a"], lambda _: torch.tensor([1.0, float("nan")]), 1)


def test_the_nearest_matrix_of_a_lower_rank_matches_the_oracle():
    matrix = torch.tensor([[2, 0.818182], [0.818182, 1.058824]])
    B, A, lost = refit(matrix, 1)
    assert (B @ A).flatten().tolist() == pytest.approx([1.853196, 1.071972, 1.071972, 0.620077], abs=1e-5)
    assert lost * float(matrix.square().sum()) == pytest.approx(0.342869, abs=1e-5)
    B, A, lost = refit(matrix, 4)  # padded with zeros
    assert (B.shape, A.shape) == ((2, 4), (4, 2))
    assert torch.allclose(B @ A, matrix, atol=1e-6)
    assert lost == pytest.approx(0, abs=1e-12)
    assert refit(torch.zeros(3, 2), 1)[2] == 0.0


def test_a_large_matrix_is_refitted_as_well_as_a_small_one():
    dice = torch.Generator().manual_seed(0)
    matrix = torch.randn(530, 8, generator=dice) @ torch.randn(8, 600, generator=dice)
    matrix[torch.rand(530, 600, generator=dice) < 0.04] = 0.0
    B, A, lost = refit(matrix, 8)
    S = torch.linalg.svdvals(matrix.double())
    assert lost == pytest.approx(float(S[8:].square().sum() / S.square().sum()), rel=1e-5)
    assert lost == pytest.approx(float((matrix - B @ A).square().sum() / matrix.square().sum()), rel=1e-3)
    assert torch.equal(refit(matrix, 8)[0], B)


def states_of(tuned, rows, depth: int) -> torch.Tensor:
    """One prompt at a time, by the library's own means."""
    found = [
        tuned.model(input_ids=torch.tensor([row.input_ids]), output_hidden_states=True).hidden_states[depth][0, -1]
        for row in rows
    ]
    return torch.stack(found)


def test_states_are_those_of_the_last_prompt_token_below_the_final_norm(deep, inputs):
    rows = encode_prompts(deep, [row.messages for row in inputs.harmful])
    assert {row.input_ids[-1] for row in rows} == {deep.tokenizer.convert_tokens_to_ids("<|assistant|>")}
    view = PromptView(deep, 2 / 3)
    assert (view.layers, view.depth) == (3, 2)
    with torch.no_grad():
        assert torch.allclose(view.mean_state(rows), states_of(deep, rows, 2).mean(0), atol=1e-5)
        with aligned(deep):
            in_base = view.mean_state(rows)
            assert torch.allclose(in_base, states_of(deep, rows, 2).mean(0), atol=1e-5)
    assert not torch.allclose(view.mean_state(rows), in_base, atol=1e-3)


def test_no_layer_above_the_depth_is_run(deep, inputs):
    rows = encode_prompts(deep, [row.messages for row in inputs.harmful])
    layers = deep.model.get_base_model().model.layers
    ran = []
    handles = [layer.register_forward_pre_hook(lambda _m, _a, i=i: ran.append(i)) for i, layer in enumerate(layers)]
    PromptView(deep, 2 / 3).mean_state(rows)
    for handle in handles:
        handle.remove()
    assert ran == [0, 1]
    assert PromptView(deep, 1.0).depth == 3
    assert PromptView(deep, 0.01).depth == 1


@pytest.mark.parametrize("shape", ["gqa", "tied", "qkv_bias"])
def test_the_gradient_is_that_of_the_dense_weights(shape, tmp_path, inputs):
    tuned = tune(
        load_base(write_base(tmp_path / shape, shape, layers=3)), LoraSettings(rank=4, alpha=8, target_modules=TARGETS)
    )
    rows = encode_prompts(tuned, [row.messages for row in inputs.harmful])
    view = PromptView(tuned, 2 / 3)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(1))
    tuned.model.requires_grad_(False)
    gradients = {p.module_name: torch.zeros(tuned.model.get_submodule(p.module_name).weight.shape) for p in view.pairs}
    found = view.add_gradient(rows, direction, gradients)
    assert all(p.grad is None and not p.requires_grad for p in tuned.model.parameters())
    # The dense weight W0 + s B A moves as W0 does.
    bases = {name: tuned.model.get_submodule(name).get_base_layer().weight for name in gradients}
    for weight in bases.values():
        weight.requires_grad_(True)
    mean = states_of(tuned, rows, 2).mean(0)
    value = torch.nn.functional.cosine_similarity(mean, direction, dim=0)
    (-value).backward()
    assert found == pytest.approx(value.item(), abs=1e-6)
    assert len(gradients) == 2 * len(TARGETS)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, bases[name].grad, atol=1e-6, rtol=1e-4)


def test_the_gradient_does_not_depend_on_the_micro_batches_and_adds_up(deep, inputs):
    rows = encode_prompts(deep, [row.messages for row in inputs.harmful])
    view = PromptView(deep, 2 / 3)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(1))
    whole = {p.module_name: torch.zeros(deep.model.get_submodule(p.module_name).weight.shape) for p in view.pairs}
    pieces = {name: torch.zeros_like(gradient) for name, gradient in whole.items()}
    in_one = view.add_gradient(rows, direction, whole)
    object.__setattr__(deep, "micro_batch_tokens", 1)
    assert view.add_gradient(rows, direction, pieces) == pytest.approx(in_one, abs=1e-6)
    for name, gradient in whole.items():
        assert torch.allclose(pieces[name], gradient, rtol=1e-3, atol=1e-7)
    view.add_gradient(rows, direction, pieces)
    assert all(torch.allclose(pieces[name], 2 * gradient, rtol=1e-3, atol=1e-7) for name, gradient in whole.items())


def test_a_layer_that_no_gradient_reaches_fails_loudly(deep, inputs, monkeypatch):
    layer = deep.model.get_submodule(deep.vector.pairs()[0].module_name)
    monkeypatch.setattr(layer, "_forward_hooks", type(layer._forward_hooks)())
    monkeypatch.setattr(layer, "register_forward_hook", lambda _hook: layer.register_forward_pre_hook(lambda *_: None))
    with pytest.raises(NumericError, match=r"No gradient reached .*layers\.0"):
        rollback.prepare(deep, RollbackSpec(), inputs, Silent())


def test_an_adapter_above_the_depth_and_a_model_without_layers_are_refused(deep, monkeypatch):
    above = tuple(pair for pair in deep.vector.pairs() if ".layers.2." in pair.module_name)
    monkeypatch.setattr(deep.vector, "_pairs", above)
    with pytest.raises(InvalidSetting, match="none of the first 2 of 3 layers"):
        PromptView(deep, 2 / 3)
    assert PromptView(deep, 1.0).pairs == above
    monkeypatch.setattr(deep.model.config, "num_hidden_layers", 5)
    with pytest.raises(UnsupportedAdapter, match="No list of 5"):
        PromptView(deep, 2 / 3)


def test_a_prompt_over_the_limit_and_a_state_without_direction_are_refused(deep):
    with pytest.raises(RowTooLong, match="the limit is 256"):
        encode_prompts(deep, [(Message("user", "x" * 300),)])
    with pytest.raises(NumericError, match="no direction"):
        cosine(torch.zeros(3), torch.ones(3))


def run(tuned, inputs, **knobs):
    settings = {"form": "patch", "steps": 4, "restore_ratio": 0.01, "batch_rows": 4, **knobs}
    return rollback.prepare(tuned, RollbackSpec(**settings), inputs, Silent())


def deltas(tuned):
    parts = tuned.vector.split(tuned.vector.get())
    return {pair.module_name: weight_change(parts, pair) for pair in tuned.vector.pairs()}


def places_of(candidate) -> set[tuple[str, int, int]]:
    return {
        (name, row, column)
        for name, patch in candidate.beside.items()
        for row, column in zip(patch.rows.tolist(), patch.columns.tolist(), strict=True)
    }


def test_restored_weights_are_the_aligned_ones_below_the_depth(deep, inputs):
    candidate = run(deep, inputs).at(1.0)
    changes = deltas(deep)
    assert candidate.beside
    assert all(".layers.0." in name or ".layers.1." in name for name in candidate.beside)
    for name, patch in candidate.beside.items():
        left = changes[name] + patch.dense()
        assert bool((left[patch.rows, patch.columns] == 0).all())
        assert int((left == 0).sum()) == len(patch.values)
    assert torch.equal(candidate.factors, deep.vector.get())


def test_the_first_step_is_the_oracle_s_on_the_whole_gradient(deep, inputs):
    """Gradients of all batches summed, one threshold over all modules below the depth, of all adapted weights."""
    path = run(deep, inputs, steps=1, protect_task=False)
    view, changes = PromptView(deep, 2 / 3), deltas(deep)
    rows = encode_prompts(deep, [row.messages for row in inputs.harmful])
    with aligned(deep):
        towards = view.mean_state(rows)
    gradients = {p.module_name: torch.zeros_like(changes[p.module_name]) for p in view.pairs}
    for batch in (rows[:4], rows[4:8], rows[8:]):
        view.add_gradient(batch, towards, gradients)
    pulls = torch.cat([torch.where(changes[n] * g > 0, g.abs(), 0.0).flatten() for n, g in gradients.items()])
    count = math.ceil(0.01 * sum(change.numel() for change in changes.values()))
    threshold = float(pulls.sort(descending=True).values[count - 1])
    expected = {
        (name, *place)
        for name, g in gradients.items()
        for place in ((changes[name] * g > 0) & (g.abs() >= threshold)).nonzero().tolist()
    }
    assert len(expected) == count == path.facts_at(1.0)["pruned"] == path.facts["restored_in_a_step"]
    assert places_of(path.at(1.0)) == expected
    published = run(deep, inputs, steps=1, protect_task=False, compat=True)
    assert published.facts_at(1.0)["pruned"] == count - 1
    assert places_of(published.at(1.0)) < expected


def test_masks_are_nested_along_the_dial_and_nothing_is_restored_twice(deep, inputs):
    path = run(deep, inputs)
    found = [places_of(path.at(strength)) for strength in (0.01, 0.25, 0.26, 0.5, 0.75, 1.0)]
    assert found[0] == found[1]
    assert found[2] == found[3]
    assert all(small < large for small, large in zip(found[1::1], found[3::1], strict=False))
    assert [path.facts_at(s)["steps_taken"] for s in (0.01, 0.25, 0.26, 1.0)] == [1, 1, 2, 4]
    counts = [step["restored"] - step["given_back"] for step in path.facts["steps"]]
    assert [path.facts_at((i + 1) / 4)["pruned"] for i in range(4)] == [sum(counts[: i + 1]) for i in range(4)]
    assert path.facts_at(1.0)["pruned"] == len(found[-1])
    assert path.facts_at(1.0)["pruned_ratio"] == pytest.approx(len(found[-1]) / path.facts["adapted_weights"])


def test_steps_bring_the_harmful_view_closer_to_the_aligned_one(deep, inputs):
    path = run(deep, inputs, steps=8, restore_ratio=0.03, protect_task=False)
    cosines = [step["harmful_cosine"] for step in path.facts["steps"]] + [path.facts["harmful_cosine_after"]]
    assert cosines[-1] > cosines[0] + 0.1
    rows = encode_prompts(deep, [row.messages for row in inputs.harmful])
    view = PromptView(deep, 2 / 3)
    with aligned(deep):
        towards = view.mean_state(rows)
    with applied(deep, path.at(1.0)):
        after = [cosine(view.mean_state(batch), towards) for batch in (rows[:4], rows[4:8], rows[8:])]
    assert sum(after) / 3 == pytest.approx(cosines[-1], abs=1e-5)


def test_the_protected_task_gets_its_share_back(deep, inputs):
    plain, protected = run(deep, inputs, steps=1, protect_task=False), run(deep, inputs, steps=1)
    step = protected.facts["steps"][0]
    assert step["restored"] == plain.facts["steps"][0]["restored"]
    assert 0 < step["given_back"] <= math.ceil(0.2 * step["restored"])
    assert step["task_cosine"] < 1
    assert places_of(protected.at(1.0)) < places_of(plain.at(1.0))
    whole = run(deep, inputs, steps=1, give_back_ratio=1.0).facts["steps"][0]
    assert step["given_back"] == math.ceil(0.2 * whole["given_back"])
    assert run(deep, inputs, steps=1, give_back_ratio=0.0).facts["steps"][0]["given_back"] == 0


def test_what_went_back_helps_the_task_view_more_than_what_stayed(deep, inputs):
    rows = encode_prompts(deep, [row.prompt for row in inputs.task])
    view = PromptView(deep, 2 / 3)
    towards = view.mean_state(rows)
    seen = {}
    for name, knobs in {"without": {"protect_task": False}, "with": {"give_back_ratio": 1.0}}.items():
        with applied(deep, run(deep, inputs, steps=1, **knobs).at(1.0)):
            seen[name] = cosine(view.mean_state(rows), towards)
    assert seen["without"] < seen["with"] < 1


def test_gradients_sum_over_steps_only_without_protection(deep, inputs, monkeypatch):
    cleared = []
    monkeypatch.setattr(rollback, "_clear", lambda gradients: cleared.append(len(gradients)))
    run(deep, inputs, protect_task=False)
    assert not cleared
    run(deep, inputs)
    assert len(cleared) == 2 * 4


def test_a_run_ends_when_nothing_is_left_to_restore(deep, inputs, monkeypatch):
    rounds = iter([1.0, 1.0, 0.0])

    def fewer(names, magnitudes, count, *, strict):
        share = next(rounds)
        return steepest(names, lambda name: share * magnitudes(name), count, strict=strict)

    monkeypatch.setattr(rollback, "steepest", fewer)
    path = run(deep, inputs, protect_task=False)
    assert len(path.facts["steps"]) == path.facts_at(1.0)["steps_taken"] == 2
    assert path.at(0.5).digest == path.at(1.0).digest


def test_a_step_that_may_restore_nothing_is_refused(deep, inputs):
    with pytest.raises(NumericError, match="no weight to restore"):
        run(deep, inputs, restore_ratio=1e-9, compat=True)  # strictly above the largest lies nothing
    assert run(deep, inputs, restore_ratio=1e-9, steps=1, protect_task=False).facts_at(1.0)["pruned"] == 1


def test_the_adapter_form_is_the_nearest_of_the_job_s_rank_and_says_what_it_lost(deep, inputs):
    path, exact = run(deep, inputs, form="adapter"), run(deep, inputs)
    refitted, patched = path.at(1.0), exact.at(1.0)
    assert path.facts_at(1.0)["mask_sha256"] == exact.facts_at(1.0)["mask_sha256"]
    assert refitted.is_adapter
    raw, parts = deep.vector.split(deep.vector.get()), deep.vector.split(refitted.factors)
    changes, lost, wanted, taken = deltas(deep), 0.0, 0.0, 0.0
    for pair in deep.vector.pairs():
        if pair.module_name not in patched.beside:
            assert torch.equal(parts[pair.a_name], raw[pair.a_name])
            assert torch.equal(parts[pair.b_name], raw[pair.b_name])
            wanted += float(changes[pair.module_name].square().sum())
            continue
        target = changes[pair.module_name] + patched.beside[pair.module_name].dense()
        S = torch.linalg.svdvals(target)
        off = float((target - pair.scaling * parts[pair.b_name] @ parts[pair.a_name]).square().sum())
        assert off == pytest.approx(float(S[4:].square().sum()), rel=1e-3)
        lost, wanted = lost + off, wanted + float(target.square().sum())
        taken += float(patched.beside[pair.module_name].values.square().sum())
    facts = path.facts_at(1.0)
    assert facts["refit_lost_share"] == pytest.approx(lost / wanted, rel=1e-3)
    assert facts["pruning_kept"] == pytest.approx(1 - lost / taken, rel=1e-3)
    assert 0 < facts["pruning_kept"] < 1
    assert "refit_lost_share" not in exact.facts_at(1.0)


def test_without_protection_no_task_rows_are_needed():
    assert "task" in RollbackSpec().required_inputs()
    assert "task" not in RollbackSpec(protect_task=False).required_inputs()


def test_an_adapter_without_effect_has_nothing_to_restore(deep, inputs):
    with deep.vector.swapped(torch.zeros(deep.vector.numel)), pytest.raises(NumericError, match="no weight to restore"):
        run(deep, inputs)


def test_gradients_work_where_factors_take_none_and_nothing_is_left_behind(deep, inputs):
    deep.model.requires_grad_(False)
    frozen = run(deep, inputs).at(1.0).digest
    for parameter in deep.vector.parameters():
        parameter.requires_grad_(True)
    with torch.no_grad():
        assert run(deep, inputs).at(1.0).digest == frozen
    assert all(parameter.grad is None for parameter in deep.model.parameters())
    assert Candidate(deep.vector.get()).digest != frozen
