"""All LoRA factors of a model as one flat fp32 vector.

Knows: the names, shapes and scaling of the factors, and how to read, write and perturb them at once, so that a
norm, a proximal term or a snapshot is one operation instead of a loop over hundreds of tensors.
Refuses to know: optimizers, losses, data, and adapters whose map from factors to weights is not
`scaling * B @ A` (DoRA and friends).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from workers.ml.errors import InvalidSetting, UnsupportedAdapter


@dataclass(frozen=True, slots=True)
class LoraPair:
    """One adapted linear layer: its weight change is `scaling * B @ A`.

    `module_name` is its name in `peft_model.named_modules()`; `a_name`, `b_name` are names in the vector.
    """

    module_name: str
    a_name: str
    b_name: str
    scaling: float


class LoraVector:
    """A view of the active adapter's factors in the order of their sorted names.

    The parameters are made views of one contiguous buffer (and their gradients of a second one), so that reading
    and writing move no data between tensors. A second LoraVector on the same model shares the buffer.
    """

    def __init__(self, model: PeftModel) -> None:
        self._pairs = _find_pairs(model)
        known = dict(model.named_parameters())
        self.names: tuple[str, ...] = tuple(sorted(n for pair in self._pairs for n in (pair.a_name, pair.b_name)))
        self._parameters = [known[name] for name in self.names]
        self.shapes: tuple[tuple[int, ...], ...] = tuple(tuple(p.shape) for p in self._parameters)
        self._sizes = [p.numel() for p in self._parameters]
        self.numel = sum(self._sizes)
        _assert_uniform(self.names, self._parameters)
        self._gradients: Tensor | None = None
        self._flat()

    @property
    def device(self) -> torch.device:
        return self._parameters[0].device

    def pairs(self) -> list[LoraPair]:
        return list(self._pairs)

    def parameters(self) -> list[torch.nn.Parameter]:
        """The factors themselves, in the order of `names`."""
        return list(self._parameters)

    def get(self) -> Tensor:
        return self._flat().clone()

    def set(self, vector: Tensor) -> None:
        self._flat().copy_(self._checked(vector))

    def add_(self, vector: Tensor, scale: float = 1.0) -> None:
        self._flat().add_(self._checked(vector), alpha=scale)

    def flat(self) -> Tensor:
        """The live buffer: writing to it changes the model. For optimizers; others take `get()`."""
        return self._flat()

    def grad(self) -> Tensor:
        """A copy of the gradients, 0 where none was computed. A copy, because zeroing in place would empty it."""
        return self.flat_grad().clone()

    def set_grad(self, vector: Tensor) -> None:
        self.flat_grad().copy_(self._checked(vector))

    def zero_grad(self) -> None:
        self.flat_grad().zero_()

    def flat_grad(self) -> Tensor:
        """The live gradient buffer, into which every backward adds."""
        if self._gradients is None or self._gradients.device != self.device:
            self._gradients = torch.zeros(self.numel, device=self.device)
        pieces = self._gradients.split(self._sizes)
        for parameter, piece, shape in zip(self._parameters, pieces, self.shapes, strict=True):
            if parameter.grad is None:
                piece.zero_()
            elif parameter.grad.data_ptr() != piece.data_ptr():
                piece.copy_(parameter.grad.reshape(-1))
            else:
                continue
            parameter.grad = piece.view(shape)
        return self._gradients

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """The vector's parts by name; they are views of it."""
        pieces = self._checked(vector).split(self._sizes)
        return {n: p.view(s) for n, p, s in zip(self.names, pieces, self.shapes, strict=True)}

    def join(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `split`."""
        if set(parts) != set(self.names):
            raise InvalidSetting(f"The parts do not match the adapter's factors: {set(parts) ^ set(self.names)}.")
        for name, shape in zip(self.names, self.shapes, strict=True):
            if tuple(parts[name].shape) != shape:
                raise InvalidSetting(f"{name} has the shape {tuple(parts[name].shape)}, not {shape}.")
        return torch.cat([parts[name].detach().to(self.device, torch.float32).reshape(-1) for name in self.names])

    @contextmanager
    def swapped(self, vector: Tensor) -> Iterator[None]:
        """Run the model at another point; the exact old values come back, whatever happens inside."""
        kept = self.get()
        self.set(vector)
        try:
            yield
        finally:
            self.set(kept)

    def _checked(self, vector: Tensor) -> Tensor:
        if vector.shape != (self.numel,):
            raise InvalidSetting(f"Expected a vector of {self.numel} numbers, got the shape {tuple(vector.shape)}.")
        return vector.detach()

    def _flat(self) -> Tensor:
        """The buffer behind the parameters; made (again) when something has replaced their storage."""
        first = self._parameters[0].data
        begin, at = first.data_ptr(), 0
        for parameter, size in zip(self._parameters, self._sizes, strict=True):
            if parameter.data_ptr() != begin + 4 * at or not parameter.is_contiguous():
                break
            at += size
        storage = first.untyped_storage()
        if at == self.numel and storage.nbytes() >= 4 * (first.storage_offset() + self.numel):
            return first.as_strided((self.numel,), (1,))
        return self._flatten()

    def _flatten(self) -> Tensor:
        buffer = torch.cat([p.detach().reshape(-1) for p in self._parameters])
        for parameter, piece, shape in zip(self._parameters, buffer.split(self._sizes), self.shapes, strict=True):
            parameter.data = piece.view(shape)
        return buffer


def _find_pairs(model: PeftModel) -> tuple[LoraPair, ...]:
    adapter = model.active_adapter
    config = model.peft_config[adapter]
    if getattr(config, "use_dora", False) or getattr(config, "modules_to_save", None):
        raise UnsupportedAdapter("Adapters with DoRA or with fully trained modules are not supported.", "lora")
    pairs = []
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or adapter not in module.scaling:
            continue
        if adapter not in module.lora_A or module.lora_variant.get(adapter) or module.lora_bias.get(adapter):
            raise UnsupportedAdapter(f"{name} carries a form of LoRA that is not scaling * B @ A.", "lora")
        a_name, b_name = (f"{name}.{factor}.{adapter}.weight" for factor in ("lora_A", "lora_B"))
        pairs.append(LoraPair(name, a_name, b_name, float(module.scaling[adapter])))
    if not pairs:
        raise UnsupportedAdapter("The model carries no LoRA factors.", "lora")
    return tuple(sorted(pairs, key=lambda pair: pair.module_name))


def _assert_uniform(names: tuple[str, ...], parameters: list[torch.nn.Parameter]) -> None:
    # Updates of a fine-tune are far below the resolution of bf16 at the factors' size: 0.02 + 2e-5 is 0.02 there.
    for name, parameter in zip(names, parameters, strict=True):
        if parameter.dtype != torch.float32:
            raise UnsupportedAdapter(f"{name} is {parameter.dtype}; factors are edited and trained in fp32.", "lora")
        if parameter.device != parameters[0].device:
            raise UnsupportedAdapter("The adapter's factors lie on several devices.", "lora")
