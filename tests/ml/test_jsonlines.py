"""The trainer's protocol."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Iterator

import pytest

from workers.ml.errors import Cancelled
from workers.ml.jsonlines import JsonLines


def lines_of(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_each_call_is_one_json_object_on_one_line() -> None:
    stream = io.StringIO()
    lines = JsonLines(stream)
    lines.stage("training")
    lines.step(1, 4, train_loss=2.5)
    lines.event("two\nlines", level="warn", count=3)
    stage, step, event = lines_of(stream)
    assert stage == {"type": "stage", "stage": "training"}
    assert (step["step"], step["total_steps"], step["train_loss"], step["stage"]) == (1, 4, 2.5, "training")
    assert (event["message"], event["level"], event["data"]) == ("two\nlines", "warn", {"count": 3})


def test_what_is_not_a_number_is_written_as_null_at_any_depth() -> None:
    stream = io.StringIO()
    JsonLines(stream).event("x", values=[float("nan"), {"deep": float("inf")}, 1.0])
    (event,) = lines_of(stream)
    assert event["data"] == {"values": [None, {"deep": None}, 1.0]}


def test_a_step_may_bring_its_own_estimate_of_the_time_left() -> None:
    stream = io.StringIO()
    lines = JsonLines(stream)
    lines.step(1, 2, eta_seconds=7.0)
    lines.step(2, 2)
    assert [line["eta_seconds"] for line in lines_of(stream)] == [7.0, 0.0]


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_run_at_its_next_tick(number: signal.Signals) -> None:
    lines = JsonLines(io.StringIO())
    lines.cancel_on_signals()
    lines.step(1, 2)
    os.kill(os.getpid(), number)
    with pytest.raises(Cancelled):
        lines.step(2, 2)
