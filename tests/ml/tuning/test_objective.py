"""What a window's loss is, whatever way it is cut into pieces."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from workers.ml.chat import EncodedRow, encode_rows
from workers.ml.checkpoints import attach_adapter, load_base
from workers.ml.errors import OutOfMemory
from workers.ml.settings import LoraSettings
from workers.ml.tuning.lora_vector import LoraVector
from workers.ml.tuning.objective import Objective
from workers.ml.types import ChatRow, Silent


class Events(Silent):
    def __init__(self) -> None:
        self.seen: list[dict[str, object]] = []

    def event(self, message: str, *, level: str = "info", **data: object) -> None:
        self.seen.append({"message": message, "level": level, **data})


@pytest.fixture
def make(base_folders: Callable[[str], Path], tiny_lora: LoraSettings) -> Callable[..., Objective]:
    def build(micro_batch_tokens: int = 8192, shape: str = "gqa", events: Events | None = None) -> Objective:
        model = attach_adapter(load_base(base_folders(shape)), tiny_lora, seed=0)
        vector = LoraVector(model)
        vector.add_(torch.randn(vector.numel, generator=torch.Generator().manual_seed(0)), scale=0.05)
        return Objective(model, vector, micro_batch_tokens, progress=events)

    return build


@pytest.fixture
def encoded(base_folders: Callable[[str], Path], tiny_rows: list[ChatRow]) -> list[EncodedRow]:
    return encode_rows(load_base(base_folders("gqa")).tokenizer, tiny_rows, max_tokens=256)


@pytest.mark.parametrize("shape", ["llama", "gqa", "tied", "qkv_bias"])
def test_the_loss_is_the_mean_over_trained_tokens_row_by_row(
    make: Callable[..., Objective], encoded: list[EncodedRow], shape: str
) -> None:
    objective = make(shape=shape)
    total, count, right = 0.0, 0, 0
    for row in encoded:
        ids = torch.tensor([row.input_ids])
        with torch.no_grad():
            logits = objective.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        for position in range(1, len(row)):
            if row.loss_weights[position]:
                total += float(functional.cross_entropy(logits[position - 1], ids[0, position]))
                right += int(logits[position - 1].argmax() == ids[0, position])
                count += 1
    found = objective.loss(encoded)
    assert found.loss == pytest.approx(total / count, rel=1e-5)
    assert found.accuracy == pytest.approx(right / count)
    assert (found.trained_tokens, found.tokens) == (count, sum(map(len, encoded)))


def test_loss_and_gradient_do_not_depend_on_the_micro_batches(
    make: Callable[..., Objective], encoded: list[EncodedRow]
) -> None:
    whole, single = make(micro_batch_tokens=10**6), make(micro_batch_tokens=1)
    one, other = whole.loss_into_grad(encoded), single.loss_into_grad(encoded)
    assert one.loss == pytest.approx(other.loss, rel=1e-5)
    assert one.accuracy == other.accuracy
    assert torch.allclose(whole.vector.grad(), single.vector.grad(), atol=1e-6)


def test_the_gradient_is_that_of_plain_autograd(make: Callable[..., Objective], encoded: list[EncodedRow]) -> None:
    objective = make()
    row = encoded[0]
    objective.loss_into_grad([row])
    found = objective.vector.grad()
    ids = torch.tensor([row.input_ids])
    labels = torch.where(torch.tensor([row.loss_weights]) > 0, ids, -100)
    objective.vector.zero_grad()
    objective.model(input_ids=ids, labels=labels).loss.backward()
    assert torch.allclose(found, objective.vector.grad(), atol=1e-6)


def test_a_row_without_a_trained_token_gives_a_finite_zero(
    make: Callable[..., Objective], encoded: list[EncodedRow]
) -> None:
    objective = make()
    silent = EncodedRow(encoded[0].input_ids, [0.0] * len(encoded[0]), 1)
    found = objective.loss_into_grad([silent])
    assert (found.loss, found.accuracy, found.trained_tokens) == (0.0, 0.0, 0)
    assert not objective.vector.grad().any()
    assert objective.loss([silent, encoded[1]]).loss == pytest.approx(objective.loss([encoded[1]]).loss)


def test_padding_in_a_row_changes_nothing(make: Callable[..., Objective], encoded: list[EncodedRow]) -> None:
    objective = make()
    short, long = min(encoded, key=len), max(encoded, key=len)
    alone = [objective.loss([row]) for row in (short, long)]
    together = objective.loss([short, long])
    expected = sum(part.loss * part.trained_tokens for part in alone) / together.trained_tokens
    assert together.loss == pytest.approx(expected, rel=1e-6)


def test_after_a_memory_error_the_same_window_goes_on_in_smaller_pieces(
    make: Callable[..., Objective], encoded: list[EncodedRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = make()
    wanted = expected.loss_into_grad(encoded)
    events = Events()
    objective = make(events=events)
    forward = objective.model.forward

    def small_device(input_ids: torch.Tensor, **rest: object) -> object:
        if input_ids.numel() > 150:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return forward(input_ids=input_ids, **rest)

    monkeypatch.setattr(objective.model, "forward", small_device)
    found = objective.loss_into_grad(encoded)
    assert found.loss == pytest.approx(wanted.loss, rel=1e-5)
    assert torch.allclose(objective.vector.grad(), expected.vector.grad(), atol=1e-6)
    assert objective.micro_batch_tokens <= 150
    assert [event["level"] for event in events.seen] == ["warning"] * len(events.seen)
    assert events.seen[-1]["micro_batch_tokens"] == objective.micro_batch_tokens


def test_a_row_that_does_not_fit_alone_is_an_out_of_memory_error(
    make: Callable[..., Objective], encoded: list[EncodedRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = make()

    def no_memory(**_rest: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(objective.model, "forward", no_memory)
    with pytest.raises(OutOfMemory, match="single row"):
        objective.loss_into_grad(encoded)


def test_other_errors_are_not_mistaken_for_a_lack_of_memory(
    make: Callable[..., Objective], encoded: list[EncodedRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = make()

    def broken(**_rest: object) -> object:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(objective.model, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        objective.loss(encoded)


def test_no_hook_stays_behind_on_the_model(make: Callable[..., Objective], encoded: list[EncodedRow]) -> None:
    objective = make()
    objective.loss_into_grad(encoded)
    head = objective.model.get_output_embeddings()
    assert not head._forward_pre_hooks
    ids = torch.tensor([encoded[0].input_ids])
    assert objective.model(input_ids=ids).logits.shape == (1, len(encoded[0]), head.out_features)


def test_the_loss_alone_is_taken_without_dropout_and_moves_no_random_number(
    base_folders: Callable[[str], Path], tiny_lora: LoraSettings, encoded: list[EncodedRow]
) -> None:
    wet = tiny_lora.model_copy(update={"dropout": 0.5})
    model = attach_adapter(load_base(base_folders("gqa")), wet, seed=0)
    vector = LoraVector(model)
    vector.add_(torch.randn(vector.numel, generator=torch.Generator().manual_seed(0)), scale=0.05)
    objective = Objective(model, vector, 8192)
    model.train()
    state = torch.get_rng_state()
    assert objective.loss(encoded) == objective.loss(encoded)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert objective.loss_into_grad(encoded).loss != objective.loss_into_grad(encoded).loss
