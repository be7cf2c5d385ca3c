"""A base model with one adapter that is being looked at or moved.

Knows: model, tokenizer and the adapter's flat vector, held together; how to be the aligned base for a moment.
Refuses to know: who moves the adapter, and what is measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from workers.ml.candidate import SideTerms
from workers.ml.chat import EncodedRow, encode_row
from workers.ml.tuning.lora_vector import LoraVector
from workers.ml.tuning.objective import CPU_MICRO_BATCH_TOKENS
from workers.ml.types import ChatRow

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TunedModel:
    """A base model with one active, unmerged adapter. Methods move `vector`; nothing else may change.

    `side` holds what a candidate may carry beside its factors while the model computes with it.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    vector: LoraVector
    context_limit: int
    micro_batch_tokens: int = 8192
    base_digest: str = ""
    encoded: dict[ChatRow, EncodedRow] = field(default_factory=dict, repr=False, compare=False)
    side: SideTerms = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "side", SideTerms(self.model))  # frozen for everybody else

    def encode(self, row: ChatRow) -> EncodedRow:
        """The row as tokens; several methods are given the same rows, and rendering a template is slow."""
        if row not in self.encoded:
            self.encoded[row] = encode_row(self.tokenizer, row, max_tokens=self.context_limit)
        return self.encoded[row]

    @property
    def piece_tokens(self) -> int:
        """Padded tokens of one piece of a forward pass: on a CPU no more than its caches hold."""
        on_cpu = self.vector.device.type == "cpu"
        return min(self.micro_batch_tokens, CPU_MICRO_BATCH_TOKENS) if on_cpu else self.micro_batch_tokens

    @property
    def pad_id(self) -> int:
        """Any id serves: padding is masked wherever it is read."""
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else 0)


@contextmanager
def aligned(tuned: TunedModel) -> Iterator[None]:
    """The aligned base: the same model with its adapter off."""
    # PEFT sets requires_grad on every factor when it switches the adapter on again, whatever it was before.
    flags = [parameter.requires_grad for parameter in tuned.vector.parameters()]
    try:
        with tuned.model.disable_adapter():
            yield
    finally:
        for parameter, flag in zip(tuned.vector.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)
