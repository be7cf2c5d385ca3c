"""Antidote on factors: oracle O3, and the method's own scores against a plain computation."""

import pytest
import torch

from workers.ml.errors import NumericError
from workers.ml.recovery.calibration import encode_answers
from workers.ml.recovery.methods import antidote
from workers.ml.recovery.scores import ChannelNorms, prune_order, wanda_scores
from workers.ml.recovery.specs import AntidoteSpec
from workers.ml.types import Silent

A = torch.tensor([[1.0, -2, 0.5], [0.2, 1, 3]])
B = torch.tensor([[1.0, 0.5], [-2, 1]])


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
    scores = antidote._scores(tuned, AntidoteSpec(), rows, Silent())
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
    everything = antidote._scores(tuned, AntidoteSpec(), rows, Silent())
    answers = antidote._scores(tuned, AntidoteSpec(tokens="answer"), rows, Silent())
    assert all(bool((answers[name] <= everything[name] * (1 + 1e-5)).all()) for name in everything)
    assert any(not torch.equal(answers[name], everything[name]) for name in everything)


def test_what_the_task_excites_most_is_spared(tuned, inputs):
    plain = antidote.prepare(tuned, AntidoteSpec(), inputs, Silent())
    sparing = antidote.prepare(tuned, AntidoteSpec(spare=("task",), spare_ratio=0.3), inputs, Silent())
    zero, spared_zero = plain.at(0.3).factors == 0, sparing.at(0.3).factors == 0
    assert bool((spared_zero <= zero).all())
    assert 0 < int(spared_zero.sum()) < int(zero.sum())


def test_a_factor_that_no_forward_reaches_fails_loudly(tuned, inputs, monkeypatch):
    layer = tuned.model.get_submodule(tuned.vector.pairs()[0].module_name)
    original = layer.forward
    monkeypatch.setattr(layer, "forward", lambda x, *args, **kwargs: layer.base_layer(x))
    with pytest.raises(NumericError, match="was reached 0 times"):
        antidote.prepare(tuned, AntidoteSpec(), inputs, Silent())
    layer.forward = original
