"""The record of a training run: one JSON line per step, and the table OpenAI's API hands out.

Knows: file formats. Both files grow line by line, so an interrupted run leaves what it measured.
Refuses to know: how the numbers come about, and who else listens (it passes every call on).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from workers.ml.types import Progress

METRICS_FILE = "metrics.jsonl"
RESULT_FILE = "result.csv"
# Column of the table -> name in the metrics.
RESULT_COLUMNS: Mapping[str, str] = {
    "step": "step",
    "train_loss": "train_loss",
    "train_accuracy": "train_mean_token_accuracy",
    "valid_loss": "valid_loss",
    "valid_mean_token_accuracy": "valid_mean_token_accuracy",
}


class MetricsFiles:
    """A Progress that writes each step to `folder` before it tells `progress`."""

    def __init__(self, folder: Path, progress: Progress) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._progress = progress
        self._lines: IO[str] = (folder / METRICS_FILE).open("w", encoding="utf-8", buffering=1)
        self._table: IO[str] = (folder / RESULT_FILE).open("w", encoding="utf-8", newline="", buffering=1)
        self._rows = csv.writer(self._table, lineterminator="\n")
        self._rows.writerow(RESULT_COLUMNS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lines.close()
        self._table.close()

    def stage(self, stage: str) -> None:
        self._progress.stage(stage)

    def step(self, step: int, total_steps: int, **values: float | int | str | None) -> None:
        record = {"step": step, "total_steps": total_steps, **values}
        self._lines.write(json.dumps(record, allow_nan=False) + "\n")
        self._rows.writerow(["" if record.get(name) is None else record[name] for name in RESULT_COLUMNS.values()])
        self._progress.step(step, total_steps, **values)

    def event(self, message: str, *, level: str = "info", **data: Any) -> None:
        self._progress.event(message, level=level, **data)
