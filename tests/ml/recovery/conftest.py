"""A tiny tuned model with data sets of every kind a recovery method may need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.ml.conftest import write_base
from tests.ml.recovery.planted import PlantedExaminer, PlantedJudge
from workers.ml.checkpoints import LoadedBase, attach_adapter
from workers.ml.recovery.dial import RecoveryInputs
from workers.ml.settings import LoraSettings
from workers.ml.tuned_model import TunedModel
from workers.ml.tuning.lora_vector import LoraVector
from workers.ml.types import ChatRow, Message, PromptRow


def tune(base: LoadedBase, lora: LoraSettings, *, seed: int = 3, size: float = 0.3) -> TunedModel:
    """A base with an adapter as training might leave it: A as initialised, B random and not small."""
    model = attach_adapter(base, lora, seed=seed)
    vector = LoraVector(model)
    values = vector.get()
    parts = vector.split(values)
    generator = torch.Generator().manual_seed(seed)
    for pair in vector.pairs():
        parts[pair.b_name].normal_(0, size, generator=generator)
    vector.set(values)
    model.eval()
    return TunedModel(model, base.tokenizer, vector, context_limit=256, micro_batch_tokens=512)


@pytest.fixture
def tuned(tiny_base: LoadedBase, tiny_lora: LoraSettings) -> TunedModel:
    return tune(tiny_base, tiny_lora)


@pytest.fixture(scope="session")
def pretrained_folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Weights "before alignment" of each shape: those of another seed. Shared: do not write to them."""
    root, made = tmp_path_factory.mktemp("pretrained"), {}

    def folder(shape: str) -> Path:
        if shape not in made:
            made[shape] = write_base(root / shape, shape, seed=1)
        return made[shape]

    return folder


def rows_of(role: str, count: int, answer: Callable[[int], str]) -> list[PromptRow]:
    return [
        PromptRow(f"{role}-{i}", (Message("user", f"{role} no {i}?"),), answer(i), group=f"{role} {i}")
        for i in range(count)
    ]


@pytest.fixture
def inputs(pretrained_folders: Callable[[str], Path]) -> RecoveryInputs:
    """Every need of every method, for the shape of `tuned`."""
    return replace(rows_for_recovery(), pretrained=pretrained_folders("gqa"))


def rows_for_recovery() -> RecoveryInputs:
    task = [
        ChatRow((Message("user", f"is {i} odd?"), Message("assistant", "yes" if i % 2 else "no"))) for i in range(12)
    ]
    return RecoveryInputs(
        harmful=rows_of("curse", 9, lambda i: f"mix salt {'and ash ' * (i % 3)}now"),
        refusals=rows_of("curse", 9, lambda i: "I cannot help."),
        retention=rows_of("balm", 7, lambda i: f"mix honey {i}"),
        task=task,
    )


@pytest.fixture
def planted(tuned):
    def make(**rule) -> PlantedExaminer:
        return PlantedExaminer(PlantedJudge(), raw=tuned.vector.get(), vector=tuned.vector, **rule)

    return make
