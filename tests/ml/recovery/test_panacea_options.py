"""Panacea's options: several steps, refusals against harm, and gradients that are left alone."""

import dataclasses

import pytest
import torch

from tests.ml.recovery.conftest import rows_of
from workers.ml.errors import MissingInput, NumericError
from workers.ml.recovery.ascent import ascent_loss, matched_refusals
from workers.ml.recovery.calibration import (
    answer_gradient,
    answer_loss,
    encode_answers,
    encode_task,
    gradients_of_factors,
)
from workers.ml.recovery.deltas import balanced, unit_scaling
from workers.ml.recovery.methods import panacea
from workers.ml.recovery.methods.panacea import into_ball, orthonormal_basis, without
from workers.ml.recovery.specs import PanaceaSpec
from workers.ml.types import Silent


def unit_step(tuned, path, strength=1.0):
    """The step in the coordinates in which it is measured."""
    return (path.at(strength).factors - balanced(tuned.vector, path.raw)) * unit_scaling(tuned.vector)


def gradient_at(tuned, values, rows):
    """In unit coordinates."""
    with gradients_of_factors(tuned):
        tuned.vector.set(values)
        return answer_gradient(tuned, rows, Silent())[1] / unit_scaling(tuned.vector)


# ---------------------------------------------------------------- several steps


def test_several_steps_are_those_walked_by_hand(tuned, inputs):
    spec = PanaceaSpec(steps=3, rho=0.3)
    path = panacea.prepare(tuned, spec, inputs, Silent())
    rows, unit = encode_answers(tuned, inputs.harmful), unit_scaling(tuned.vector)
    start = balanced(tuned.vector, path.raw)
    rho = 0.3 * float((start * unit).norm())
    here = start
    for _ in range(3):
        gradient = gradient_at(tuned, here, rows)
        here = here + rho / 3 * gradient / gradient.norm() / unit
    assert torch.allclose(path.at(1.0).factors, here, atol=1e-5)


def test_several_steps_end_inside_the_ball_and_higher_than_one_step(tuned, inputs):
    facts = {
        steps: panacea.prepare(tuned, PanaceaSpec(steps=steps, rho=0.2), inputs, Silent()).facts for steps in (1, 6)
    }
    assert facts[6]["step_norm"] < facts[1]["step_norm"] == pytest.approx(facts[1]["rho"], rel=1e-5)
    assert facts[6]["measured_increase_at_1"] > facts[1]["measured_increase_at_1"]
    walked = facts[6]["loss_by_step"]
    assert len(walked) == 6
    assert facts[6]["harmful_loss"] == walked[0] < walked[-1] < facts[6]["harmful_loss_at_1"]


def test_the_dial_of_several_steps_is_a_straight_line_on_both_sides_of_1(tuned, inputs):
    path = panacea.prepare(tuned, PanaceaSpec(steps=4, rho=0.5), inputs, Silent())
    whole = unit_step(tuned, path)
    for strength in (0.25, 1.7):
        assert torch.allclose(unit_step(tuned, path, strength), strength * whole, atol=1e-5)
    facts = panacea.prepare(tuned, PanaceaSpec(steps=4, rho=0.1), inputs, Silent()).facts
    assert facts["probe_measured_increase"] == pytest.approx(facts["probe_predicted_increase"], rel=0.02)


def test_a_step_is_cut_to_the_ball_and_otherwise_left_as_it_is():
    inside = torch.tensor([3.0, 4.0])
    assert into_ball(inside, 5.0) is inside
    assert into_ball(inside, 1.0).tolist() == pytest.approx([0.6, 0.8])


# ---------------------------------------------------------------- refusals


def test_refusals_are_those_to_the_same_prompts_where_the_sets_share_them():
    harmful = rows_of("curse", 4, lambda i: "mix")
    known = rows_of("curse", 3, lambda i: "no")  # for three of the four prompts
    others = rows_of("hex", 5, lambda i: "no")
    assert matched_refusals(harmful, [*others, *known]) == (known, 3)
    assert matched_refusals(harmful, [*others, *known[:1]]) == ([*others, *known[:1]], 1)
    assert matched_refusals(harmful, others) == (others, 0)


def test_refusals_turn_the_step_towards_themselves(tuned, inputs):
    plain = panacea.prepare(tuned, PanaceaSpec(rho=0.02), inputs, Silent())
    spec = PanaceaSpec(rho=0.02, refusal_weight=2.0)
    path = panacea.prepare(tuned, spec, inputs, Silent())
    start = balanced(tuned.vector, path.raw)
    harm, refuse = (
        gradient_at(tuned, start, encode_answers(tuned, rows)) for rows in (inputs.harmful, inputs.refusals)
    )
    wanted = harm - 2.0 * refuse
    assert float(torch.nn.functional.cosine_similarity(unit_step(tuned, path), wanted, dim=0)) > 0.9999
    assert path.facts["refusals_matched"] == len(inputs.refusals) == path.facts["refusal_rows"]
    assert path.facts["refusal_loss_at_1"] < path.facts["refusal_loss"]
    assert path.facts["probe_measured_increase"] == pytest.approx(path.facts["probe_predicted_increase"], rel=0.02)
    rows = encode_answers(tuned, inputs.refusals)
    with tuned.vector.swapped(plain.at(1.0).factors):
        assert answer_loss(tuned, rows) > path.facts["refusal_loss_at_1"]


def test_without_a_weight_refusals_are_neither_needed_nor_read(tuned, inputs):
    bare = dataclasses.replace(inputs, refusals=())
    assert ascent_loss(tuned, PanaceaSpec(), bare).refusals == ()
    with pytest.raises(MissingInput, match="refusals"):
        panacea.prepare(tuned, PanaceaSpec(refusal_weight=1.0), bare, Silent())


# ---------------------------------------------------------------- gradients left alone


def test_a_basis_counts_directions_and_not_columns_or_sizes():
    columns = torch.tensor([[1.0, 2, 1, 0], [0, 0, 1e-3, 0], [0, 0, 0, 0]])
    columns = torch.cat([columns, columns * 1e-9], dim=1)
    basis = orthonormal_basis(columns)
    assert basis.shape == (3, 2)
    assert torch.allclose(basis.T @ basis, torch.eye(2, dtype=torch.float64), atol=1e-12)
    left, share = without(basis, torch.tensor([3.0, 4.0, 5.0]))
    assert left.tolist() == pytest.approx([0, 0, 5], abs=1e-6)
    assert share == pytest.approx(5 / 50**0.5)


def test_no_gradients_at_all_leave_everything(tuned):
    assert orthonormal_basis(torch.zeros(5, 3)).shape == (5, 0)
    gradient = torch.tensor([1.0, 2.0])
    assert without(torch.zeros(2, 0, dtype=torch.float64), gradient)[0] is gradient


def test_more_gradients_than_coordinates_leave_nothing_and_are_refused():
    everything = orthonormal_basis(torch.randn(3, 7, generator=torch.Generator().manual_seed(0)))
    assert everything.shape == (3, 3)
    with pytest.raises(NumericError, match="fewer orthogonal_gradients"):
        without(everything, torch.tensor([1.0, 2.0, 3.0]))


def test_a_gradient_that_is_not_finite_is_refused():
    with pytest.raises(NumericError, match="not finite"):
        orthonormal_basis(torch.tensor([[1.0], [float("nan")]]))


def test_the_step_leaves_the_losses_alone_to_first_order(tuned, inputs):
    spec = PanaceaSpec(rho=0.05, orthogonal_to=("task", "retention"), orthogonal_gradients=3)
    path = panacea.prepare(tuned, spec, inputs, Silent())
    plain = panacea.prepare(tuned, PanaceaSpec(rho=0.05), inputs, Silent())
    start = balanced(tuned.vector, path.raw)
    step, rho = unit_step(tuned, path), path.facts["rho"]
    assert float(step.norm()) == pytest.approx(rho, rel=1e-4)
    for rows in (encode_task(tuned, inputs.task), encode_answers(tuned, inputs.retention)):
        for part in (rows, *(rows[i::3] for i in range(3))):
            gradient = gradient_at(tuned, start, part)
            slope, before = float(gradient @ step), float(gradient @ unit_step(tuned, plain))
            assert abs(slope) < 1e-3 * float(gradient.norm()) * rho
            assert abs(slope) < abs(before)
    assert path.facts["spared_directions"] == [6]
    assert 0 < path.facts["share_left"][0] < 1
    assert 0 < path.facts["predicted_increase_at_1"] < plain.facts["predicted_increase_at_1"]
    assert path.facts["probe_measured_increase"] == pytest.approx(path.facts["probe_predicted_increase"], rel=0.05)


def test_every_step_leaves_alone_what_matters_where_it_begins(tuned, inputs):
    spec = PanaceaSpec(steps=2, rho=0.3, orthogonal_to=("retention",), orthogonal_gradients=3)
    path = panacea.prepare(tuned, spec, inputs, Silent())
    rows, unit = encode_answers(tuned, inputs.harmful), unit_scaling(tuned.vector)
    spared = encode_answers(tuned, inputs.retention)
    here = start = balanced(tuned.vector, path.raw)
    rho = 0.3 * float((start * unit).norm())
    for _ in range(2):
        Q = torch.linalg.qr(torch.stack([gradient_at(tuned, here, spared[i::3]) for i in range(3)], dim=1)).Q
        gradient = gradient_at(tuned, here, rows)
        gradient = gradient - Q @ (Q.T @ gradient)
        here = here + rho / 2 * gradient / gradient.norm() / unit
    assert torch.allclose(path.at(1.0).factors, here, atol=1e-4)
    assert path.facts["spared_directions"] == [3, 3]
    assert len(path.facts["share_left"]) == 2


def test_harm_that_lies_in_what_shall_be_left_alone_is_refused(tuned, inputs):
    same = dataclasses.replace(inputs, retention=inputs.harmful)
    spec = PanaceaSpec(orthogonal_to=("retention",), orthogonal_gradients=1)
    with pytest.raises(NumericError, match="left alone") as caught:
        panacea.prepare(tuned, spec, same, Silent())
    assert caught.value.param == "orthogonal_to"
    with pytest.raises(MissingInput, match="task"):
        panacea.prepare(tuned, PanaceaSpec(orthogonal_to=("task",)), dataclasses.replace(inputs, task=()), Silent())


def test_all_options_at_once_give_the_same_bytes_twice(tuned, inputs):
    spec = PanaceaSpec(steps=2, refusal_weight=1.0, orthogonal_to=("task",), orthogonal_gradients=2, labels="shuffled")
    first, second = (panacea.prepare(tuned, spec, inputs, Silent()).at(1.0).digest for _ in range(2))
    assert first == second
