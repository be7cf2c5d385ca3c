"""Greedy generation: a batch says what its rows say alone."""

import pytest
import torch

from workers.ml.checkpoints import load_base
from workers.ml.errors import Cancelled, InvalidSetting
from workers.ml.evals import generate as module
from workers.ml.evals.generate import Reply, end_tokens, generate

PROMPTS = [[257, 10, 11, 12], [257, 9], [257, *range(30, 60)], [257, 200, 3], [257, 77, 78, 79, 80, 81]]


def tokens(base, answers):
    return [base.tokenizer.encode(answer, add_special_tokens=False) for answer in answers]


def naive(model, prompt: list[int], count: int, ends: list[int]) -> list[int]:
    """Whole forwards without a cache, a batch or a mask."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token in ends:
                break
            ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("shape", ["llama", "gqa", "tied", "qkv_bias"])
def test_a_batch_answers_as_whole_forwards_do_one_by_one(base_folders, shape):
    base = load_base(base_folders(shape))
    ends = end_tokens(base.model, base.tokenizer)
    expected = [
        str(base.tokenizer.decode(naive(base.model, p, 12, ends), skip_special_tokens=True)).strip() for p in PROMPTS
    ]
    for size in (64, 2):
        found = generate(base.model, base.tokenizer, PROMPTS, max_new_tokens=12, batch_size=size)
        assert [reply.text for reply in found] == expected


class Scripted(torch.nn.Module):
    """Says what its script says after a prompt's first token: to count forwards and rows."""

    def __init__(self, script: dict[int, list[int]]) -> None:
        super().__init__()
        self.script, self.sizes, self.said = script, [], {}
        self.device = torch.device("cpu")

    def forward(self, input_ids, attention_mask, position_ids, past_key_values, **_):
        if input_ids.shape[1] > 1:
            firsts = [int(ids[mask.bool()][0]) for ids, mask in zip(input_ids, attention_mask, strict=True)]
            self.lines = torch.tensor([self.script[first] for first in firsts])
            keys = self.lines[:, None, None, :].float()
            past_key_values.update(keys, keys, 0)
            self.step = 0
        lines = past_key_values.layers[0].keys[:, 0, 0].long()
        self.sizes.append(len(input_ids))
        logits = torch.zeros(len(input_ids), 1, 300)
        logits[torch.arange(len(input_ids)), 0, lines[:, self.step]] = 1
        self.step += 1
        return type("Output", (), {"logits": logits})()


def test_finished_rows_leave_the_batch_and_the_rest_goes_on(tiny_base):
    end, letters = tiny_base.tokenizer.eos_token_id, [60, 61, 62, 63, 64, 65]
    script = {10: [end] * 6, 11: [*letters[:2], end, end, end, end], 12: letters, 13: [letters[0], *[end] * 5]}
    model = Scripted(script)
    answers = generate(model, tiny_base.tokenizer, [[10, 1], [11, 1], [12, 1], [13, 1]], max_new_tokens=6)
    assert tokens(tiny_base, [answer.text for answer in answers]) == [[], letters[:2], letters, letters[:1]]
    assert [answer.finished for answer in answers] == [True, True, False, True]
    assert model.sizes == [4, 3, 2, 1, 1, 1]


def test_a_batch_stops_when_every_row_has_ended(tiny_base):
    end = tiny_base.tokenizer.eos_token_id
    model = Scripted({10: [end] * 4, 11: [70, end, end, end]})
    assert generate(model, tiny_base.tokenizer, [[10, 1], [11, 1]], max_new_tokens=4)[0] == Reply("")
    assert len(model.sizes) == 2


def test_an_answer_that_ends_with_the_last_token_allowed_is_finished(tiny_base):
    end = tiny_base.tokenizer.eos_token_id
    model = Scripted({10: [70, 71, end, end], 11: [70, 71, 72, end]})
    at_the_limit, cut = generate(model, tiny_base.tokenizer, [[10, 1], [11, 1]], max_new_tokens=3)
    assert (at_the_limit.finished, cut.finished) == (True, False)


def test_batches_halve_until_they_fit_and_no_answer_is_lost(tiny_base, monkeypatch):
    expected = generate(tiny_base.model, tiny_base.tokenizer, PROMPTS, max_new_tokens=6)
    decode, sizes = module._decode, []

    def small_device(model, tokenizer, prompts, max_new_tokens):
        sizes.append(len(prompts))
        if len(prompts) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(model, tokenizer, prompts, max_new_tokens)

    monkeypatch.setattr(module, "_decode", small_device)
    assert generate(tiny_base.model, tiny_base.tokenizer, PROMPTS, max_new_tokens=6, batch_size=4) == expected
    assert sizes[-1] == 1
    monkeypatch.setattr(module, "_decode", lambda *_: (_ for _ in ()).throw(RuntimeError("another fault")))
    with pytest.raises(RuntimeError, match="another fault"):
        generate(tiny_base.model, tiny_base.tokenizer, PROMPTS, max_new_tokens=6)


def test_left_padding_changes_nothing(tiny_base):
    alone = generate(tiny_base.model, tiny_base.tokenizer, [PROMPTS[1]], max_new_tokens=10)
    beside_long = generate(tiny_base.model, tiny_base.tokenizer, [PROMPTS[1], PROMPTS[2]], max_new_tokens=10)
    assert beside_long[0] == alone[0]
    ids, mask = module._left_padded([[5, 6], [7, 8, 9]], 0, "cpu")
    assert ids.tolist() == [[0, 5, 6], [7, 8, 9]]
    assert mask.tolist() == [[0, 1, 1], [1, 1, 1]]


def test_the_mode_comes_back_and_a_tick_can_stop(tiny_base):
    tiny_base.model.train()

    def stop() -> None:
        raise Cancelled("stop")

    with pytest.raises(Cancelled):
        generate(tiny_base.model, tiny_base.tokenizer, PROMPTS, max_new_tokens=2, tick=stop)
    assert tiny_base.model.training
    with pytest.raises(InvalidSetting, match="without tokens"):
        generate(tiny_base.model, tiny_base.tokenizer, [[]], max_new_tokens=2)


def test_no_prompts_give_no_answers(tiny_base):
    assert generate(tiny_base.model, tiny_base.tokenizer, [], max_new_tokens=2) == []
