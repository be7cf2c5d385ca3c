"""The retry schedule's arithmetic, by hand."""

import pytest

from app.settings import WebhookSettings
from app.webhooks.schedule import next_wait

DEFAULT = WebhookSettings().retry_schedule_seconds


def test_the_default_schedule_makes_ten_attempts_over_more_than_three_days():
    assert len(DEFAULT) == 10
    assert sum(DEFAULT) > 72 * 3600


@pytest.mark.parametrize(("made", "jitter", "wait"), [(1, 0, 5), (2, 0, 300), (2, 1, 360), (2, -1, 240), (9, 0, 86400)])
def test_each_attempt_waits_its_turn_with_jitter(made, jitter, wait):
    assert next_wait(made, DEFAULT, jitter=jitter) == pytest.approx(wait)


def test_after_the_last_attempt_there_is_none():
    assert next_wait(10, DEFAULT) is None


def test_a_receiver_may_ask_for_more_time_but_not_for_less():
    assert next_wait(1, DEFAULT, retry_after_seconds=120, jitter=0) == 120
    assert next_wait(2, DEFAULT, retry_after_seconds=1, jitter=0) == 300
    assert next_wait(1, DEFAULT, retry_after_seconds=10**8, jitter=0) == 86400


def test_drawn_jitter_stays_within_a_fifth():
    waits = [next_wait(2, DEFAULT) for _ in range(200)]
    assert 240 <= min(waits) < max(waits) <= 360
