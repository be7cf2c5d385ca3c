"""The two files a run leaves, and that the listener behind them hears everything."""

import csv
import json
from pathlib import Path

import pytest

from workers.ml.errors import Cancelled
from workers.ml.tuning.metrics import METRICS_FILE, RESULT_FILE, MetricsFiles
from workers.ml.types import Silent


class Listener(Silent):
    def __init__(self) -> None:
        self.heard: list[tuple[object, ...]] = []

    def step(self, step: int, total_steps: int, **values: float | int | str | None) -> None:
        self.heard.append(("step", step, total_steps, values))
        if step == 2:
            raise Cancelled("enough")

    def stage(self, stage: str) -> None:
        self.heard.append(("stage", stage))

    def event(self, message: str, *, level: str = "info", **data: object) -> None:
        self.heard.append(("event", message, level, data))


def test_a_cancelled_run_leaves_every_step_it_took(tmp_path: Path) -> None:
    listener = Listener()
    with pytest.raises(Cancelled), MetricsFiles(tmp_path / "out", listener) as metrics:
        metrics.stage("training")
        metrics.event("hello", level="warning", n=1)
        metrics.step(1, 9, train_loss=1.5, train_mean_token_accuracy=0.25, learning_rate=1e-3)
        metrics.step(2, 9, train_loss=1.25, train_mean_token_accuracy=0.5, valid_loss=2.0,
                     valid_mean_token_accuracy=0.125)  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "out" / METRICS_FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0] == {
        "step": 1, "total_steps": 9, "train_loss": 1.5, "train_mean_token_accuracy": 0.25, "learning_rate": 1e-3,
    }  # fmt: skip
    with (tmp_path / "out" / RESULT_FILE).open(newline="") as stream:
        table = list(csv.reader(stream))
    assert table == [
        ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"],
        ["1", "1.5", "0.25", "", ""],
        ["2", "1.25", "0.5", "2.0", "0.125"],
    ]
    assert [heard[0] for heard in listener.heard] == ["stage", "event", "step", "step"]
    assert listener.heard[1] == ("event", "hello", "warning", {"n": 1})


def test_a_number_that_json_cannot_hold_is_an_error_and_not_a_broken_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"), MetricsFiles(tmp_path, Silent()) as metrics:
        metrics.step(1, 1, train_loss=float("nan"))
    assert (tmp_path / METRICS_FILE).read_text() == ""
