"""Panacea after training: oracles O4, O5, O6, O11, O12."""

import math

import pytest
import torch

from workers.ml.errors import NumericError
from workers.ml.recovery.ascent import ascent_direction
from workers.ml.recovery.calibration import (
    answer_gradient,
    answer_loss,
    encode_answers,
    gradients_of_factors,
    pieces_of,
)
from workers.ml.recovery.deltas import balanced_factors
from workers.ml.recovery.methods import noise, panacea
from workers.ml.recovery.specs import NoiseSpec, PanaceaSpec
from workers.ml.types import Silent

A = torch.tensor([[1.0, -2, 0.5], [0.2, 1, 3]], dtype=torch.float64)
B = torch.tensor([[1.0, 0.5], [-2, 1]], dtype=torch.float64)
G = torch.tensor([[1.0, 0, 2], [0, -1, 1]], dtype=torch.float64)


def test_the_step_on_a_quadratic_matches_the_oracle():
    w = torch.tensor([3.0, 4.0])
    direction, slope = ascent_direction(w)  # h = |w|^2 / 2
    assert direction.tolist() == pytest.approx([0.6, 0.8])
    assert slope == pytest.approx(5.0)
    assert float(0.5 * (w + direction).square().sum()) == pytest.approx(18.0)
    assert 12.5 + slope == pytest.approx(17.5)  # the first-order prediction


def test_a_zero_gradient_is_an_error_and_not_a_nan():
    with pytest.raises(NumericError, match="no direction"):
        ascent_direction(torch.zeros(3))
    with pytest.raises(NumericError, match="no direction"):
        ascent_direction(torch.tensor([1.0, float("nan")]))


@pytest.mark.parametrize(
    ("a", "b", "after"), [(2, 3, 10.067090), (1, 6, 12.244925), (math.sqrt(6), math.sqrt(6), 9.964102)]
)
def test_the_same_function_in_another_gauge_moves_differently(a, b, after):
    direction, _ = ascent_direction(torch.tensor([b, a], dtype=torch.float64))  # h = a * b
    assert float((a + direction[0]) * (b + direction[1])) == pytest.approx(after, abs=1e-6)


def step_up(left: torch.Tensor, right: torch.Tensor) -> tuple[float, float]:
    """h = <G, B A> after a step of length 0.5, and the gradient's norm."""
    gradient = torch.cat([(G @ right.T).flatten(), (left.T @ G).flatten()])
    direction, slope = ascent_direction(gradient)
    up_left = left + 0.5 * direction[: left.numel()].view_as(left)
    up_right = right + 0.5 * direction[left.numel() :].view_as(right)
    return float((G * (up_left @ up_right)).sum()), slope


def test_gauges_match_the_oracle_and_balancing_removes_them():
    assert float((G * (B @ A)).sum()) == pytest.approx(2.1)
    assert step_up(B, A) == pytest.approx((6.189473, 7.933473), abs=1e-6)
    assert step_up(10 * B, A / 10) == pytest.approx((18.119457, 32.023849), abs=1e-5)
    assert step_up(*balanced_factors(B, A)) == pytest.approx((5.432822, 6.273022), abs=1e-6)
    assert step_up(*balanced_factors(10 * B, A / 10)) == pytest.approx((5.432822, 6.273022), abs=1e-6)


def test_the_result_does_not_depend_on_the_split_of_scale(tuned, inputs):
    def deltas(values):
        parts = tuned.vector.split(values)
        return torch.cat([(parts[p.b_name] @ parts[p.a_name]).flatten() for p in tuned.vector.pairs()])

    plain = deltas(panacea.prepare(tuned, PanaceaSpec(), inputs, Silent()).at(1.0).factors)
    other = tuned.vector.get()
    for pair in tuned.vector.pairs():
        tuned.vector.split(other)[pair.a_name].div_(10)
        tuned.vector.split(other)[pair.b_name].mul_(10)
    tuned.vector.set(other)
    assert torch.allclose(
        deltas(panacea.prepare(tuned, PanaceaSpec(), inputs, Silent()).at(1.0).factors), plain, atol=1e-5
    )


def test_first_order_prediction_and_measurement_agree_and_are_reported(tuned, inputs):
    spec = PanaceaSpec(rho=0.02)
    facts = panacea.prepare(tuned, spec, inputs, Silent()).facts
    assert facts["probe_measured_increase"] == pytest.approx(facts["probe_predicted_increase"], rel=0.02)
    assert facts["measured_increase_at_1"] > 0
    assert facts["rho"] == pytest.approx(0.02 * facts["factor_norm"])


def test_the_total_norm_over_all_tensors_is_rho(tuned, inputs):
    spec = PanaceaSpec(rho=0.5, rho_unit="absolute", regauge=False)
    path = panacea.prepare(tuned, spec, inputs, Silent())
    step = path.at(1.0).factors - path.raw
    assert float(step.norm()) == pytest.approx(0.5, rel=1e-4)
    assert float((path.at(2.0).factors - path.raw).norm()) == pytest.approx(1.0, rel=1e-4)
    with gradients_of_factors(tuned):
        _, gradient = answer_gradient(tuned, encode_answers(tuned, inputs.harmful), Silent())
    assert float(torch.nn.functional.cosine_similarity(step, gradient, dim=0)) == pytest.approx(1, abs=1e-5)


def test_the_gradient_does_not_depend_on_the_micro_batches(tuned, inputs):
    rows = encode_answers(tuned, inputs.harmful)
    found = []
    for tokens in (1, 100_000):
        object.__setattr__(tuned, "micro_batch_tokens", tokens)
        with gradients_of_factors(tuned):
            found.append(answer_gradient(tuned, rows, Silent()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-3, atol=1e-6)


def test_the_gradient_beats_noise_of_the_same_norm(tuned, inputs):
    rows = encode_answers(tuned, inputs.harmful[:4])
    up = panacea.prepare(tuned, PanaceaSpec(rho=0.05), inputs, Silent()).at(1.0).factors
    with tuned.vector.swapped(up):
        by_gradient = answer_loss(tuned, rows)
    beaten = 0
    for seed in range(20):
        with tuned.vector.swapped(
            noise.prepare(tuned, NoiseSpec(size=0.05, seed=seed), inputs, Silent()).at(1.0).factors
        ):
            beaten += by_gradient > answer_loss(tuned, rows)
    assert beaten >= 19


@pytest.fixture
def backwards(monkeypatch):
    """Counts calls of `backward`."""
    calls, plain = [], torch.Tensor.backward

    def counted(self, *args, **kwargs):
        calls.append(self)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", counted)
    return calls


@pytest.mark.parametrize("steps", [1, 3])
def test_every_step_costs_one_backward_a_micro_batch_and_the_dial_none(tuned, inputs, backwards, steps):
    object.__setattr__(tuned, "micro_batch_tokens", 128)
    pieces = len(pieces_of(tuned, encode_answers(tuned, inputs.harmful)))
    assert pieces > 1
    path = panacea.prepare(tuned, PanaceaSpec(steps=steps), inputs, Silent())
    for strength in (0.1, 0.5, 1.0, 2.0):
        path.at(strength)
    assert len(backwards) == steps * pieces


def softmax_lora(seed):
    """A linear classifier (4 classes, 6 inputs) with a LoRA of rank 2, and its loss at B and A flattened (20,)."""
    generator = torch.Generator().manual_seed(seed)
    W, x = (torch.randn(rows, 6, generator=generator, dtype=torch.float64) for rows in (4, 32))
    y = torch.randint(4, (32,), generator=generator)
    start = 0.5 * torch.randn(20, generator=generator, dtype=torch.float64)

    def loss(values):
        left, right = values[:8].view(4, 2), values[8:].view(2, 6)
        return torch.nn.functional.cross_entropy(x @ (W + left @ right).T, y)

    return start.requires_grad_(True), loss


def test_the_step_on_a_tiny_softmax_keeps_its_promise_and_beats_noise_of_its_length():
    gains = {"gradient": 0.0, "noise": 0.0}
    for model in range(5):
        start, loss = softmax_lora(model)
        (gradient,) = torch.autograd.grad(loss(start), [start])
        direction, slope = ascent_direction(gradient)
        with torch.no_grad():
            before = loss(start)
            for rho in (1e-3, 0.05):
                promised, found = rho * slope, float(loss(start + rho * direction) - before)
                assert found == pytest.approx(promised, rel=0.02 if rho < 0.01 else 0.25)
            up = float(loss(start + 0.1 * direction) - before)
            draws = torch.randn(200, 20, generator=torch.Generator().manual_seed(model), dtype=torch.float64)
            others = torch.stack([loss(start + 0.1 * draw / draw.norm()) - before for draw in draws])
        assert float((others < up).double().mean()) >= 0.95
        gains = {"gradient": gains["gradient"] + up, "noise": gains["noise"] + float(others.mean())}
    assert gains["gradient"] > 20 * gains["noise"]


def test_the_papers_noise_is_hundreds_of_times_as_long_as_its_perturbation():
    sizes = {rank: 32 * 3 * 2 * 4096 * rank for rank in (32, 256)}
    assert sizes == {32: 25_165_824, 256: 201_326_592}
    expected = {0.001: 5.02, 0.01: 50.17, 0.05: 250.8, 0.1: 501.7}
    for std, norm in expected.items():
        assert std * math.sqrt(sizes[32]) == pytest.approx(norm, rel=1e-3)
    draw = torch.randn(sizes[32], generator=torch.Generator().manual_seed(0))
    assert 0.001 * float(draw.double().norm()) == pytest.approx(5.0166, rel=1e-3)
    assert 1 / math.sqrt(sizes[32]) == pytest.approx(1.9934e-4, rel=1e-4)


def test_noise_has_the_expected_norm_and_the_same_seed_gives_the_same_bytes(tuned, inputs):
    spec = NoiseSpec(size=0.05, size_unit="std", regauge=False, seed=7)
    paths = [noise.prepare(tuned, spec, inputs, Silent()) for _ in range(2)]
    assert paths[0].at(1.0).digest == paths[1].at(1.0).digest
    length = float((paths[0].at(1.0).factors - paths[0].raw).norm())
    assert length == pytest.approx(0.05 * math.sqrt(tuned.vector.numel), rel=0.05)
    matched = noise.prepare(tuned, NoiseSpec(size=1.0, size_unit="norm", regauge=False), inputs, Silent())
    assert float((matched.at(1.0).factors - matched.raw).norm()) == pytest.approx(1.0, rel=1e-4)


def test_small_steps_survive_in_fp32_and_not_in_bf16():
    half = torch.tensor(0.02, dtype=torch.bfloat16)
    assert float(half) == pytest.approx(0.02001953, abs=1e-8)
    assert float(half + torch.tensor(2e-5, dtype=torch.bfloat16)) == float(half)
    moved = float(half + torch.tensor(2e-4, dtype=torch.bfloat16)) - float(half)
    assert moved == pytest.approx(2.44e-4, abs=1e-6)
    assert abs(float(torch.tensor(0.02) + 2e-5) - 0.02002) < 2e-9  # half an ulp of fp32 at 0.02 is 9e-10
