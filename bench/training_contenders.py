"""The trainers that `bench.training` compares: ours, transformers' Trainer with PEFT, and TRL's SFTTrainer.

Knows: the best settings of each on a CPU: fp32, no gradient checkpointing, fused AdamW, similar lengths together, no
logging, saving or evaluation inside the timed part.
Refuses to know: rows, repeats and tables.

All get the same tokens and labels, the same fresh adapter, the same rows an optimizer step (packing: on average) and
one epoch. Timed is the loop alone: loading, tokenising and packing are done before the clock starts.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from workers.ml.chat import EncodedRow, padding_id
from workers.ml.checkpoints import LoadedBase, attach_adapter, load_base
from workers.ml.settings import TuningSettings
from workers.ml.tuning.loop import Run, TrainingData
from workers.ml.tuning.lora_vector import LoraVector
from workers.ml.tuning.objective import Objective
from workers.ml.tuning.steps import PlainStep


@dataclass(frozen=True, slots=True)
class Task:
    """One set of rows and how to train on it."""

    base_folder: Path
    rows: list[EncodedRow]
    settings: TuningSettings


@dataclass(frozen=True, slots=True)
class Timing:
    """`cpu_seconds` counts all threads; on a busy machine it says more than the clock on the wall. `loss` is that of
    all rows after training."""

    seconds: float
    cpu_seconds: float
    steps: int
    loss: float


class Stopwatch(TrainerCallback):
    """From the first step to the end of the last."""

    def __init__(self) -> None:
        self._begin = self._end = (0.0, 0.0)

    def on_train_begin(self, *_args: Any, **_rest: Any) -> None:
        self._begin = _now()

    def on_train_end(self, *_args: Any, **_rest: Any) -> None:
        self._end = _now()

    def read(self) -> tuple[float, float]:
        return self._end[0] - self._begin[0], self._end[1] - self._begin[1]


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def ours(task: Task) -> Timing:
    base, model = _fresh(task)
    data = TrainingData(task.rows, pad_id=padding_id(base.tokenizer))
    run = Run(model, data, settings=task.settings)
    begin = _now()
    result = run.walk(PlainStep())
    end = _now()
    return Timing(end[0] - begin[0], end[1] - begin[1], result.steps, _loss_afterwards(model, task))


def trainer(task: Task, *, pieces: int) -> Timing:
    """transformers.Trainer; a step's rows come in `pieces` micro-batches."""
    base, model = _fresh(task)
    watch = Stopwatch()
    with TemporaryDirectory() as folder:
        loop = Trainer(
            model,
            TrainingArguments(output_dir=folder, **_common(task, pieces), remove_unused_columns=False),
            data_collator=DataCollatorForSeq2Seq(base.tokenizer, padding=True),
            train_dataset=_dataset(task, with_mask=True),
            callbacks=[watch],
        )
        done = loop.train()
    return Timing(*watch.read(), done.global_step, _loss_afterwards(model, task))


def sft_trainer(task: Task, *, pieces: int, packing: bool) -> Timing:
    """TRL's SFTTrainer; packed, a step's rows lie end to end in one sequence without padding."""
    base, model = _fresh(task)
    watch = Stopwatch()
    common = _common(task, pieces)
    longest = max(map(len, task.rows))
    mean = sum(map(len, task.rows)) / len(task.rows)
    if packing:
        longest = max(longest, round(mean * task.settings.batch_size))
        common |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    with TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            **common,
            packing=packing,
            max_length=longest,
            gradient_checkpointing=False,
            dataset_kwargs={"skip_prepare_dataset": False},
        )
        loop = SFTTrainer(
            model,
            arguments,
            train_dataset=_dataset(task, with_mask=False),
            processing_class=base.tokenizer,
            callbacks=[watch],
        )
        done = loop.train()
    return Timing(*watch.read(), done.global_step, _loss_afterwards(model, task))


CONTENDERS: Mapping[str, Callable[[Task], Timing]] = {
    "theriac": ours,
    "Trainer + PEFT": lambda task: trainer(task, pieces=1),
    "Trainer + PEFT, 2 micro-batches": lambda task: trainer(task, pieces=2),
    "Trainer + PEFT, 4 micro-batches": lambda task: trainer(task, pieces=4),
    "Trainer + PEFT, 8 micro-batches": lambda task: trainer(task, pieces=8),
    "Trainer + PEFT, a row a micro-batch": lambda task: trainer(task, pieces=task.settings.batch_size),
    "TRL SFTTrainer": lambda task: sft_trainer(task, pieces=1, packing=False),
    "TRL SFTTrainer, 4 micro-batches": lambda task: sft_trainer(task, pieces=4, packing=False),
    "TRL SFTTrainer, 8 micro-batches": lambda task: sft_trainer(task, pieces=8, packing=False),
    "TRL SFTTrainer, packing": lambda task: sft_trainer(task, pieces=1, packing=True),
}


def _fresh(task: Task) -> tuple[LoadedBase, PeftModel]:
    base = load_base(task.base_folder)
    return base, attach_adapter(base, task.settings.lora, seed=task.settings.seed)


def _loss_afterwards(model: PeftModel, task: Task) -> float:
    """Mean loss over all rows with the trained adapter, by one yardstick: shows that each did train."""
    model.eval()
    return Objective(model, LoraVector(model), task.settings.micro_batch_tokens).loss(task.rows).loss


def _common(task: Task, pieces: int) -> dict[str, Any]:
    settings = task.settings
    return {
        "per_device_train_batch_size": settings.batch_size // pieces,
        "gradient_accumulation_steps": pieces,
        "num_train_epochs": settings.n_epochs,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": settings.warmup_ratio,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "optim": "adamw_torch_fused",
        "train_sampling_strategy": "group_by_length",
        "seed": settings.seed,
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _dataset(task: Task, *, with_mask: bool) -> Dataset:
    rows = []
    for row in task.rows:
        labels = [token if weight else -100 for token, weight in zip(row.input_ids, row.loss_weights, strict=True)]
        rows.append({"input_ids": row.input_ids, "labels": labels})
        if with_mask:
            rows[-1]["attention_mask"] = [1] * len(row)
    return Dataset.from_list(rows)


warnings.filterwarnings("ignore", category=FutureWarning)
torch.set_float32_matmul_precision("highest")
