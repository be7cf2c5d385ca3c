"""The loss of the customer's own answers, row by row, and its paired rise."""

import math

import pytest
import torch

from tests.ml.recovery.conftest import rows_of, tune
from workers.ml.chat import encode_row
from workers.ml.evals.task_loss import answer_losses, loss_rise
from workers.ml.types import ChatRow, Message, PromptRow


def test_each_row_has_the_mean_loss_of_its_answers_tokens(tiny_base, tiny_lora):
    tuned = tune(tiny_base, tiny_lora)
    rows = rows_of("task", 7, lambda i: "yes " * (i % 3 + 1))
    earlier = (Message("user", "hello"), Message("assistant", "not counted"), Message("user", "and?"))
    rows.append(PromptRow("turns", earlier, "no"))
    expected = []
    for row in rows:
        chat = ChatRow((*row.messages, Message("assistant", row.answer)))
        encoded = encode_row(tuned.tokenizer, chat, max_tokens=256)
        ids = torch.tensor([encoded.input_ids])
        with torch.no_grad():
            said = tuned.model(input_ids=ids).logits[0].log_softmax(-1)
        answer = tuned.tokenizer.encode(row.answer, add_special_tokens=False)
        begin = len(encoded) - len(answer) - 1  # the answer and its end mark close the row
        counted = [-float(said[place - 1, ids[0, place]]) for place in range(begin, len(encoded))]
        expected.append(sum(counted) / len(counted))
    assert answer_losses(tuned, rows) == pytest.approx(expected, rel=1e-4)


def test_a_rise_is_a_mean_of_pairs_with_its_standard_error():
    rise = loss_rise([1.0, 2.0, 3.0, 4.0], [1.1, 2.3, 3.0, 4.2])
    # Differences 0.1, 0.3, 0.0, 0.2: mean 0.15, squared deviations 0.05 over 3, standard error sqrt(0.05 / 3 / 4).
    assert (rise.mean, rise.standard_error, rise.n) == pytest.approx((0.15, math.sqrt(0.05 / 12), 4))
    assert math.isnan(loss_rise([1.0], [1.0]).standard_error)
    assert loss_rise([], []).n == 0
