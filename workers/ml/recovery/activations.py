"""What data puts through the adapter: an ordinary forward pass with a listener at the input of each LoRA factor.

Knows: hooks on the linear layers of A and B, which tokens count, micro-batches; and that every listener was reached once
in every forward, so that a layer nobody reaches is an error and not a silent nothing.
Refuses to know: what a listener makes of what it hears, and where the rows come from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from workers.ml.chat import EncodedRow
from workers.ml.data import Batch, collate, micro_batches
from workers.ml.errors import NumericError
from workers.ml.recovery.calibration import evaluation_mode
from workers.ml.recovery.scores import ChannelNorms, Norm, squared_norms
from workers.ml.tuned_model import TunedModel
from workers.ml.types import Progress

Tokens = Literal["all", "answer"]

# Without a backward pass nothing is gained by a piece whose activations leave the processor's cache.
CPU_TOKENS = 512


class Listener(Protocol):
    """Hears the input of one factor: `activations` (rows, tokens, channels), `counted` (rows, tokens), 0 on padding."""

    def add(self, activations: Tensor, counted: Tensor) -> None: ...


def forward_pieces(tuned: TunedModel, rows: Sequence[EncodedRow]) -> list[Batch]:
    """Micro-batches on the model's device, of the size that suits a forward without a backward."""
    limit = tuned.micro_batch_tokens
    if tuned.vector.device.type == "cpu":
        limit = min(limit, CPU_TOKENS)
    return [collate(piece, tuned.pad_id).to(tuned.vector.device) for piece in micro_batches(rows, max_tokens=limit)]


def listen(
    tuned: TunedModel,
    rows: Sequence[EncodedRow],
    listeners: Mapping[str, Listener],
    *,
    tokens: Tokens = "all",
    progress: Progress,
) -> None:
    """One forward over all rows; `listeners` are named as the factors of the vector whose inputs they hear.

    Raises NumericError where a name is no linear layer's weight, or is not reached exactly once in every forward.
    """
    pieces = forward_pieces(tuned, rows)
    counted: list[Tensor] = []  # the present piece's mask, read by the hooks
    reached: Counter[str] = Counter()
    with evaluation_mode(tuned), torch.no_grad(), _hooks(tuned, listeners, counted, reached):
        for index, piece in enumerate(pieces, start=1):
            counted[:] = [piece.attention_mask if tokens == "all" else (piece.loss_weights > 0).long()]
            tuned.model(
                input_ids=piece.input_ids, attention_mask=piece.attention_mask, use_cache=False, logits_to_keep=1
            )  # the logits are not looked at
            progress.step(index, len(pieces), part="activations")
    for name in listeners:
        if reached[name] != len(pieces):
            raise NumericError(f"{name} was reached {reached[name]} times in {len(pieces)} forward passes.", name)


def channel_norms(
    tuned: TunedModel,
    rows: Sequence[EncodedRow],
    names: Sequence[str],
    *,
    norm: Norm,
    tokens: Tokens,
    progress: Progress,
) -> dict[str, Tensor]:
    """Norm of every input channel of the named factors, (channels,) each, from one forward over the rows."""
    shared = _SharedSquares()
    norms = {name: ChannelNorms(norm, shared) for name in names}
    listen(tuned, rows, norms, tokens=tokens, progress=progress)
    return {name: one.value() for name, one in norms.items()}


class _SharedSquares:
    """Squared norms of the last input: q, k and v (and gate and up) are given one tensor, which is summed once."""

    def __init__(self) -> None:
        self._input: Tensor | None = None
        self._counted: Tensor | None = None
        self._value: Tensor | None = None

    def __call__(self, activations: Tensor, counted: Tensor) -> Tensor:
        if self._value is None or activations is not self._input or counted is not self._counted:
            self._value = squared_norms(activations, counted)
            self._input, self._counted = activations, counted
        return self._value


@contextmanager
def _hooks(
    tuned: TunedModel, listeners: Mapping[str, Listener], counted: list[Tensor], reached: Counter[str]
) -> Iterator[None]:
    handles = []
    try:
        for name, listener in listeners.items():
            module = tuned.model.get_submodule(name.removesuffix(".weight"))
            if not isinstance(module, nn.Linear):
                raise NumericError(f"{name} belongs to a {type(module).__name__}, not to a linear layer.", name)
            handles.append(module.register_forward_pre_hook(_hook(name, listener, counted, reached)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(name: str, listener: Listener, counted: list[Tensor], reached: Counter[str]) -> Any:
    def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        listener.add(inputs[0], counted[0])
        reached[name] += 1

    return hook
