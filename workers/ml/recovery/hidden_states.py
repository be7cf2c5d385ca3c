"""How a model looks at prompts from inside: the hidden state of each prompt's last token, part of the way up.

Knows: where the decoder layers are, how a forward stops after one of them, and the gradient of a view with respect to
the dense weights of adapted layers, which neither exist as parameters nor are asked for gradients.
Refuses to know: which prompts are meant, and what a view or its gradient is used for.

The state is the output of the layer itself, before any final norm. Nothing above that layer is computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from workers.ml.chat import EncodedRow, encode_prompt
from workers.ml.data import Batch
from workers.ml.errors import InvalidSetting, NumericError, RowTooLong, UnsupportedAdapter
from workers.ml.recovery.calibration import evaluation_mode, pieces_of
from workers.ml.tuned_model import TunedModel
from workers.ml.tuning.lora_vector import LoraPair
from workers.ml.types import Message


class _ReachedDepth(Exception):
    """Stops a forward pass once the wanted state is known; never leaves this room."""


def encode_prompts(tuned: TunedModel, prompts: Sequence[Sequence[Message]]) -> list[EncodedRow]:
    """Prompts up to the point where the model would begin its answer; no token carries a loss."""
    rows = []
    for messages in prompts:
        ids = encode_prompt(tuned.tokenizer, messages)
        if len(ids) > tuned.context_limit:
            raise RowTooLong(f"A prompt has {len(ids)} tokens; the limit is {tuned.context_limit}.", None, "messages")
        rows.append(EncodedRow(ids, [0.0] * len(ids)))
    return rows


class PromptView:
    """The model up to `depth` = floor(depth_ratio * layers) layers (at least 1), and the adapted layers in there."""

    def __init__(self, tuned: TunedModel, depth_ratio: float) -> None:
        pairs = tuned.vector.pairs()
        stack_name, stack = _decoder_layers(tuned, pairs)
        self._tuned = tuned
        self.layers = len(stack)
        self.depth = max(1, math.floor(depth_ratio * len(stack) + 1e-9))
        self._last = stack[self.depth - 1]
        inside = tuple(f"{stack_name}.{index}." for index in range(self.depth))
        self.pairs: tuple[LoraPair, ...] = tuple(p for p in pairs if p.module_name.startswith(inside))
        if not self.pairs:
            raise InvalidSetting(
                f"The adapter touches none of the first {self.depth} of {self.layers} layers; raise depth_ratio.",
                "depth_ratio",
            )

    def mean_state(self, rows: Sequence[EncodedRow]) -> Tensor:
        """(width,) fp32: mean over prompts of the state of the last token."""
        with evaluation_mode(self._tuned), torch.no_grad():
            sums = [self._states(piece).double().sum(dim=0) for piece in pieces_of(self._tuned, rows)]
        return (torch.stack(sums).sum(dim=0) / len(rows)).float()

    def add_gradient(self, rows: Sequence[EncodedRow], direction: Tensor, gradients: Mapping[str, Tensor]) -> float:
        """The cosine between the mean state of `rows` and `direction`; adds the gradient of its negative.

        `gradients` holds (d_out, d_in) fp32 by module name; each gets sum over tokens of dY^T x, the gradient of the
        dense weight. No parameter gets a gradient, whatever its `requires_grad`.
        """
        pieces = pieces_of(self._tuned, rows)
        # The loss is of the mean over all rows: rows that do not fit into one forward are met twice.
        mean = self.mean_state(rows) if len(pieces) > 1 else None
        reached: set[str] = set()
        for piece in pieces:
            with evaluation_mode(self._tuned), torch.enable_grad(), self._tapped(gradients, reached) as entry:
                states = self._states(piece)
                mean = states.detach().mean(dim=0) if mean is None else mean
                pull = _cosine_gradient(mean, direction) / len(rows)
                torch.autograd.grad(states, entry[0], -pull.expand_as(states))
        if missing := sorted(set(gradients) - reached):
            raise NumericError(f"No gradient reached {missing[0]}, though the adapter sits on it.", missing[0])
        assert mean is not None
        return cosine(mean, direction)

    def _states(self, batch: Batch) -> Tensor:
        """(rows, width) fp32: the state of each row's last token."""
        caught: list[Tensor] = []

        def stop(_layer: nn.Module, _inputs: Any, output: Any) -> None:
            caught.append(output[0] if isinstance(output, tuple) else output)
            raise _ReachedDepth

        handle = self._last.register_forward_hook(stop)
        try:
            with suppress(_ReachedDepth):
                self._tuned.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        finally:
            handle.remove()
        if not caught:
            raise NumericError(f"No forward pass went through layer {self.depth}.", "depth_ratio")
        last = batch.attention_mask.sum(dim=1) - 1
        states = caught[0][torch.arange(len(last), device=last.device), last].float()
        if not torch.isfinite(states).all():
            raise NumericError(f"The state after layer {self.depth} holds numbers that are not finite.")
        return states

    @contextmanager
    def _tapped(self, gradients: Mapping[str, Tensor], reached: set[str]) -> Iterator[list[Tensor]]:
        """Hooks that build a graph from the embeddings up (yielded once made) and collect gradients on the way back."""
        entry: list[Tensor] = []

        def enter(_embeddings: nn.Module, _inputs: Any, output: Tensor) -> None:
            entry.append(output.requires_grad_(True))

        handles = [self._tuned.model.get_input_embeddings().register_forward_hook(enter)]
        try:
            for name, gradient in gradients.items():
                module = self._tuned.model.get_submodule(name)
                handles.append(module.register_forward_hook(_tap(name, gradient, reached)))
            yield entry
        finally:
            for handle in handles:
                handle.remove()


def cosine(state: Tensor, direction: Tensor) -> float:
    """Of two vectors; raises NumericError where one is zero."""
    if not (state.any() and direction.any()):
        raise NumericError("A mean hidden state is zero: it has no direction.")
    return float(F.cosine_similarity(state.double(), direction.double(), dim=0))


def _cosine_gradient(state: Tensor, direction: Tensor) -> Tensor:
    """d cos(state, direction) / d state."""
    leaf = state.clone().requires_grad_(True)
    return torch.autograd.grad(F.cosine_similarity(leaf, direction, dim=0), leaf)[0]


def _tap(name: str, gradient: Tensor, reached: set[str]) -> Any:
    def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].detach()

        def add(slope: Tensor) -> None:
            gradient.addmm_(slope.reshape(-1, len(gradient)).float().T, x.reshape(-1, gradient.shape[1]).float())
            reached.add(name)

        output.register_hook(add)

    return hook


def _decoder_layers(tuned: TunedModel, pairs: Sequence[LoraPair]) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers: as long as the configuration says, with an adapted layer somewhere in it."""
    base = tuned.model.get_base_model()
    assert isinstance(base, PreTrainedModel)
    wanted = base.config.get_text_config().num_hidden_layers
    for name, module in tuned.model.named_modules():
        adapted = any(pair.module_name.startswith(f"{name}.") for pair in pairs)
        if adapted and isinstance(module, nn.ModuleList) and len(module) == wanted:
            return name, module
    raise UnsupportedAdapter(f"No list of {wanted} decoder layers with an adapted layer was found.", "base")
