"""What a training run promises beyond its losses."""

from pathlib import Path
from typing import Any

import pytest
import torch

from workers.ml.chat import EncodedRow, encode_rows
from workers.ml.checkpoints import LoadedBase, attach_adapter, load_base
from workers.ml.errors import Cancelled, InvalidSetting, NumericError, RowTooLong
from workers.ml.settings import TuningSettings
from workers.ml.tuning.loop import Run, TrainingData, train
from workers.ml.tuning.lora_vector import LoraVector
from workers.ml.tuning.steps import PlainStep
from workers.ml.types import ChatRow, Message, Silent


class Listener(Silent):
    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def step(self, step: int, total_steps: int, **values: float | int | str | None) -> None:
        self.steps.append({"step": step, "total_steps": total_steps, **values})


def test_training_teaches_and_reports_every_step(
    tiny_base: LoadedBase, tiny_rows: list[ChatRow], tiny_settings: TuningSettings
) -> None:
    listener = Listener()
    model = attach_adapter(tiny_base, tiny_settings.lora, seed=0)
    settings = tiny_settings.model_copy(update={"n_epochs": 5, "learning_rate": 2e-2})
    result = train(model, tiny_base.tokenizer, tiny_rows, settings=settings, validation_rows=tiny_rows[:5],
                   progress=listener)  # fmt: skip
    assert [step["step"] for step in listener.steps] == list(range(1, 21))
    first, last = listener.steps[0], listener.steps[-1]
    assert result.train_loss < first["train_loss"] - 0.1
    assert first["epoch"] == 1
    assert last["epoch"] == 5
    assert last["eta_seconds"] == 0
    assert first["eta_seconds"] > 0
    assert all(step["tokens_per_second"] > 0 and step["valid_loss"] > 0 for step in listener.steps)
    assert [step["step"] for step in listener.steps if "full_valid_loss" in step] == [4, 8, 12, 16, 20]
    assert result.full_valid_loss == last["full_valid_loss"]
    rows = encode_rows(tiny_base.tokenizer, tiny_rows, max_tokens=256)
    assert result.tokens == 5 * sum(map(len, rows))
    assert result.trained_tokens == 5 * sum(row.trained_tokens for row in rows)
    assert not model.training


def test_the_same_seed_gives_the_same_adapter_and_dropout_follows_the_seed(
    tiny_base_folder: Path, tiny_rows: list[ChatRow], tiny_settings: TuningSettings
) -> None:
    lora = tiny_settings.lora.model_copy(update={"dropout": 0.2})
    vectors = []
    for seed in (7, 7, 8):
        base = load_base(tiny_base_folder)
        model = attach_adapter(base, lora, seed=0)
        state = torch.random.get_rng_state()
        train(model, base.tokenizer, tiny_rows, settings=tiny_settings.model_copy(update={"seed": seed, "lora": lora}))
        assert torch.equal(torch.random.get_rng_state(), state), "the caller's random numbers are left alone"
        vectors.append(LoraVector(model).get())
    assert torch.equal(vectors[0], vectors[1])
    assert not torch.equal(vectors[0], vectors[2])


def test_only_the_adapter_is_changed(
    tiny_base: LoadedBase, tiny_rows: list[ChatRow], tiny_settings: TuningSettings
) -> None:
    model = attach_adapter(tiny_base, tiny_settings.lora, seed=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, tiny_base.tokenizer, tiny_rows, settings=tiny_settings)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_a_loss_that_is_not_a_number_names_the_line_and_keeps_the_last_good_weights(
    tiny_base: LoadedBase, tiny_rows: list[ChatRow], tiny_settings: TuningSettings
) -> None:
    poison = tiny_base.tokenizer.encode("Z", add_special_tokens=False)[0]
    with torch.no_grad():
        tiny_base.model.get_input_embeddings().weight[poison] = float("nan")
    rows = [*tiny_rows, ChatRow((Message("user", "Z"), Message("assistant", "no")), line=17)]
    model = attach_adapter(tiny_base, tiny_settings.lora, seed=0)
    vector = LoraVector(model)
    kept: list[torch.Tensor] = []

    class Keeper(Silent):
        def step(self, step: int, total_steps: int, **values: float | int | str | None) -> None:
            kept.append(vector.get())

    settings = tiny_settings.model_copy(update={"seed": 2})
    with pytest.raises(NumericError, match=r"line 17\."):
        train(model, tiny_base.tokenizer, rows, settings=settings, progress=Keeper())
    assert len(kept) > 1, "the bad row must not come first, or nothing is shown"
    assert torch.isfinite(vector.get()).all()
    assert torch.equal(vector.get(), kept[-1])


def test_a_batch_without_a_trained_token_has_loss_zero_and_moves_nothing(
    tiny_base: LoadedBase, tiny_rows: list[ChatRow], tiny_settings: TuningSettings
) -> None:
    rows = encode_rows(tiny_base.tokenizer, tiny_rows[:8], max_tokens=256)
    silent = [EncodedRow(row.input_ids, [0.0] * len(row), row.row_id) for row in rows[:4]]
    listener = Listener()
    vectors: list[torch.Tensor] = []
    model = attach_adapter(tiny_base, tiny_settings.lora, seed=0)
    run = Run(model, TrainingData([*rows[4:], *silent]), settings=tiny_settings, progress=listener)
    run._batches = lambda: iter([rows[4:], silent])  # type: ignore[method-assign]

    class Watched(PlainStep):
        def finish(self, context: Any) -> None:
            vectors.append(context.vector.get())

    note = listener.step
    listener.step = lambda *a, **k: (note(*a, **k), vectors.append(run.vector.get()))[0]  # type: ignore[method-assign]
    run.walk(Watched())
    assert listener.steps[0]["train_loss"] > 0
    assert listener.steps[1]["train_loss"] == 0.0
    assert torch.equal(vectors[0], vectors[1])


def test_a_file_without_any_trained_token_is_refused(tiny_base: LoadedBase, tiny_settings: TuningSettings) -> None:
    rows = [ChatRow((Message("user", "a"), Message("assistant", "b", weight=0.0)))]
    with pytest.raises(InvalidSetting, match="nothing to train on"):
        train(attach_adapter(tiny_base, tiny_settings.lora, seed=0), tiny_base.tokenizer, rows, settings=tiny_settings)


def test_a_row_over_the_context_limit_stops_the_run_before_it_starts(
    tiny_base: LoadedBase, tiny_rows: list[ChatRow], tiny_settings: TuningSettings
) -> None:
    long = ChatRow((Message("user", "x" * 300), Message("assistant", "b")), line=99)
    listener = Listener()
    model = attach_adapter(tiny_base, tiny_settings.lora, seed=0)
    with pytest.raises(RowTooLong, match="Line 99"):
        train(model, tiny_base.tokenizer, [*tiny_rows, long], settings=tiny_settings, progress=listener)
    assert not listener.steps


def test_a_cancel_takes_effect_at_the_next_step(
    tiny_base: LoadedBase, tiny_rows: list[ChatRow], tiny_settings: TuningSettings
) -> None:
    seen: list[int] = []

    class Impatient(Silent):
        def step(self, step: int, total_steps: int, **values: float | int | str | None) -> None:
            seen.append(step)
            if step == 3:
                raise Cancelled("enough")

    model = attach_adapter(tiny_base, tiny_settings.lora, seed=0)
    with pytest.raises(Cancelled):
        train(model, tiny_base.tokenizer, tiny_rows, settings=tiny_settings, progress=Impatient())
    assert seen == [1, 2, 3]
    assert not model.training


def test_the_gradient_is_clipped_and_its_norm_reported_as_it_was(
    tiny_base_folder: Path, tiny_rows: list[ChatRow], tiny_settings: TuningSettings
) -> None:
    norms, vectors = [], []
    for limit in (1.0, 1e-6):
        base, listener = load_base(tiny_base_folder), Listener()
        model = attach_adapter(base, tiny_settings.lora, seed=0)
        # Adam divides the size of the gradient out again; its epsilon is what a tiny gradient cannot outweigh.
        settings = tiny_settings.model_copy(update={"max_grad_norm": limit, "warmup_ratio": 0.0})
        train(model, base.tokenizer, tiny_rows, settings=settings, progress=listener)
        norms.append(listener.steps[0]["grad_norm"])
        vectors.append(LoraVector(model).get())
    assert norms[0] == norms[1]
    assert not torch.equal(vectors[0], vectors[1])


def test_a_bf16_base_trains_with_fp32_factors(
    tiny_base_folder: Path, tiny_rows: list[ChatRow], tiny_settings: TuningSettings
) -> None:
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        base, listener = load_base(tiny_base_folder, dtype=dtype), Listener()
        model = attach_adapter(base, tiny_settings.lora, seed=0)
        train(model, base.tokenizer, tiny_rows, settings=tiny_settings, progress=listener)
        assert LoraVector(model).get().dtype == torch.float32
        losses.append([step["train_loss"] for step in listener.steps])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
