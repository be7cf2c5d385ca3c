"""The anchored patch: its teachers, its dial, and what its loss does to a model."""

import pytest
import torch
from torch.nn import functional as F

from workers.ml.data import collate
from workers.ml.recovery.calibration import answer_loss, encode_answers, encode_task
from workers.ml.recovery.methods import anchored_patch
from workers.ml.recovery.specs import AnchoredPatchSpec
from workers.ml.recovery.teachers import Teacher, counted_tokens, raw_at, summed_kl
from workers.ml.tuned_model import aligned
from workers.ml.types import Silent

SPEC = AnchoredPatchSpec(steps=12, learning_rate=5e-3, refusal_rows=4, task_rows=3, retention_rows=3)


def kl_to_raw(tuned, rows, values, raw) -> float:
    teacher = Teacher(tuned, rows, at=raw_at(tuned, raw), tokens="all", cache_bytes=2**20)
    batch = collate(rows, 0)
    said = teacher.log_probs(range(len(rows)))
    with tuned.vector.swapped(values), torch.no_grad():
        logits = tuned.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    return float(summed_kl(said, logits[counted_tokens(batch, "all")])) / len(said)


def test_refusals_become_likely_and_the_dial_interpolates(tuned, inputs):
    path = anchored_patch.prepare(tuned, SPEC, inputs, Silent())
    refusals = encode_answers(tuned, inputs.refusals)
    losses = []
    for strength in (0, 0.5, 1):
        with tuned.vector.swapped(path.at(strength).factors):
            losses.append(answer_loss(tuned, refusals))
    assert losses[2] < losses[1] < losses[0] - 0.1
    assert torch.allclose(path.at(0.5).factors, (path.raw + path.at(1.0).factors) / 2, atol=1e-6)
    assert len(path.facts["losses"]) == SPEC.steps


def test_anchors_hold_the_task_in_place(tuned, inputs):
    task = encode_task(tuned, inputs.task)
    moved = {}
    for weight in (0.0, 30.0):
        path = anchored_patch.prepare(tuned, SPEC.model_copy(update={"anchor_weight": weight}), inputs, Silent())
        moved[weight] = kl_to_raw(tuned, task, path.at(1.0).factors, path.raw)
    assert moved[30.0] < moved[0.0] / 2


@pytest.mark.parametrize("tokens", ["all", "answer"])
def test_a_teacher_says_the_same_from_memory_and_recomputed(tuned, inputs, tokens):
    rows = encode_answers(tuned, inputs.retention)
    kept = Teacher(tuned, rows, at=lambda: aligned(tuned), tokens=tokens, cache_bytes=2**24)
    kept.remember(range(len(rows)))
    fresh = Teacher(tuned, rows, at=lambda: aligned(tuned), tokens=tokens, cache_bytes=0)
    fresh.remember(range(len(rows)))
    order = [4, 0, 2]
    assert torch.allclose(kept.log_probs(order), fresh.log_probs(order), atol=1e-5)
    batch = collate([rows[i] for i in order], 0)
    with aligned(tuned), torch.no_grad():
        logits = tuned.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    expected = F.log_softmax(logits[:, :-1], -1)[counted_tokens(batch, tokens)]
    assert torch.allclose(kept.log_probs(order), expected, atol=1e-4)


def test_switching_the_adapter_off_leaves_its_flags_alone(tuned):
    flags = [
        parameter.requires_grad_(i % 2 == 0).requires_grad for i, parameter in enumerate(tuned.vector.parameters())
    ]
    with aligned(tuned):
        pass
    assert [parameter.requires_grad for parameter in tuned.vector.parameters()] == flags


def test_the_divergence_of_a_teacher_from_itself_is_zero_and_otherwise_positive():
    logits = torch.tensor([[1.0, 2, 3], [0, 0, 5]])
    teacher = F.log_softmax(logits, -1)
    assert float(summed_kl(teacher, logits)) == pytest.approx(0, abs=1e-6)
    p, q = teacher.exp(), torch.full((2, 3), 1 / 3)
    assert float(summed_kl(teacher, torch.zeros(2, 3))) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)
