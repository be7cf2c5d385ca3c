"""The same loop on one CUDA device: bf16 base, fp32 factors, losses close to those of the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

from workers.ml.checkpoints import attach_adapter, load_adapter, load_base, save_adapter
from workers.ml.settings import TuningSettings
from workers.ml.tuning.loop import train
from workers.ml.tuning.lora_vector import LoraVector
from workers.ml.types import ChatRow, Silent

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]


class Losses(Silent):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def step(self, step: int, total_steps: int, **values: float | int | str | None) -> None:
        self.seen.append(values["train_loss"])


def test_losses_on_the_gpu_follow_those_of_the_cpu_and_the_adapter_moves_back(
    tiny_base_folder: Path, tiny_rows: list[ChatRow], tiny_settings: TuningSettings, tmp_path: Path
) -> None:
    seen = []
    for device in ("cpu", "cuda"):
        base, losses = load_base(tiny_base_folder, device=device), Losses()
        model = attach_adapter(base, tiny_settings.lora, seed=0)
        train(model, base.tokenizer, tiny_rows, settings=tiny_settings, validation_rows=tiny_rows[:4], progress=losses)
        seen.append(losses.seen)
    vector = LoraVector(model)
    assert (vector.device.type, vector.get().dtype, base.model.dtype) == ("cuda", torch.float32, torch.bfloat16)
    assert seen[1] == pytest.approx(seen[0], rel=1e-2)
    save_adapter(model, tmp_path / "adapter")
    back = load_adapter(load_base(tiny_base_folder), tmp_path / "adapter")
    assert torch.equal(LoraVector(back).get(), vector.get().cpu())
