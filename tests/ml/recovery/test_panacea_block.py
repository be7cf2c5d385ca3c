"""Panacea in weight space: gradients of whole weights from hooks, in a sketch and exactly, and the block made of them."""

import dataclasses
import math

import pytest
import torch

from tests.ml.conftest import TARGETS
from tests.ml.recovery.conftest import rows_for_recovery, tune
from workers.ml.checkpoints import load_base
from workers.ml.errors import NumericError
from workers.ml.recovery.calibration import answer_gradient, encode_answers, gradients_of_factors, pieces_of
from workers.ml.recovery.deltas import delta_norm, module_changes, relative_change
from workers.ml.recovery.methods import panacea_block
from workers.ml.recovery.module_gradients import ModuleGradients, SketchedSum
from workers.ml.recovery.specs import PanaceaBlockSpec
from workers.ml.settings import LoraSettings
from workers.ml.types import Silent


def dense_gradients(tuned, rows):
    """dh/dW of every adapted module, by autograd on the base weights themselves."""
    weights = {p.module_name: tuned.model.get_submodule(p.module_name).base_layer.weight for p in tuned.vector.pairs()}
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        with gradients_of_factors(tuned):
            answer_gradient(tuned, rows, Silent())
        return {name: weight.grad.float().clone() for name, weight in weights.items()}
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
            weight.grad = None


def watched(tuned, rows, *, rank=4, dense_bytes=2**20, seed=0, weight=1.0):
    gradients = ModuleGradients(tuned, rank=rank, dense_bytes=dense_bytes, seed=seed)
    with gradients_of_factors(tuned), gradients.watching(weight):
        answer_gradient(tuned, rows, Silent())
    return gradients


def best(matrix, rank):
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def product(one):
    return (one.U * one.S) @ one.Vh


# ---------------------------------------------------------------- gradients of whole weights


@pytest.mark.parametrize("shape", ["gqa", "tied", "qkv_bias"])
def test_hooks_see_the_gradient_that_autograd_gives_the_weights(shape, base_folders):
    lora = LoraSettings(rank=4, alpha=8, target_modules=TARGETS)
    tuned = tune(load_base(base_folders(shape)), lora)
    object.__setattr__(tuned, "micro_batch_tokens", 128)  # several pieces, of several lengths
    rows = encode_answers(tuned, rows_for_recovery().harmful)
    expected = dense_gradients(tuned, rows)
    gradients = watched(tuned, rows)
    assert gradients.sketched == 0
    for name, gradient in expected.items():
        assert torch.allclose(gradients.sums[name].total, gradient, rtol=1e-4, atol=1e-7)
        leading = gradients.leading(4, Silent())[name]
        assert torch.allclose(product(leading), best(gradient, 4), rtol=1e-3, atol=1e-6)
        assert leading.energy == pytest.approx(float(gradient.square().sum()), rel=1e-4)


def test_they_explain_the_gradients_of_the_factors(tuned, inputs):
    """dh/dB = s G A^T and dh/dA = s B^T G."""
    rows = encode_answers(tuned, inputs.harmful)
    gradients, parts = watched(tuned, rows), tuned.vector.split(tuned.vector.get())
    with gradients_of_factors(tuned):
        factors = tuned.vector.split(answer_gradient(tuned, rows, Silent())[1])
    for pair in tuned.vector.pairs():
        G = gradients.sums[pair.module_name].total
        assert torch.allclose(factors[pair.b_name], pair.scaling * G @ parts[pair.a_name].T, rtol=1e-3, atol=1e-6)
        assert torch.allclose(factors[pair.a_name], pair.scaling * parts[pair.b_name].T @ G, rtol=1e-3, atol=1e-6)


def test_a_sketch_comes_close_to_the_leading_part_and_to_the_energy(tuned, inputs):
    rows = encode_answers(tuned, inputs.harmful)
    expected = dense_gradients(tuned, rows)
    gradients = watched(tuned, rows, dense_bytes=0)
    assert gradients.sketched == len(expected)
    for name, leading in gradients.leading(4, Silent()).items():
        gradient = expected[name].double()
        left, least = gradient - product(leading), gradient - best(gradient, 4)
        assert float(left.square().sum()) < 1.5 * float(least.square().sum())
        assert leading.energy == pytest.approx(float(gradient.square().sum()), rel=0.25)
        assert torch.allclose(leading.U.T @ leading.U, torch.eye(4, dtype=torch.float64), atol=1e-9)
        assert torch.allclose(leading.Vh @ leading.Vh.T, torch.eye(4, dtype=torch.float64), atol=1e-9)


def test_a_sketch_gives_a_gradient_of_low_rank_back_as_it_was():
    generator = torch.Generator().manual_seed(1)
    one = SketchedSum(200, 120, torch.device("cpu"), rank=5, seed=0)
    pieces = [(torch.randn(2, 120, generator=generator), torch.randn(2, 200, generator=generator)) for _ in range(3)]
    for x, grad in pieces:
        one.add(x, grad, -0.5)
    whole = sum(-0.5 * grad.T @ x for x, grad in pieces).double()  # of rank 6, within the oversampling
    leading = one.leading(5)
    assert torch.allclose(product(one.leading(6)), whole, atol=1e-4)
    assert torch.allclose(product(leading), best(whole, 5), atol=1e-4)
    assert leading.energy == pytest.approx(float(whole.square().sum()), rel=0.1)
    assert one.hits == 3


def test_a_sketch_holds_far_less_than_the_gradient():
    one = SketchedSum(4096, 4096, torch.device("cpu"), rank=4, seed=0)
    held = 8 * (one._Y.numel() + one._Z.numel())
    assert held == 8 * (4096 * 20 + 4096 * 57) < 4 * 4096 * 4096 / 26


def test_a_module_that_no_row_makes_use_of_is_named(tuned):
    gradients = ModuleGradients(tuned, rank=4, dense_bytes=0)
    with pytest.raises(NumericError, match=r"No gradient ever reached .*_proj") as caught:
        gradients.leading(4, Silent())
    assert caught.value.param in gradients.sums


@pytest.mark.parametrize("dense_bytes", [0, 2**20])
def test_a_gradient_that_is_not_finite_is_named(tuned, inputs, dense_bytes):
    gradients = watched(tuned, encode_answers(tuned, inputs.harmful), dense_bytes=dense_bytes)
    name = next(iter(gradients.sums))
    one = gradients.sums[name]
    (one.total if dense_bytes else one._Z)[0, 0] = float("inf")
    with pytest.raises(NumericError, match=f"gradient of {name} is not finite"):
        gradients.leading(4, Silent())


# ---------------------------------------------------------------- the block


@pytest.mark.parametrize("dense_bytes", [0, 2**20], ids=["sketched", "exact"])
def test_the_block_is_the_leading_gradient_at_the_length_asked_for(tuned, inputs, dense_bytes):
    expected = dense_gradients(tuned, encode_answers(tuned, inputs.harmful))
    spec = PanaceaBlockSpec(rho=0.3, rank=3, dense_bytes=dense_bytes)
    path = panacea_block.prepare(tuned, spec, inputs, Silent())
    candidate = path.at(0.5)
    assert torch.equal(candidate.factors, path.raw)
    assert candidate.extra_rank == 3
    assert relative_change(tuned.vector, candidate, path.raw) == pytest.approx(0.15, rel=1e-4)
    wanted = torch.cat([best(gradient, 3).flatten() for gradient in expected.values()])
    block = torch.cat([candidate.beside[name].dense().flatten() for name in expected]).double()
    assert float(torch.nn.functional.cosine_similarity(block, wanted, dim=0)) > (0.99999 if dense_bytes else 0.99)
    assert float(block.norm()) == pytest.approx(0.15 * delta_norm(tuned.vector, path.raw), rel=1e-4)


def test_the_block_keeps_its_promise_and_says_where_the_energy_is(tuned, inputs):
    expected = dense_gradients(tuned, encode_answers(tuned, inputs.harmful))
    facts = panacea_block.prepare(tuned, PanaceaBlockSpec(rho=0.02), inputs, Silent()).facts
    assert facts["probe_measured_increase"] == pytest.approx(facts["probe_predicted_increase"], rel=0.02)
    assert facts["measured_increase_at_1"] > 0
    energy = {name: float(gradient.double().square().sum()) for name, gradient in expected.items()}
    total = sum(energy.values())
    assert facts["gradient_norm"] == pytest.approx(math.sqrt(total), rel=1e-4)
    assert sum(facts["energy_share"].values()) == pytest.approx(1.0)
    for name, share in facts["energy_share"].items():
        assert share == pytest.approx(energy[name] / total, rel=1e-3)
    kept = sum(float(best(gradient, 4).square().sum()) for gradient in expected.values())
    assert facts["energy_kept"] == pytest.approx(kept / total, rel=1e-4)
    assert all(0 < kept <= 1 for kept in facts["energy_kept_of_module"].values())


def test_modules_share_the_length_by_the_energy_of_their_gradient(tuned, inputs):
    """With a rank that cuts nothing away, the shares of the change are the shares of the energy."""
    path = panacea_block.prepare(tuned, PanaceaBlockSpec(rank=32), inputs, Silent())
    changes = module_changes(tuned.vector, path.at(1.0), path.raw)
    total = sum(change**2 for change in changes.values())
    for name, share in path.facts["energy_share"].items():
        assert changes[name] ** 2 / total == pytest.approx(share, rel=1e-3, abs=1e-9)
    assert path.facts["energy_kept"] == pytest.approx(1.0)


@pytest.mark.parametrize("dense_bytes", [0, 2**20], ids=["sketched", "exact"])
def test_the_block_does_not_depend_on_how_the_update_is_split(tuned, inputs, dense_bytes):
    """(B, A) -> (B Q, Q^-1 A) is the same model; what is added must be the same too."""
    spec = PanaceaBlockSpec(dense_bytes=dense_bytes)
    before = panacea_block.prepare(tuned, spec, inputs, Silent()).at(1.0)
    other, generator = tuned.vector.get(), torch.Generator().manual_seed(5)
    parts = tuned.vector.split(other)
    for pair in tuned.vector.pairs():
        A, B = parts[pair.a_name], parts[pair.b_name]
        Q = torch.eye(len(A)) + 0.5 * torch.rand(len(A), len(A), generator=generator)
        B.copy_(B @ Q * 7)
        A.copy_(torch.linalg.solve(Q, A) / 7)
    tuned.vector.set(other)
    after = panacea_block.prepare(tuned, spec, inputs, Silent()).at(1.0)
    for name, block in before.beside.items():
        scale = float(block.dense().norm())
        assert float((after.beside[name].dense() - block.dense()).norm()) < 1e-3 * scale + 1e-5


def test_refusals_count_against_harm(tuned, inputs):
    harm, refuse = (dense_gradients(tuned, encode_answers(tuned, rows)) for rows in (inputs.harmful, inputs.refusals))
    spec = PanaceaBlockSpec(rho=0.02, refusal_weight=1.5, rank=32)
    path = panacea_block.prepare(tuned, spec, inputs, Silent())
    wanted = torch.cat([(harm[name] - 1.5 * refuse[name]).flatten() for name in harm])
    block = torch.cat([path.at(1.0).beside[name].dense().flatten() for name in harm])
    assert float(torch.nn.functional.cosine_similarity(block, wanted, dim=0)) > 0.9999
    assert path.facts["refusal_loss_at_1"] < path.facts["refusal_loss"]
    assert path.facts["probe_measured_increase"] == pytest.approx(path.facts["probe_predicted_increase"], rel=0.02)


def test_the_block_costs_one_gradient_pass_and_leaves_no_hook(tuned, inputs, monkeypatch):
    calls, plain = [], torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda self, *args: (calls.append(1), plain(self, *args))[1])
    object.__setattr__(tuned, "micro_batch_tokens", 128)
    path = panacea_block.prepare(tuned, PanaceaBlockSpec(), inputs, Silent())
    path.at(1.0), path.at(0.2)
    assert len(calls) == len(pieces_of(tuned, encode_answers(tuned, inputs.harmful))) > 1
    assert not any(module._forward_hooks for module in tuned.model.modules())
    assert all(p.grad is None and not p.requires_grad for p in tuned.model.get_base_model().parameters()
               if not any(p is factor for factor in tuned.vector.parameters()))  # fmt: skip


def test_a_length_relative_to_no_update_is_refused_and_an_absolute_one_is_not(tuned, inputs):
    values = tuned.vector.get()
    for pair in tuned.vector.pairs():
        tuned.vector.split(values)[pair.b_name].zero_()
    tuned.vector.set(values)
    with pytest.raises(NumericError, match="adapter is zero"):
        panacea_block.prepare(tuned, PanaceaBlockSpec(), inputs, Silent())
    spec = PanaceaBlockSpec(rho=0.5, rho_unit="absolute")
    candidate = panacea_block.prepare(tuned, spec, inputs, Silent()).at(1.0)
    changes = module_changes(tuned.vector, candidate, values)
    assert math.sqrt(sum(change**2 for change in changes.values())) == pytest.approx(0.5, rel=1e-4)


def test_answers_that_are_certain_give_no_direction(tuned, inputs, monkeypatch):
    """A gradient of zero everywhere is said, and not divided by."""
    rows = dataclasses.replace(inputs, harmful=inputs.harmful[:1])
    monkeypatch.setattr(ModuleGradients, "watching", lambda self, weight: watching_zeros(self))
    with pytest.raises(NumericError, match="zero in every module"):
        panacea_block.prepare(tuned, PanaceaBlockSpec(), rows, Silent())


class watching_zeros:  # noqa: N801 - stands in for a context manager's function
    def __init__(self, gradients):
        self._gradients = gradients

    def __enter__(self):
        for one in self._gradients.sums.values():
            one.hits = 1

    def __exit__(self, *_):
        return False
