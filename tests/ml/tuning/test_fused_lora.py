"""The fused layer computes what PEFT computes, and steps aside wherever it would not."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from workers.ml.checkpoints import LoadedBase, attach_adapter
from workers.ml.settings import LoraSettings
from workers.ml.tuning.fused_lora import fused, fused_forwards
from workers.ml.tuning.lora_vector import LoraVector

PROBE = torch.tensor([[256, 259, 71, 72, 257, 260, 88, 78, 257], [256, 259, 1, 2, 257, 260, 3, 4, 257]])


class Block(torch.nn.Module):
    """Two linear layers, so that a gradient has to pass through one to reach the other."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.first = torch.nn.Linear(6, 10, bias=True, dtype=dtype)
        self.second = torch.nn.Linear(10, 4, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def adapted(dtype: torch.dtype = torch.float32, dropout: float = 0.0, **config: object) -> PeftModel:
    torch.manual_seed(0)
    settings = LoraConfig(r=3, lora_alpha=5, lora_dropout=dropout, target_modules=["first", "second"], **config)
    model = get_peft_model(Block(dtype), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return model


def run(model: PeftModel, x: torch.Tensor) -> list[torch.Tensor]:
    """Output, gradient of the input, gradients of the factors."""
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    out = model(x)
    (out.float() ** 2).sum().backward()
    return [out.detach(), x.grad, *(p.grad for n, p in sorted(model.named_parameters()) if "lora_" in n)]


def test_output_and_every_gradient_equal_those_of_peft() -> None:
    model, x = adapted(), torch.randn(2, 5, 6)
    expected = run(model, x)
    forwards = fused_forwards(model)
    assert len(forwards) == 2
    with fused(forwards):
        found = run(model, x)
    assert len(found) == 6
    for one, other in zip(found, expected, strict=True):
        assert torch.linalg.vector_norm(one - other) < 1e-6 * torch.linalg.vector_norm(other)


def test_the_gradient_equals_finite_differences() -> None:
    model = adapted().double()
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    vector = [p for n, p in sorted(model.named_parameters()) if "lora_" in n]
    x = torch.randn(3, 6, dtype=torch.float64)
    with fused(fused_forwards(model)):
        model(x).pow(2).sum().backward()
        for parameter in vector:
            step = torch.zeros_like(parameter)
            step.view(-1)[1] = 1e-6
            with torch.no_grad():
                parameter.add_(step)
                above = model(x).pow(2).sum()
                parameter.sub_(2 * step)
                below = model(x).pow(2).sum()
                parameter.add_(step)
            # The gradients of the factors are rounded to fp32.
            assert float(parameter.grad.view(-1)[1]) == pytest.approx(float(above - below) / 2e-6, rel=1e-4)


def test_over_a_bf16_base_the_factors_get_fp32_gradients_close_to_those_of_peft() -> None:
    model, x = adapted(torch.bfloat16), torch.randn(2, 5, 6, dtype=torch.bfloat16)
    expected = run(model, x)
    with fused(fused_forwards(model)):
        found = run(model, x)
    assert found[0].dtype == found[1].dtype == torch.bfloat16
    for one, other in zip(found[2:], expected[2:], strict=True):
        assert one.dtype == torch.float32
        assert torch.linalg.vector_norm(one - other) < 0.03 * torch.linalg.vector_norm(other)


def test_a_layer_with_dropout_or_dora_keeps_the_forward_of_peft() -> None:
    assert fused_forwards(adapted(dropout=0.1)) == []
    assert fused_forwards(adapted(use_dora=True)) == []


def test_a_switched_off_adapter_is_really_off(tiny_base: LoadedBase, tiny_lora: LoraSettings) -> None:
    expected = tiny_base.model(PROBE).logits
    model = attach_adapter(tiny_base, tiny_lora, seed=0)
    LoraVector(model).add_(torch.full((LoraVector(model).numel,), 0.1))
    with fused(fused_forwards(model)):
        changed = model(PROBE).logits
        with model.disable_adapter():
            assert torch.equal(model(PROBE).logits, expected)
    assert not torch.allclose(changed, expected)
    assert torch.allclose(model(PROBE).logits, changed, atol=1e-5)


def test_the_forward_of_peft_comes_back_even_after_an_error() -> None:
    model = adapted()
    forwards = fused_forwards(model)
    with pytest.raises(RuntimeError, match="inside"), fused(forwards):
        assert all("forward" in vars(module) for module, _ in forwards)
        raise RuntimeError("inside")
    assert not any("forward" in vars(module) for module, _ in forwards)
