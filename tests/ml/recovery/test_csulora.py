"""CSULoRA: oracle O9, and what happens to layers that alignment did not touch."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from workers.ml.recovery.displacement import tensor_name
from workers.ml.recovery.methods import csulora
from workers.ml.recovery.methods.csulora import Blocks
from workers.ml.recovery.specs import CsuLoraSpec
from workers.ml.recovery.spectra import full_spectrum
from workers.ml.types import Silent

DELTA = torch.tensor([[2.0, 1], [1, 2]])
FIRST = full_spectrum(torch.diag(torch.tensor([1.0, 0]))).first(1)  # both projectors diag(1, 0)


def dense(found):
    return (found.U * found.S) @ found.V.T


def test_the_four_blocks_are_damped_as_in_the_oracle():
    blocks = Blocks.of(DELTA, torch.eye(2), FIRST)
    assert blocks.energies() == pytest.approx((4, 1, 1, 4))
    damped = blocks.damped(1.0, 0.05)
    assert dense(damped).tolist() == [
        pytest.approx([2, 0.818182], abs=1e-6),
        pytest.approx([0.818182, 1.058824], abs=1e-6),
    ]
    assert damped.S[:2].tolist() == pytest.approx([2.473273, 0.58555], abs=1e-6)
    assert dense(damped.first(1)).tolist() == [
        pytest.approx([1.853196, 1.071972], abs=1e-6),
        pytest.approx([1.071972, 0.620077], abs=1e-6),
    ]
    assert damped.lost(1) == pytest.approx(0.342869, abs=1e-6)


def test_scaling_the_update_scales_the_result():
    once = dense(Blocks.of(DELTA, torch.eye(2), FIRST).damped(1.0, 0.05))
    assert torch.allclose(dense(Blocks.of(7 * DELTA, torch.eye(2), FIRST).damped(1.0, 0.05)), 7 * once)


def test_projectors_that_hold_everything_change_nothing():
    whole = full_spectrum(torch.eye(2))
    assert torch.allclose(dense(Blocks.of(DELTA, torch.eye(2), whole).damped(1000.0, 0.05)), DELTA.double())


def test_a_reference_of_zero_takes_the_outside_away_and_is_no_nan():
    outside = torch.tensor([[0.0, 0], [0, 3]])
    assert torch.equal(dense(Blocks.of(outside, torch.eye(2), FIRST).damped(1.0, 0.0)), torch.zeros(2, 2).double())


def test_nothing_is_formed_that_a_plain_computation_would_contradict(tuned, inputs):
    path = csulora.prepare(tuned, CsuLoraSpec(energy=0.6), inputs, Silent())
    raw, moved = (tuned.vector.split(values) for values in (path.raw, path.at(2.0).factors))
    before = load_file(inputs.pretrained / "model.safetensors")
    for pair in tuned.vector.pairs():
        weight = tuned.model.get_submodule(pair.module_name).base_layer.weight
        U, S, Vh = torch.linalg.svd((weight - before[tensor_name(pair)]).double())
        k = int((S.square().cumsum(0) < 0.6 * S.square().sum()).sum()) + 1
        P_L, P_R = U[:, :k] @ U[:, :k].T, Vh[:k].T @ Vh[:k]
        delta = (raw[pair.b_name] @ raw[pair.a_name]).double()
        I_L, I_R = torch.eye(len(P_L)) - P_L, torch.eye(len(P_R)) - P_R
        kept, *rest = (L @ delta @ R for L, R in ((P_L, P_R), (P_L, I_R), (I_L, P_R), (I_L, I_R)))
        reference = kept.square().sum() + 0.05 * delta.square().sum()
        wanted = kept + sum(block / (1 + 2.0 * block.square().sum() / reference) for block in rest)
        U, S, Vh = torch.linalg.svd(wanted)
        r = len(raw[pair.a_name])
        best = (U[:, :r] * S[:r]) @ Vh[:r]
        assert torch.allclose((moved[pair.b_name] @ moved[pair.a_name]).double(), best, atol=1e-5)


def test_energy_is_accounted_for(tuned, inputs):
    path = csulora.prepare(tuned, CsuLoraSpec(energy=0.5), inputs, Silent())
    gentle, firm = path.facts_of(0.25), path.facts_of(16.0)
    assert 0 < firm["aligned_energy_share"] == gentle["aligned_energy_share"] < 1
    assert 1 > gentle["energy_left"] > firm["energy_left"] >= firm["aligned_energy_share"] * 0.99
    assert firm["energy_lost_to_rank"] > 0
    assert path.facts["layers_left_alone"] == 0


def test_a_layer_that_alignment_never_touched_is_left_alone(tuned, inputs, tiny_base_folder, tmp_path):
    pair = tuned.vector.pairs()[2]
    folder = shutil.copytree(inputs.pretrained, tmp_path / "pretrained")
    tensors = load_file(folder / "model.safetensors")
    tensors[tensor_name(pair)] = load_file(tiny_base_folder / "model.safetensors")[tensor_name(pair)]
    save_file(tensors, folder / "model.safetensors")
    path = csulora.prepare(tuned, CsuLoraSpec(), type(inputs)(pretrained=folder), Silent())
    raw, moved = (tuned.vector.split(values) for values in (path.raw, path.at(1.0).factors))
    for one in tuned.vector.pairs():
        same = torch.equal(raw[one.a_name], moved[one.a_name]) and torch.equal(raw[one.b_name], moved[one.b_name])
        assert same == (one == pair)
    assert path.facts["layers_left_alone"] == 1
