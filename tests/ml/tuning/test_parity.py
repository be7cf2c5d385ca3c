"""Our loop against transformers.Trainer with PEFT: same rows, same order, same start, the same numbers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from workers.ml.chat import EncodedRow, encode_rows
from workers.ml.checkpoints import attach_adapter, load_base
from workers.ml.data import batches, collate
from workers.ml.settings import LoraSettings, TuningSettings
from workers.ml.tuning.loop import Run, TrainingData
from workers.ml.tuning.lora_vector import LoraVector
from workers.ml.tuning.steps import PlainStep
from workers.ml.types import ChatRow, Silent


class Listener(Silent):
    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def step(self, step: int, total_steps: int, **values: float | int | str | None) -> None:
        self.steps.append(dict(values))


class Rows(Dataset):  # type: ignore[type-arg]
    def __init__(self, rows: list[EncodedRow]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> EncodedRow:
        return self.rows[index]


class InOrder(Trainer):
    def _get_train_sampler(self, *args: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class Logs(TrainerCallback):
    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_log(self, *args: Any, logs: dict[str, float], **rest: Any) -> None:
        if "loss" in logs:
            self.steps.append(logs)


def with_labels(rows: list[EncodedRow]) -> dict[str, torch.Tensor]:
    batch = collate(rows, 0)
    labels = torch.where(batch.loss_weights > 0, batch.input_ids, -100)
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels}


def trainer_steps(
    folder: Path, settings: TuningSettings, order: list[EncodedRow], accumulation: int, out: Path
) -> tuple[list[dict[str, float]], torch.Tensor]:
    model = attach_adapter(load_base(folder), settings.lora, seed=1)
    logs = Logs()
    arguments = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=settings.batch_size // accumulation,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup_ratio,
        max_grad_norm=settings.max_grad_norm,
        weight_decay=settings.weight_decay,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    InOrder(model, arguments, data_collator=with_labels, train_dataset=Rows(order), callbacks=[logs]).train()
    return logs.steps, LoraVector(model).get()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("shape", "schedule", "accumulation", "micro_batch_tokens"),
    [("gqa", "linear", 1, 8192), ("gqa", "cosine", 2, 150), ("qkv_bias", "linear", 4, 1)],
)
def test_each_of_fifty_steps_has_the_loss_of_the_trainer(
    base_folders: Callable[[str], Path],
    tiny_rows: list[ChatRow],
    tiny_lora: LoraSettings,
    tmp_path: Path,
    shape: str,
    schedule: str,
    accumulation: int,
    micro_batch_tokens: int,
) -> None:
    settings = TuningSettings(
        n_epochs=13, batch_size=4, learning_rate=1e-2, schedule=schedule, warmup_ratio=0.1, weight_decay=0.01, seed=7,
        context_limit=256, micro_batch_tokens=micro_batch_tokens, lora=tiny_lora,
    )  # fmt: skip
    base = load_base(base_folders(shape))
    rows = encode_rows(base.tokenizer, tiny_rows, max_tokens=256)
    listener = Listener()
    data = TrainingData(rows, pad_id=base.tokenizer.pad_token_id, grouped=False)
    run = Run(attach_adapter(base, tiny_lora, seed=1), data, settings=settings, progress=listener)
    run.walk(PlainStep())
    order = [r for e in range(13) for b in batches(rows, batch_size=4, seed=7, epoch=e, grouped=False) for r in b]
    theirs, vector = trainer_steps(base_folders(shape), settings, order, accumulation, tmp_path)

    assert len(listener.steps) == len(theirs) == 52
    for ours, other in zip(listener.steps, theirs, strict=True):
        assert ours["train_loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert ours["learning_rate"] == pytest.approx(other["learning_rate"], abs=1e-12)
    assert listener.steps[-1]["train_loss"] < listener.steps[0]["train_loss"] - 0.1, "it does learn"
    assert torch.allclose(run.vector.get(), vector, atol=1e-4)
