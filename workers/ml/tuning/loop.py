"""The one training loop: LoRA factors, AdamW, a schedule, metrics, and a step method.

Knows: epochs, optimizer steps, clipping, validation: what every method shares.
Refuses to know: where rows and weights come from or go to, and how a method finds its gradient.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from workers.ml.chat import EncodedRow, encode_rows, padding_id
from workers.ml.data import batches
from workers.ml.errors import InvalidSetting
from workers.ml.settings import TuningSettings
from workers.ml.tuning.lora_vector import LoraVector
from workers.ml.tuning.objective import Objective, WindowLoss
from workers.ml.tuning.schedule import rate_factor, warmup_steps
from workers.ml.tuning.steps import PlainStep, StepContext, StepGradient, StepMethod
from workers.ml.types import ChatRow, Progress, Silent

# A small validation batch is looked at about this often in a run; the whole set at the end of each epoch.
VALIDATIONS_PER_RUN = 20


@dataclass(frozen=True, slots=True)
class TrainingData:
    """Rows as tokens. `grouped` lets rows of similar length meet in a batch; without it the order is a plain
    shuffle, as other trainers make it."""

    rows: Sequence[EncodedRow]
    held_out: Sequence[EncodedRow] = ()
    pad_id: int = 0
    grouped: bool = True


@dataclass(frozen=True, slots=True)
class TuningResult:
    """What a run did. `tokens` are real ones (no padding) over all epochs; training loss and accuracy are means
    over the trained tokens of the last epoch."""

    steps: int
    rows: int
    tokens: int
    trained_tokens: int
    seconds: float
    train_loss: float
    train_mean_token_accuracy: float
    full_valid_loss: float | None
    full_valid_mean_token_accuracy: float | None
    micro_batch_tokens: int
    threads: int
    device: str


def train(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[ChatRow],
    *,
    settings: TuningSettings,
    validation_rows: Sequence[ChatRow] = (),
    progress: Progress | None = None,
    step_method: StepMethod | None = None,
) -> TuningResult:
    """Fine-tune the adapter of `model` in place.

    Every `progress.step` is also the point where a cancel takes effect. After any exception the factors are those
    of the last complete step.
    """
    data = TrainingData(
        rows=encode_rows(tokenizer, rows, max_tokens=settings.context_limit),
        held_out=encode_rows(tokenizer, validation_rows, max_tokens=settings.context_limit),
        pad_id=padding_id(tokenizer),
    )
    return Run(model, data, settings=settings, progress=progress).walk(step_method or PlainStep())


class Run:
    """One training from its first step to its last. `train` is the usual door; encoded rows come in here."""

    def __init__(
        self, model: PeftModel, data: TrainingData, *, settings: TuningSettings, progress: Progress | None = None
    ) -> None:
        if not any(row.trained_tokens for row in data.rows):
            raise InvalidSetting("There is nothing to train on: no row has a trained token.", "training_file")
        self._model, self._data, self._settings = model, data, settings
        self._progress = progress or Silent()
        self.vector = LoraVector(model)
        self.objective = Objective(model, self.vector, settings.micro_batch_tokens, data.pad_id, self._progress)
        # One flat parameter that shares its memory with all factors: the update is a single fused kernel.
        self._flat = torch.nn.Parameter(self.vector.flat())
        self._optimizer = torch.optim.AdamW(
            [self._flat], lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        self._steps_per_epoch = math.ceil(len(data.rows) / settings.batch_size)
        self.total_steps = settings.n_epochs * self._steps_per_epoch
        self._warmup = warmup_steps(self.total_steps, settings.warmup_ratio)

    def walk(self, method: StepMethod) -> TuningResult:
        begin, losses, full = time.perf_counter(), [], None
        with _training(self._model, self._settings.seed):
            for step, rows in enumerate(self._batches()):
                context = StepContext(rows, step, self.total_steps, self.vector, self.objective, self._settings)
                step_begin = time.perf_counter()
                found = method.gradient(context)
                values = self._update(found, context)
                values["tokens_per_second"] = found.loss.tokens / (time.perf_counter() - step_begin)
                losses.append(found.loss)
                full = self._validate(step + 1, values) or full
                left = self.total_steps - step - 1
                values["eta_seconds"] = (time.perf_counter() - begin) / (step + 1) * left
                self._progress.step(step + 1, self.total_steps, **values)
            method.finish(context)
        return self._result(losses, full, time.perf_counter() - begin)

    def _batches(self) -> Iterator[list[EncodedRow]]:
        data, settings = self._data, self._settings
        for epoch in range(settings.n_epochs):
            yield from batches(
                data.rows, batch_size=settings.batch_size, seed=settings.seed, epoch=epoch, grouped=data.grouped
            )

    def _update(self, found: StepGradient, context: StepContext) -> dict[str, float | int | str | None]:
        """One clipped AdamW update, or an error and no change when a number is not finite."""
        settings = self._settings
        norm = float(torch.linalg.vector_norm(found.grad))
        if not (math.isfinite(found.loss.loss) and math.isfinite(norm)):
            raise self.objective.bad_rows(context.rows)
        factor = rate_factor(
            context.step, total_steps=self.total_steps, warmup=self._warmup, schedule=settings.schedule
        )
        rate = settings.learning_rate * factor
        if norm > 0:
            # With a gradient of zero (a batch without a trained token) Adam's momentum alone would move the weights.
            if norm > settings.max_grad_norm:
                found.grad.mul_(settings.max_grad_norm / (norm + 1e-6))
            self._flat.grad = found.grad
            self._optimizer.param_groups[0]["lr"] = rate
            self._optimizer.step()
        return {
            "epoch": 1 + context.step // self._steps_per_epoch,
            "train_loss": found.loss.loss,
            "train_mean_token_accuracy": found.loss.accuracy,
            "learning_rate": rate,
            "grad_norm": norm,
            **found.facts,
        }

    def _validate(self, done: int, values: dict[str, float | int | str | None]) -> WindowLoss | None:
        """Loss on a small rotating part of the held-out rows now and then, on all of them after each epoch."""
        rows, size = self._data.held_out, self._settings.batch_size
        if not rows:
            return None
        turn, early = divmod(done, max(1, self.total_steps // VALIDATIONS_PER_RUN))
        if not early or done == self.total_steps:
            small = self.objective.loss([rows[(turn * size + i) % len(rows)] for i in range(min(size, len(rows)))])
            values |= {"valid_loss": small.loss, "valid_mean_token_accuracy": small.accuracy}
        if done % self._steps_per_epoch:
            return None
        full = self.objective.loss(rows)
        values |= {"full_valid_loss": full.loss, "full_valid_mean_token_accuracy": full.accuracy}
        return full

    def _result(self, losses: list[WindowLoss], full: WindowLoss | None, seconds: float) -> TuningResult:
        last = losses[-self._steps_per_epoch :]
        trained = max(1, sum(loss.trained_tokens for loss in last))
        return TuningResult(
            steps=len(losses),
            rows=len(self._data.rows),
            tokens=sum(loss.tokens for loss in losses),
            trained_tokens=sum(loss.trained_tokens for loss in losses),
            seconds=seconds,
            train_loss=sum(loss.loss * loss.trained_tokens for loss in last) / trained,
            train_mean_token_accuracy=sum(loss.accuracy * loss.trained_tokens for loss in last) / trained,
            full_valid_loss=full.loss if full else None,
            full_valid_mean_token_accuracy=full.accuracy if full else None,
            micro_batch_tokens=self.objective.micro_batch_tokens,
            threads=torch.get_num_threads(),
            device=str(self.vector.device),
        )


@contextmanager
def _training(model: PeftModel, seed: int) -> Iterator[None]:
    """Dropout on and seeded; afterwards the model and the caller's random numbers are as they were."""
    was_training = model.training
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        model.train()
        try:
            yield
        finally:
            model.train(was_training)
