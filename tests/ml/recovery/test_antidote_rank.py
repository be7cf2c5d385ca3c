"""Antidote on rank components: scores against plain computations, exact results, and what counts as a component."""

from dataclasses import replace

import pytest
import torch

from tests.ml.conftest import TARGETS
from tests.ml.recovery.conftest import tune
from workers.ml.candidate import Candidate
from workers.ml.checkpoints import load_base
from workers.ml.errors import MissingInput, NumericError
from workers.ml.recovery.calibration import answer_loss, encode_answers, encode_task
from workers.ml.recovery.components import Components, dropping_path
from workers.ml.recovery.entries import weight_change
from workers.ml.recovery.methods import antidote_rank
from workers.ml.recovery.scores import prune_order
from workers.ml.recovery.specs import AntidoteRankSpec
from workers.ml.settings import LoraSettings
from workers.ml.types import Silent

IDS = torch.tensor([[7, 30, 31, 99, 4, 12]])


def changes(tuned, values) -> dict[str, torch.Tensor]:
    parts = tuned.vector.split(values)
    return {pair.module_name: weight_change(parts, pair).double() for pair in tuned.vector.pairs()}


def inputs_of_modules(tuned, rows) -> dict[str, list[torch.Tensor]]:
    """What each adapted layer is given, one row at a time."""
    seen = {pair.module_name: [] for pair in tuned.vector.pairs()}
    handles = [
        tuned.model.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, kept=kept: kept.append(args[0][0].double())
        )
        for name, kept in seen.items()
    ]
    with torch.no_grad():
        for row in rows:
            tuned.model(input_ids=torch.tensor([row.input_ids]))
    for handle in handles:
        handle.remove()
    return seen


def scores_of(tuned, rows, **knobs) -> dict[str, torch.Tensor]:
    components = Components(tuned.vector, tuned.vector.get())
    return antidote_rank.component_scores(tuned, AntidoteRankSpec(**knobs), components, rows, Silent())


def test_activation_scores_match_a_plain_computation_on_dense_matrices(tuned, inputs):
    rows = encode_answers(tuned, inputs.harmful)
    scores, seen = scores_of(tuned, rows, score="activation"), inputs_of_modules(tuned, rows)
    for name, delta in changes(tuned, tuned.vector.get()).items():
        _, S, Vh = torch.linalg.svd(delta)
        squares = torch.stack([(x @ Vh[:4].T).square().sum(0) for x in seen[name]]).mean(0)
        assert torch.allclose(scores[name], S[:4] * squares.sqrt(), rtol=1e-4)


def test_norms_of_single_channels_would_give_another_order(tuned, inputs):
    """Why the projections are needed: channels that excite a component may cancel in it."""
    rows = encode_answers(tuned, inputs.harmful)
    seen, differs = inputs_of_modules(tuned, rows), False
    scores = scores_of(tuned, rows, score="activation")
    for name, delta in changes(tuned, tuned.vector.get()).items():
        _, S, Vh = torch.linalg.svd(delta)
        c = torch.stack([x.square().sum(0) for x in seen[name]]).mean(0)
        by_channel = S[:4] * (Vh[:4].square() @ c).sqrt()
        differs |= scores[name].argsort().tolist() != by_channel.argsort().tolist()
    assert differs


def loss_without(tuned, rows, components, name, index, share):
    """Loss of the rows when `share` of one component is taken away."""
    pair = next(pair for pair in tuned.vector.pairs() if pair.module_name == name)
    values = components.balanced()
    tuned.vector.split(values)[pair.b_name][:, index] *= 1 - share
    with tuned.vector.swapped(values):
        return answer_loss(tuned, rows)


def test_gradient_scores_are_the_first_order_rise_of_the_loss(tuned, inputs):
    rows = encode_answers(tuned, inputs.harmful)
    components = Components(tuned.vector, tuned.vector.get())
    scores = scores_of(tuned, rows, score="gradient")
    step, found, wanted = 0.02, [], []
    for name in list(scores)[::3]:
        for index in range(4):
            up, down = (loss_without(tuned, rows, components, name, index, side * step) for side in (1, -1))
            found.append((up - down) / (2 * step))
            wanted.append(float(scores[name][index]))
    assert found == pytest.approx(wanted, rel=0.05, abs=2e-4)
    assert min(wanted) < 0 < max(wanted)


def test_gradient_scores_sum_to_the_slope_of_taking_the_whole_update_away(tuned, inputs):
    rows = encode_answers(tuned, inputs.harmful)
    total = sum(float(score.sum()) for score in scores_of(tuned, rows, score="gradient").values())
    raw, step = tuned.vector.get(), 0.01
    losses = []
    for share in (1 - step, 1 + step):
        values = raw.clone()
        for pair in tuned.vector.pairs():
            tuned.vector.split(values)[pair.b_name].mul_(share)
        with tuned.vector.swapped(values):
            losses.append(answer_loss(tuned, rows))
    assert total == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=0.02)


@pytest.mark.parametrize("score", ["activation", "gradient"])
@pytest.mark.parametrize("granularity", ["tensor", "global"])
def test_what_is_kept_is_exact_and_what_is_dropped_is_zero(tuned, inputs, score, granularity):
    spec = AntidoteRankSpec(score=score, granularity=granularity)
    path = antidote_rank.prepare(tuned, spec, inputs, Silent())
    facts, after = path.facts_of(0.3), changes(tuned, path.at(0.3).factors)
    parts, start = tuned.vector.split(path.at(0.3).factors), tuned.vector.split(path.raw)
    dropped = {entry["module"]: entry for entry in facts["modules"]}
    pairs = {pair.module_name: pair for pair in tuned.vector.pairs()}
    kept_energy = total = 0.0
    for name, delta in changes(tuned, path.raw).items():
        U, S, Vh = torch.linalg.svd(delta)
        keep = torch.ones(4, dtype=torch.bool)
        if name in dropped:
            assert dropped[name]["of"] == 4
            keep[dropped[name]["dropped"]] = False
            for factor in (parts[pairs[name].b_name].T, parts[pairs[name].a_name]):
                assert factor.abs().sum(dim=1).gt(0).tolist() == keep.tolist()
        else:
            assert torch.equal(parts[pairs[name].b_name], start[pairs[name].b_name])
            assert torch.equal(parts[pairs[name].a_name], start[pairs[name].a_name])
        assert torch.allclose(after[name], (U[:, :4] * (S[:4] * keep)) @ Vh[:4], atol=1e-6 * float(S[0]))
        kept_energy, total = kept_energy + float(S[:4][keep].square().sum()), total + float(S.square().sum())
    assert facts["kept_energy"] == pytest.approx(kept_energy / total, rel=1e-6)
    assert facts["components"] == 56
    assert facts["dropped"] == sum(len(entry["dropped"]) for entry in facts["modules"])
    assert facts["dropped"] == (14 if granularity == "tensor" else 16)  # floor(0.3 * 4) of each, floor(0.3 * 56) of all


def test_a_share_below_one_component_drops_nothing_and_keeps_every_byte(tuned, inputs):
    path = antidote_rank.prepare(tuned, AntidoteRankSpec(granularity="tensor"), inputs, Silent())
    assert torch.equal(path.at(0.2).factors, path.raw)
    assert path.facts_at(0.2) == {"dropped": 0, "dropped_ratio": 0.0, "kept_energy": 1.0, "modules": []}


def test_dropping_everything_is_the_aligned_model_bit_for_bit(tuned, inputs):
    path = antidote_rank.prepare(tuned, AntidoteRankSpec(), inputs, Silent())
    assert torch.equal(path.at(1.0).factors, torch.zeros_like(path.raw))
    with torch.no_grad(), tuned.model.disable_adapter():
        aligned = tuned.model(input_ids=IDS).logits
    with torch.no_grad(), tuned.vector.swapped(path.at(1.0).factors):
        assert torch.equal(tuned.model(input_ids=IDS).logits, aligned)


@pytest.mark.parametrize("score", ["activation", "gradient"])
def test_the_result_does_not_depend_on_the_split_of_the_product(tuned, inputs, score):
    spec = AntidoteRankSpec(score=score)
    plain = antidote_rank.prepare(tuned, spec, inputs, Silent())
    mixed = tuned.vector.get()
    parts = tuned.vector.split(mixed)
    Q = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 2 * torch.eye(4)
    for pair in tuned.vector.pairs():
        parts[pair.b_name].copy_(parts[pair.b_name].double() @ Q)
        parts[pair.a_name].copy_(torch.linalg.inv(Q) @ parts[pair.a_name].double())
    tuned.vector.set(mixed)
    other = antidote_rank.prepare(tuned, spec, inputs, Silent())
    assert other.facts_at(0.3)["modules"] == plain.facts_at(0.3)["modules"]
    before, after = changes(tuned, plain.at(0.3).factors), changes(tuned, other.at(0.3).factors)
    assert all(torch.allclose(before[name], after[name], atol=1e-5) for name in before)


def deficient(tuned) -> None:
    """The first module's update has rank 2 (two columns of B repeat others), the second's is zero."""
    values = tuned.vector.get()
    parts = tuned.vector.split(values)
    first, second = tuned.vector.pairs()[:2]
    parts[first.b_name][:, 2:] = parts[first.b_name][:, :2] * 3
    parts[second.b_name].zero_()
    tuned.vector.set(values)


@pytest.mark.parametrize("score", ["activation", "gradient"])
def test_components_that_are_zero_are_not_counted_and_not_dropped(tuned, inputs, score):
    deficient(tuned)
    path = antidote_rank.prepare(tuned, AntidoteRankSpec(score=score), inputs, Silent())
    first, second = (pair.module_name for pair in tuned.vector.pairs()[:2])
    facts = path.facts_of(1.0)
    assert facts["components"] == facts["dropped"] == 2 + 0 + 12 * 4
    sizes = {entry["module"]: entry["of"] for entry in facts["modules"]}
    assert sizes[first] == 2
    assert second not in sizes
    half = antidote_rank.prepare(tuned, AntidoteRankSpec(score=score, granularity="tensor"), inputs, Silent())
    dropped = {entry["module"]: len(entry["dropped"]) for entry in half.facts_at(0.5)["modules"]}
    assert dropped[first] == 1  # of 2, and not of 4
    assert set(dropped.values()) == {1, 2}
    assert Candidate(half.at(0.5).factors).is_finite()
    assert float(changes(tuned, half.at(0.5).factors)[first].norm()) > 0


def test_equal_scores_spare_the_earlier_component(tuned):
    components = Components(tuned.vector, tuned.vector.get())
    level = {name: torch.ones(len(one.S), dtype=torch.float64) for name, one in components.spectra.items()}
    path = dropping_path(components, prune_order(level, "global"), tuned.vector.get(), facts={})
    last = [pair.module_name for pair in tuned.vector.pairs()][-2:]
    assert path.facts_at(6 / 56)["modules"] == [
        {"module": last[0], "dropped": [2, 3], "of": 4},
        {"module": last[1], "dropped": [0, 1, 2, 3], "of": 4},
    ]


@pytest.mark.parametrize("score", ["activation", "gradient"])
def test_what_spared_rows_use_counts_against_dropping_in_shares_of_each_set(tuned, inputs, score):
    """The order is that of harmful share - weight * (|task share| + |retention share|)."""
    sets = {
        "harmful": encode_answers(tuned, inputs.harmful),
        "task": encode_task(tuned, inputs.task),
        "retention": encode_answers(tuned, inputs.retention),
    }
    shares = {}
    for role, rows in sets.items():
        flat = torch.cat(list(scores_of(tuned, rows, score=score).values()))
        shares[role] = flat / flat.abs().sum()
    wanted = shares["harmful"] - 2.0 * (shares["task"].abs() + shares["retention"].abs())
    spec = AntidoteRankSpec(score=score, spare=("task", "retention"), spare_weight=2.0)
    path = antidote_rank.prepare(tuned, spec, inputs, Silent())
    chosen = set(wanted.topk(16).indices.tolist())
    place = {pair.module_name: 4 * index for index, pair in enumerate(tuned.vector.pairs())}
    found = {place[e["module"]] + index for e in path.facts_at(16 / 56)["modules"] for index in e["dropped"]}
    assert found == chosen
    plain = antidote_rank.prepare(tuned, AntidoteRankSpec(score=score), inputs, Silent())
    assert plain.facts_at(16 / 56)["modules"] != path.facts_at(16 / 56)["modules"]
    free = AntidoteRankSpec(score=score, spare=("task", "retention"), spare_weight=0.0)
    assert antidote_rank.prepare(tuned, free, inputs, Silent()).facts_at(0.3) == plain.facts_at(0.3)


@pytest.mark.parametrize("score", ["activation", "gradient"])
def test_a_half_precision_base_gives_nearly_the_same_scores(base_folders, inputs, score):
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        lora = LoraSettings(rank=8, alpha=16, target_modules=TARGETS)
        tuned = tune(load_base(base_folders("qkv_bias"), dtype=dtype), lora)
        scores = scores_of(tuned, encode_answers(tuned, inputs.harmful), score=score)
        found.append(torch.cat(list(scores.values())))
    assert float(torch.corrcoef(torch.stack(found))[0, 1]) > 0.99
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 0.1


def test_one_forward_or_one_gradient_over_each_set_of_rows(tuned, inputs):
    forwards = []
    tuned.model.register_forward_pre_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    antidote_rank.prepare(tuned, AntidoteRankSpec(score="activation", spare=("task",)), inputs, Silent())
    assert forwards == [False, False]  # each set is one micro-batch
    forwards.clear()
    antidote_rank.prepare(tuned, AntidoteRankSpec(score="gradient"), inputs, Silent())
    assert forwards == [True]


def test_what_is_spared_is_required(tuned, inputs):
    with pytest.raises(MissingInput, match="task"):
        antidote_rank.prepare(tuned, AntidoteRankSpec(spare=("task",)), replace(inputs, task=()), Silent())


def test_an_adapter_that_changes_nothing_is_refused(tuned, inputs):
    tuned.vector.set(torch.zeros(tuned.vector.numel))
    with pytest.raises(NumericError, match="no component to drop"):
        antidote_rank.prepare(tuned, AntidoteRankSpec(), inputs, Silent())
