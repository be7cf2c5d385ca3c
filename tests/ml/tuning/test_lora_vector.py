"""The flat vector is the adapter: reading, writing and gradients agree with the parameters."""

import pytest
import torch

from workers.ml.checkpoints import LoadedBase, attach_adapter
from workers.ml.errors import InvalidSetting, UnsupportedAdapter
from workers.ml.settings import LoraSettings
from workers.ml.tuning.lora_vector import LoraVector

PROBE = torch.tensor([[256, 259, 71, 72, 257, 260, 88, 78, 257]])


@pytest.fixture
def vector(tiny_base: LoadedBase, tiny_lora: LoraSettings) -> LoraVector:
    return LoraVector(attach_adapter(tiny_base, tiny_lora, seed=0))


def test_names_are_sorted_and_cover_every_factor(vector: LoraVector) -> None:
    assert list(vector.names) == sorted(vector.names)
    assert len(vector.names) == 2 * 7 * 2  # factors x targets x layers
    assert vector.numel == sum(parameter.numel() for parameter in vector.parameters())
    pair = vector.pairs()[0]
    assert pair.module_name == "base_model.model.model.layers.0.mlp.down_proj"
    shapes = dict(zip(vector.names, vector.shapes, strict=True))
    assert (shapes[pair.a_name], shapes[pair.b_name], pair.scaling) == ((4, 64), (32, 4), 2.0)


def test_what_is_set_is_what_the_parameters_hold(vector: LoraVector) -> None:
    wanted = torch.arange(vector.numel, dtype=torch.float32)
    vector.set(wanted)
    assert torch.equal(torch.cat([p.reshape(-1) for p in vector.parameters()]), wanted)
    vector.add_(wanted, scale=-0.5)
    assert torch.equal(vector.get(), wanted / 2)


def test_a_read_vector_is_a_copy(vector: LoraVector) -> None:
    before = vector.get()
    kept = before.clone()
    vector.add_(torch.ones(vector.numel))
    assert torch.equal(before, kept)


def test_split_and_join_are_inverse(vector: LoraVector) -> None:
    wanted = torch.randn(vector.numel)
    parts = vector.split(wanted)
    assert list(parts) == list(vector.names)
    assert torch.equal(vector.join(dict(reversed(parts.items()))), wanted)
    with pytest.raises(InvalidSetting, match="do not match"):
        vector.join({})
    name = vector.names[0]
    with pytest.raises(InvalidSetting, match="has the shape"):
        vector.join(parts | {name: parts[name].T})


def test_gradients_come_as_a_copy_with_zeros_where_none_was_computed(vector: LoraVector) -> None:
    assert torch.equal(vector.grad(), torch.zeros(vector.numel))
    first = vector.parameters()[0]
    (first * 3.0).sum().backward()
    grad = vector.grad()
    vector.zero_grad()
    assert torch.equal(grad[: first.numel()], torch.full((first.numel(),), 3.0))
    assert not grad[first.numel() :].any()
    assert not vector.grad().any()
    vector.set_grad(grad)
    assert torch.equal(first.grad.reshape(-1), grad[: first.numel()])


def test_gradients_replaced_by_somebody_else_are_found(vector: LoraVector) -> None:
    vector.zero_grad()
    first, second = vector.parameters()[:2]
    first.grad = torch.full_like(first, 2.0)
    second.grad = None
    grad = vector.split(vector.grad())
    assert (grad[vector.names[0]] == 2.0).all()
    assert not grad[vector.names[1]].any()


def test_a_swap_ends_with_the_exact_old_values_even_after_an_error(vector: LoraVector) -> None:
    before = vector.get()
    other = torch.randn(vector.numel)
    with pytest.raises(RuntimeError, match="inside"), vector.swapped(other):
        assert torch.equal(vector.get(), other)
        raise RuntimeError("inside")
    assert torch.equal(vector.get(), before)


def test_two_vectors_on_one_model_share_the_memory(tiny_base: LoadedBase, tiny_lora: LoraSettings) -> None:
    model = attach_adapter(tiny_base, tiny_lora, seed=0)
    one, two = LoraVector(model), LoraVector(model)
    one.add_(torch.ones(one.numel))
    assert torch.equal(one.get(), two.get())
    assert one.flat().data_ptr() == two.flat().data_ptr()


def test_storage_replaced_by_somebody_else_is_gathered_again(vector: LoraVector) -> None:
    for parameter in vector.parameters():
        parameter.data = torch.ones_like(parameter.data)
    assert torch.equal(vector.get(), torch.ones(vector.numel))
    vector.set(torch.zeros(vector.numel))
    assert not any(parameter.any() for parameter in vector.parameters())


def test_a_change_of_the_vector_changes_the_model(tiny_base: LoadedBase, tiny_lora: LoraSettings) -> None:
    model = attach_adapter(tiny_base, tiny_lora, seed=0)
    vector = LoraVector(model)
    before = model(PROBE).logits
    with vector.swapped(torch.full((vector.numel,), 0.1)):
        assert not torch.allclose(model(PROBE).logits, before)
    assert torch.equal(model(PROBE).logits, before)


def test_a_vector_of_the_wrong_length_is_refused(vector: LoraVector) -> None:
    with pytest.raises(InvalidSetting, match="Expected a vector"):
        vector.set(torch.zeros(3))


def test_factors_that_are_not_fp32_are_refused(tiny_base: LoadedBase, tiny_lora: LoraSettings) -> None:
    model = attach_adapter(tiny_base, tiny_lora, seed=0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    with pytest.raises(UnsupportedAdapter, match="fp32"):
        LoraVector(model)
