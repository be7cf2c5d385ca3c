"""Antidote on factors: oracle O3, and the method's own scores against a plain computation."""

from dataclasses import replace

import pytest
import torch

from workers.ml.errors import MissingInput, NumericError
from workers.ml.recovery.activations import channel_norms, forward_pieces
from workers.ml.recovery.calibration import encode_answers, encode_task
from workers.ml.recovery.methods import antidote
from workers.ml.recovery.scores import ChannelNorms, prune_order, wanda_scores
from workers.ml.recovery.specs import AntidoteSpec
from workers.ml.types import Silent

A = torch.tensor([[1.0, -2, 0.5], [0.2, 1, 3]])
B = torch.tensor([[1.0, 0.5], [-2, 1]])
LEAVES = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")


def test_factor_pruning_is_not_delta_pruning():
    x = torch.diag(torch.tensor([1.0, 2, 1]))
    of_x, of_z = ChannelNorms("rms"), ChannelNorms("rms")
    of_x.add(x[None], torch.ones(1, 3))
    of_z.add((x @ A.T)[None], torch.ones(1, 3))  # from the unpruned A
    scores = {"A": wanda_scores(A, of_x.value()), "B": wanda_scores(B, of_z.value())}
    assert scores["A"].flatten().tolist() == pytest.approx([1, 4, 0.5, 0.2, 2, 3])
    assert of_z.value().tolist() == pytest.approx([4.153312, 3.611094], abs=1e-6)
    assert scores["B"].flatten().tolist() == pytest.approx([4.153312, 1.805547, 8.306624, 3.611094], abs=1e-6)
    pruned_A = A.masked_fill(prune_order({"A": scores["A"]}, "row").masks(1 / 3)["A"], 0)
    pruned_B = B.masked_fill(prune_order({"B": scores["B"]}, "row").masks(1 / 2)["B"], 0)
    assert (2 * pruned_B @ pruned_A).tolist() == [pytest.approx([0.2, 1, 0]), pytest.approx([0.4, 2, 0])]
    assert float((2 * B @ A).norm()) == pytest.approx(12.601587, abs=1e-5)
    assert float((2 * pruned_B @ pruned_A).norm()) == pytest.approx(2.280351, abs=1e-5)


def test_scores_of_a_model_match_one_row_at_a_time(tuned, inputs):
    rows = encode_answers(tuned, inputs.harmful)
    pair = tuned.vector.pairs()[3]
    layer = tuned.model.get_submodule(pair.module_name)
    seen = []
    handle = layer.register_forward_pre_hook(lambda _module, args: seen.append(args[0][0]))
    with torch.no_grad():
        for row in rows:
            tuned.model(input_ids=torch.tensor([row.input_ids]))
    handle.remove()
    squares = torch.stack([x.square().sum(0) for x in seen]).mean(0)
    parts = tuned.vector.split(tuned.vector.get())
    expected = parts[pair.a_name].abs() * squares.sqrt()
    scores = antidote.factor_scores(tuned, AntidoteSpec(), rows, Silent())
    assert torch.allclose(scores[pair.a_name], expected, rtol=1e-4)
    z = torch.stack([(x @ parts[pair.a_name].T).square().sum(0) for x in seen]).mean(0).sqrt()
    assert torch.allclose(scores[pair.b_name], parts[pair.b_name].abs() * z, rtol=1e-4)


def test_each_strength_prunes_the_stated_share_and_says_so(tuned, inputs):
    path = antidote.prepare(tuned, AntidoteSpec(granularity="global"), inputs, Silent())
    pruned = int((path.at(0.1).factors == 0).sum())
    assert pruned == path.facts_at(0.1)["pruned"] == int(0.1 * tuned.vector.numel + 1e-9)
    assert path.facts_at(0.1)["mask_sha256"] != path.facts_at(0.2)["mask_sha256"]
    assert torch.equal(path.at(1.0).factors, torch.zeros(tuned.vector.numel))


def test_answer_tokens_alone_give_other_scores(tuned, inputs):
    rows = encode_answers(tuned, inputs.harmful)
    everything = antidote.factor_scores(tuned, AntidoteSpec(), rows, Silent())
    answers = antidote.factor_scores(tuned, AntidoteSpec(tokens="answer"), rows, Silent())
    assert all(bool((answers[name] <= everything[name] * (1 + 1e-5)).all()) for name in everything)
    assert any(not torch.equal(answers[name], everything[name]) for name in everything)


class Passes:
    """Forwards of the whole model, and backwards of anything."""

    def __init__(self, tuned, monkeypatch) -> None:
        self.forwards = self.backwards = 0
        tuned.model.register_forward_pre_hook(lambda *_: self._forward())
        backward = torch.autograd.backward
        monkeypatch.setattr(torch.autograd, "backward", lambda *a, **k: (self._backward(), backward(*a, **k)))

    def _forward(self) -> None:
        assert not torch.is_grad_enabled()
        self.forwards += 1

    def _backward(self) -> None:
        self.backwards += 1


@pytest.mark.parametrize("micro_batch_tokens", [1, 100, 100_000])
def test_scoring_is_exactly_one_forward_over_the_rows_and_no_backward(tuned, inputs, monkeypatch, micro_batch_tokens):
    object.__setattr__(tuned, "micro_batch_tokens", micro_batch_tokens)
    rows = encode_answers(tuned, inputs.harmful)
    pieces = forward_pieces(tuned, rows)
    assert sum(len(piece.input_ids) for piece in pieces) == len(rows)
    passes = Passes(tuned, monkeypatch)
    path = antidote.prepare(tuned, AntidoteSpec(), inputs, Silent())
    assert (passes.forwards, passes.backwards) == (len(pieces), 0)
    for strength in (0.1, 0.2, 0.3):
        path.at(strength)
        path.facts_of(strength)
    assert passes.forwards == len(pieces)  # every further point of the dial is free


def test_layers_that_are_given_one_tensor_share_its_sums_and_nothing_else(tuned, inputs):
    rows = encode_answers(tuned, inputs.harmful)
    names = tuned.vector.names
    together = channel_norms(tuned, rows, names, norm="rms", tokens="all", progress=Silent())
    for name in names:
        alone = channel_norms(tuned, rows, [name], norm="rms", tokens="all", progress=Silent())
        assert torch.equal(alone[name], together[name])
    by_layer = {name.rsplit(".lora_", 1)[0]: norm for name, norm in together.items() if ".lora_A." in name}
    first = {leaf: next(n for layer, n in by_layer.items() if layer.endswith(f"0.{leaf}")) for leaf in LEAVES}
    assert torch.equal(first["self_attn.q_proj"], first["self_attn.v_proj"])
    assert torch.equal(first["mlp.gate_proj"], first["mlp.up_proj"])
    assert not torch.equal(first["self_attn.q_proj"], first["self_attn.o_proj"])
    assert not torch.equal(first["self_attn.q_proj"], first["mlp.gate_proj"])


def test_scores_do_not_depend_on_the_micro_batches(tuned, inputs):
    rows = encode_answers(tuned, inputs.harmful)
    found = []
    for tokens in (1, 100_000):
        object.__setattr__(tuned, "micro_batch_tokens", tokens)
        found.append(antidote.factor_scores(tuned, AntidoteSpec(), rows, Silent()))
    assert all(torch.allclose(found[0][name], found[1][name], rtol=1e-5, atol=1e-8) for name in tuned.vector.names)


def test_a_mask_of_nothing_is_the_same_bytes_and_a_mask_of_all_is_the_aligned_model(tuned, inputs):
    ids = torch.arange(12)[None]
    with torch.no_grad(), tuned.model.disable_adapter():
        aligned = tuned.model(input_ids=ids).logits
    for compat in (False, True):
        path = antidote.prepare(tuned, AntidoteSpec(granularity="row", compat=compat), inputs, Silent())
        assert torch.equal(path.at(0.0).factors, path.raw)
        assert torch.equal(path.at(1.0).factors, torch.zeros_like(path.raw))
        with tuned.vector.swapped(path.at(1.0).factors), torch.no_grad():
            assert torch.equal(tuned.model(input_ids=ids).logits, aligned)


def test_rows_of_rank_entries_are_pruned_by_the_published_count_or_rounded_down(tuned, inputs):
    """The dial's quantisation: a row of B has 4 entries here, of which the published count takes 1 at any ratio."""
    pair = next(pair for pair in tuned.vector.pairs() if pair.module_name.endswith("q_proj"))
    for compat, of_A, of_B in ((True, 2, 1), (False, 1, 0)):
        path = antidote.prepare(tuned, AntidoteSpec(granularity="row", compat=compat), inputs, Silent())
        zero = {name: part == 0 for name, part in tuned.vector.split(path.at(0.05).factors).items()}
        assert set(zero[pair.a_name].sum(dim=1).tolist()) == {of_A}  # of 32
        assert set(zero[pair.b_name].sum(dim=1).tolist()) == {of_B}
        assert path.facts_at(0.05)["counts"][pair.a_name] == of_A


def test_what_the_task_excites_most_is_spared(tuned, inputs):
    plain = antidote.prepare(tuned, AntidoteSpec(), inputs, Silent())
    sparing = antidote.prepare(tuned, AntidoteSpec(spare=("task",), spare_ratio=0.3), inputs, Silent())
    zero, spared_zero = plain.at(0.3).factors == 0, sparing.at(0.3).factors == 0
    assert bool((spared_zero <= zero).all())
    assert 0 < int(spared_zero.sum()) < int(zero.sum())


@pytest.mark.parametrize("granularity", ["row", "tensor", "global"])
def test_several_roles_are_spared_together(tuned, inputs, granularity):
    """The mask is the harmful one less the union of what each role's own scores would prune."""
    spec = AntidoteSpec(granularity=granularity, spare=("task", "retention"), spare_ratio=0.3)
    rows = {
        "harmful": encode_answers(tuned, inputs.harmful),
        "task": encode_task(tuned, inputs.task),
        "retention": encode_answers(tuned, inputs.retention),
    }
    top = {
        role: prune_order(antidote.factor_scores(tuned, spec, given, Silent()), granularity).masks(0.3)
        for role, given in rows.items()
    }
    wanted = {n: top["harmful"][n] & ~top["task"][n] & ~top["retention"][n] for n in tuned.vector.names}
    path = antidote.prepare(tuned, spec, inputs, Silent())
    for name, part in tuned.vector.split(path.at(0.3).factors).items():
        assert torch.equal(part == 0, wanted[name])
    assert 0 < path.facts_at(0.3)["pruned"] == sum(int(mask.sum()) for mask in wanted.values())
    one = antidote.prepare(
        tuned, AntidoteSpec(granularity=granularity, spare=("task",), spare_ratio=0.3), inputs, Silent()
    )
    assert path.facts_at(0.3)["pruned"] < one.facts_at(0.3)["pruned"]


def test_what_is_spared_is_required(tuned, inputs):
    for role in ("task", "retention"):
        with pytest.raises(MissingInput, match=role):
            antidote.prepare(tuned, AntidoteSpec(spare=(role,)), replace(inputs, **{role: ()}), Silent())


def test_shuffled_labels_score_the_same_prompts_with_answers_of_other_groups(tuned, inputs):
    given = antidote.prepare(tuned, AntidoteSpec(), inputs, Silent())
    spec = AntidoteSpec(labels="shuffled")
    shuffled, again = (antidote.prepare(tuned, spec, inputs, Silent()) for _ in range(2))
    assert shuffled.facts == given.facts  # as many rows and tokens
    assert shuffled.facts_at(0.2)["mask_sha256"] == again.facts_at(0.2)["mask_sha256"]
    assert shuffled.facts_at(0.2)["mask_sha256"] != given.facts_at(0.2)["mask_sha256"]


def test_a_factor_that_no_forward_reaches_fails_loudly(tuned, inputs, monkeypatch):
    layer = tuned.model.get_submodule(tuned.vector.pairs()[0].module_name)
    original = layer.forward
    monkeypatch.setattr(layer, "forward", lambda x, *args, **kwargs: layer.base_layer(x))
    with pytest.raises(NumericError, match="was reached 0 times"):
        antidote.prepare(tuned, AntidoteSpec(), inputs, Silent())
    layer.forward = original
