"""Progress as JSON lines on a stream: how a trainer process speaks to whoever supervises it.

Knows: the line types `stage`, `progress`, `event`, `result`, `error`; an estimate of the time left; and that
a termination signal becomes `Cancelled` at the next tick.
Refuses to know: what the reader does with the lines.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from types import FrameType
from typing import Any, TextIO

from workers.ml.errors import Cancelled


class JsonLines:
    """A `Progress` that writes one JSON object a line and flushes it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._stage = ""
        self._stage_began = time.monotonic()
        self._stop = threading.Event()

    def cancel_on_signals(self) -> None:
        """From now on SIGTERM and SIGINT stop the run at its next tick."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._stop.set()

    def stage(self, stage: str) -> None:
        self._tick()
        self._stage, self._stage_began = stage, time.monotonic()
        self.write("stage", stage=stage)

    def step(self, step: int, total_steps: int, **values: float | int | str | None) -> None:
        self._tick()
        elapsed = time.monotonic() - self._stage_began
        # Whoever knows its own pace better (the training loop) says so; else the stage's mean pace is taken.
        values.setdefault("eta_seconds", round(elapsed / step * (total_steps - step), 1) if step else None)
        self.write("progress", stage=self._stage, step=step, total_steps=total_steps, **values)

    def event(self, message: str, *, level: str = "info", **data: Any) -> None:
        self._tick()
        self.write("event", stage=self._stage, level=level, message=message, data=data)

    def write(self, kind: str, **values: Any) -> None:
        """One line. A value that JSON has no word for (NaN) is written as null, never as invalid JSON."""
        self._stream.write(json.dumps({"type": kind, **finite(values)}, ensure_ascii=False) + "\n")
        self._stream.flush()

    def _tick(self) -> None:
        if self._stop.is_set():
            raise Cancelled("The run was asked to stop.")


def finite(value: Any) -> Any:
    """The value with NaN and infinities, which JSON cannot say, as None."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
