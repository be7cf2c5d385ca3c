"""The seam for methods: several gradients in one step, at several points, and a last word after training."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from workers.ml.chat import EncodedRow, encode_rows
from workers.ml.checkpoints import attach_adapter, load_base
from workers.ml.data import batches, endless_batches
from workers.ml.settings import LoraSettings, TuningSettings
from workers.ml.tuning.loop import Run, TrainingData
from workers.ml.tuning.lora_vector import LoraVector
from workers.ml.tuning.steps import PlainStep, StepContext, StepGradient
from workers.ml.types import ChatRow, Message

RHO, LAMBDA = 0.5, 0.1


class ThreeGradients:
    """Descend g - lambda (h' - h), with h' taken at w + rho h/|h|; the last perturbation is added at the end."""

    def __init__(self, harmful: Iterator[list[EncodedRow]]) -> None:
        self._harmful = harmful
        self._perturbation: Tensor | None = None

    def gradient(self, context: StepContext) -> StepGradient:
        harmful = next(self._harmful)
        loss, descend = context.loss_and_grad(context.rows)
        harm, here = context.loss_and_grad(harmful)
        self._perturbation = RHO * here / torch.linalg.vector_norm(here)
        with context.vector.swapped(context.vector.get() + self._perturbation):
            _, there = context.loss_and_grad(harmful)
        return StepGradient(loss, descend - LAMBDA * (there - here), {"harmful_loss": harm.loss})

    def finish(self, context: StepContext) -> None:
        context.vector.add_(self._perturbation)


@pytest.fixture
def settings(tiny_lora: LoraSettings) -> TuningSettings:
    return TuningSettings(
        n_epochs=1, batch_size=4, learning_rate=1e-2, schedule="constant", warmup_ratio=0.0, max_grad_norm=1e9,
        seed=3, context_limit=256, lora=tiny_lora,
    )  # fmt: skip


def gradient_by_hand(model: torch.nn.Module, names: Sequence[str], at: Tensor, rows: list[EncodedRow]) -> Tensor:
    """Plain autograd through PEFT's own forward, one row at a time; nothing of ours but the order of names."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        offset = 0
        for name in names:
            size = parameters[name].numel()
            parameters[name].copy_(at[offset : offset + size].view_as(parameters[name]))
            offset += size
    total = torch.zeros(())
    count = sum(row.trained_tokens for row in rows)
    for row in rows:
        ids = torch.tensor([row.input_ids])
        labels = torch.where(torch.tensor([row.loss_weights]) > 0, ids, -100)
        total = total + model(input_ids=ids, labels=labels).loss * row.trained_tokens / count
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(total, [parameters[name] for name in names])])


def test_a_step_of_three_gradients_matches_vectors_computed_by_hand(
    tiny_base_folder: Path, tiny_rows: list[ChatRow], settings: TuningSettings
) -> None:
    base = load_base(tiny_base_folder)
    harm = [ChatRow((Message("user", f"curse {i}"), Message("assistant", "a dark word" * (i + 1)))) for i in range(4)]
    rows, harmful = (encode_rows(base.tokenizer, some, max_tokens=256) for some in (tiny_rows, harm))
    start = LoraVector(attach_adapter(base, settings.lora, seed=1))
    start_values = start.get() + 0.05 * torch.randn(start.numel, generator=torch.Generator().manual_seed(2))

    reference = attach_adapter(load_base(tiny_base_folder), settings.lora, seed=1)
    w = torch.nn.Parameter(start_values.clone())
    optimizer = torch.optim.AdamW([w], lr=settings.learning_rate, weight_decay=0.0)
    stream = endless_batches(harmful, batch_size=2, seed=0)
    for batch in batches(rows, batch_size=4, seed=3, epoch=0):
        evil = next(stream)
        g = gradient_by_hand(reference, start.names, w.detach(), batch)
        h = gradient_by_hand(reference, start.names, w.detach(), evil)
        epsilon = RHO * h / h.norm()
        h_there = gradient_by_hand(reference, start.names, w.detach() + epsilon, evil)
        w.grad = g - LAMBDA * (h_there - h)
        optimizer.step()
    expected = w.detach() + epsilon

    released = {}
    for name, method in (
        ("three", ThreeGradients(endless_batches(harmful, batch_size=2, seed=0))),
        ("one", PlainStep()),
    ):
        model = attach_adapter(load_base(tiny_base_folder), settings.lora, seed=1)
        run = Run(model, TrainingData(rows), settings=settings)
        run.vector.set(start_values)
        assert run.walk(method).steps == 4
        released[name] = run.vector.get()
    assert torch.allclose(released["three"], expected, atol=2e-5)
    assert not torch.allclose(released["one"] + epsilon, expected, atol=1e-3), "the extra gradients do count"


def test_gradients_taken_within_a_step_do_not_overwrite_each_other(
    tiny_base_folder: Path, tiny_rows: list[ChatRow], settings: TuningSettings
) -> None:
    base = load_base(tiny_base_folder)
    rows = encode_rows(base.tokenizer, tiny_rows, max_tokens=256)
    run = Run(attach_adapter(base, settings.lora, seed=1), TrainingData(rows), settings=settings)
    context = StepContext(rows[:4], 0, 1, run.vector, run.objective, settings)
    _, first = context.loss_and_grad(rows[:4])
    kept = first.clone()
    _, second = context.loss_and_grad(rows[4:8])
    assert torch.equal(first, kept)
    assert not torch.allclose(first, second)


def test_an_error_inside_a_perturbed_step_leaves_the_weights_of_the_last_good_step(
    tiny_base_folder: Path, tiny_rows: list[ChatRow], settings: TuningSettings
) -> None:
    base = load_base(tiny_base_folder)
    rows = encode_rows(base.tokenizer, tiny_rows, max_tokens=256)
    run = Run(attach_adapter(base, settings.lora, seed=1), TrainingData(rows), settings=settings)
    before = run.vector.get()

    class Breaks(PlainStep):
        def gradient(self, context: StepContext) -> StepGradient:
            with context.vector.swapped(context.vector.get() + 1.0):
                raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        run.walk(Breaks())
    assert torch.equal(run.vector.get(), before)
