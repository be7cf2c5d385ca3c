"""The loss of a set of rows and its gradient with respect to the LoRA factors.

Knows: micro-batches, normalisation over the whole set, which positions need logits, and what to do when memory
runs out or a number is not finite.
Refuses to know: optimizers, schedules, epochs, where rows come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from workers.ml.chat import EncodedRow
from workers.ml.data import collate, micro_batches
from workers.ml.errors import NumericError, OutOfMemory
from workers.ml.memory import is_out_of_memory, release_reserve
from workers.ml.predictions import logits_at
from workers.ml.tuning.fused_lora import fused, fused_forwards
from workers.ml.tuning.lora_vector import LoraVector
from workers.ml.types import Progress, Silent

# Beyond this a CPU gains nothing from larger pieces, and loses: their tensors leave the caches and take fresh pages
# from the system at every operation (GSM8K rows: 3,090 tokens a CPU second at 1,024, 2,500 at 8,192).
CPU_MICRO_BATCH_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class WindowLoss:
    """`loss` is the weighted mean over the trained tokens of all rows; 0 where there is no such token."""

    loss: float
    accuracy: float
    trained_tokens: int
    tokens: int


class Objective:
    """Mean negative log-likelihood of trained tokens, for a model with one plain LoRA adapter.

    Rows are padded on the right and the model is causal, so no real token ever sees padding: no attention mask is
    passed, which keeps the fastest attention kernels in use. Only positions that predict a trained token reach
    the LM head.
    """

    def __init__(
        self,
        model: PeftModel,
        vector: LoraVector,
        micro_batch_tokens: int,
        pad_id: int = 0,
        progress: Progress | None = None,
    ) -> None:
        self.model: PreTrainedModel = model.get_base_model()
        self._forwards = fused_forwards(model)
        self.vector = vector
        self._pad_id = pad_id
        self._progress = progress or Silent()
        on_cpu = vector.device.type == "cpu"
        self.micro_batch_tokens = min(micro_batch_tokens, CPU_MICRO_BATCH_TOKENS) if on_cpu else micro_batch_tokens

    def loss_into_grad(self, rows: Sequence[EncodedRow]) -> WindowLoss:
        """Replace the vector's gradient by that of the mean loss over `rows`; memory may force smaller pieces."""
        while True:
            self.vector.zero_grad()
            try:
                with fused(self._forwards):
                    return self._run(rows, backward=True)
            except (RuntimeError, MemoryError) as error:
                self._shrink_or_raise(error, rows)

    def loss(self, rows: Sequence[EncodedRow]) -> WindowLoss:
        """The mean loss alone, without a gradient and without dropout."""
        was_training = self.model.training
        self.model.eval()
        try:
            while True:
                try:
                    with torch.inference_mode(), fused(self._forwards):
                        return self._run(rows, backward=False)
                except (RuntimeError, MemoryError) as error:
                    self._shrink_or_raise(error, rows)
        finally:
            self.model.train(was_training)

    def _run(self, rows: Sequence[EncodedRow], *, backward: bool) -> WindowLoss:
        total_weight = sum(sum(row.loss_weights[1:]) for row in rows)
        trained = sum(row.trained_tokens for row in rows)
        tokens = sum(len(row) for row in rows)
        if not trained:
            return WindowLoss(0.0, 0.0, 0, tokens)
        sums = []
        for piece in micro_batches(rows, max_tokens=self.micro_batch_tokens):
            if any(row.trained_tokens for row in piece):
                loss, right = self._forward(piece, total_weight)
                if backward:
                    loss.backward()
                sums.append(torch.stack((loss.detach(), right)))
        # One transfer for the whole window: reading each piece would stop the GPU each time.
        loss_value, right_count = torch.stack(sums).sum(0).tolist()
        return WindowLoss(loss_value, right_count / trained, trained, tokens)

    def _forward(self, piece: Sequence[EncodedRow], total_weight: float) -> tuple[Tensor, Tensor]:
        """This piece's share of the mean loss, and how many trained tokens were the most likely ones."""
        batch = collate(piece, self._pad_id)
        # Position t predicts token t + 1.
        weights = functional.pad(batch.loss_weights[:, 1:], (0, 1)).reshape(-1)  # (rows * tokens)
        targets = functional.pad(batch.input_ids[:, 1:], (0, 1)).reshape(-1)
        positions = weights.nonzero().squeeze(1)  # (trained)
        device = self.vector.device
        weights, targets = weights[positions].to(device), targets[positions].to(device)
        logits = logits_at(
            self.model, batch.input_ids.to(device), positions.to(device)
        ).float()  # (trained, vocabulary)
        losses = functional.cross_entropy(logits, targets, reduction="none")
        right = (logits.detach().argmax(-1) == targets).sum().to(losses.dtype)
        return (losses * weights).sum() / total_weight, right

    def _shrink_or_raise(self, error: Exception, rows: Sequence[EncodedRow]) -> None:
        """Halve the pieces after a memory error; anything else goes on its way."""
        if not is_out_of_memory(error):
            raise error
        release_reserve()
        longest = max(len(row) for row in rows)
        if self.micro_batch_tokens <= longest:
            raise OutOfMemory(
                f"The device has no memory for a single row of {longest} tokens.", "micro_batch_tokens"
            ) from error
        # No piece is ever larger than the whole set, so halving starts there.
        now = min(self.micro_batch_tokens, longest * len(rows))
        self.micro_batch_tokens = max(longest, now // 2)
        self._progress.event(
            "The device ran out of memory; going on with smaller pieces of the same batch.",
            level="warning",
            micro_batch_tokens=self.micro_batch_tokens,
        )

    def bad_rows(self, rows: Sequence[EncodedRow]) -> NumericError:
        """Which rows make the loss NaN or infinite; all of them if each alone is fine."""
        bad = [row for row in rows if not _finite(self.loss([row]).loss)]
        lines = ", ".join(str(row.row_id) for row in (bad or rows))
        return NumericError(f"The loss is not a finite number on the row(s) at line {lines}.", "training_file")


def _finite(value: float) -> bool:
    return value - value == 0.0
