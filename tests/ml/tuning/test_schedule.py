"""The learning rate follows transformers' schedules to the last digit."""

import pytest
import torch
from transformers import get_scheduler

from workers.ml.tuning.schedule import rate_factor, warmup_steps


@pytest.mark.parametrize(("ours", "theirs"), [("linear", "linear"), ("cosine", "cosine"),
                                              ("constant", "constant_with_warmup")])  # fmt: skip
@pytest.mark.parametrize(("total", "ratio"), [(50, 0.03), (7, 0.5), (3, 0.0), (1, 0.03)])
@pytest.mark.filterwarnings("ignore")
def test_every_step_has_the_rate_of_transformers(ours: str, theirs: str, total: int, ratio: float) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    warmup = warmup_steps(total, ratio)
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total):
        found = rate_factor(step, total_steps=total, warmup=warmup, schedule=ours)
        assert found == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        scheduler.step()


def test_a_run_of_one_step_trains() -> None:
    assert warmup_steps(1, 0.03) == 0
    assert rate_factor(0, total_steps=1, warmup=0, schedule="cosine") == 1.0


def test_three_percent_of_fifty_steps_are_two_steps_of_warm_up() -> None:
    factors = [rate_factor(step, total_steps=50, warmup=2, schedule="linear") for step in (0, 1, 2, 26, 49)]
    assert warmup_steps(50, 0.03) == 2
    assert factors == pytest.approx([0.0, 0.5, 1.0, 0.5, 1 / 48])
