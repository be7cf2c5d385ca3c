"""What a trainer says, brought to the job: stages at once, progress and events in small batches.

Knows: the trainer's message types, the words of OpenAI's metric events, and how often a database may be
written for one job.
Refuses to know: processes, and what ends a job.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from sqlalchemy import Engine

from app.database import unit_of_work
from app.domain.events import EventKind, Level
from app.domain.job_lifecycle import Stage
from app.jobs import service as jobs
from app.jobs.outcome import JobEvent
from app.work.lease import Lease

FLUSH_SECONDS = 0.5
# A trainer that says more than this between two writes loses the oldest lines, not the worker's memory.
MAX_BUFFERED = 5000
BATCH = 200
STAGES = {stage.value: stage for stage in (Stage.TRAINING, Stage.RECOVERING, Stage.GATING)}
METRICS = (
    "step", "total_steps", "train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy",
    "full_valid_loss", "full_valid_mean_token_accuracy", "learning_rate", "tokens_per_second", "grad_norm",
)  # fmt: skip


class Relay:
    """One job's line from trainer to database. Every write is fenced by the lease."""

    def __init__(self, engine: Engine, lease: Lease) -> None:
        self._engine = engine
        self._lease = lease
        self._events: deque[JobEvent] = deque(maxlen=MAX_BUFFERED)
        self._progress: dict[str, Any] | None = None
        self._stages: list[Stage] = []
        self._resolved: dict[str, Any] | None = None
        self._flushed_at = 0.0

    def take(self, message: dict[str, Any]) -> None:
        """Buffers one message; `flush` writes it."""
        match message["type"]:
            case "stage":
                if (stage := STAGES.get(str(message.get("stage")))) is not None:
                    self._stages.append(stage)
                    self._progress = None
            case "progress":
                self._take_progress(message)
            case "event":
                self._take_event(message)

    def flush(self, *, force: bool = False) -> None:
        """Writes what is buffered: a stage at once, the rest at most twice a second unless forced.

        Nothing is dropped when it raises.
        """
        due = force or bool(self._stages) or time.monotonic() - self._flushed_at >= FLUSH_SECONDS
        if not due or not (self._stages or self._progress or self._events or self._resolved):
            return
        self._flushed_at = time.monotonic()
        batch = [self._events[index] for index in range(min(BATCH, len(self._events)))]
        with unit_of_work(self._engine) as session:
            for stage in self._stages:
                jobs.set_stage(session, self._lease, stage)
            if self._resolved is not None:
                jobs.record_hyperparameters(session, self._lease, self._resolved)
            if self._progress is not None or batch:
                jobs.report_progress(session, self._lease, self._progress, batch)
        self._stages.clear()
        self._progress = self._resolved = None
        for _ in batch:
            self._events.popleft()
        if force and self._events:
            self.flush(force=True)

    def _take_progress(self, message: dict[str, Any]) -> None:
        values = {key: value for key, value in message.items() if key != "type"}
        step, total = values.get("step"), values.get("total_steps")
        if isinstance(step, int) and isinstance(total, int) and total > 0:
            values["percent"] = round(100 * step / total, 1)
        self._progress = values
        if isinstance(values.get("train_loss"), int | float):
            metrics = {name: values[name] for name in METRICS if values.get(name) is not None}
            text = f"Step {step}/{total}: training loss={values['train_loss']:.4f}"
            if isinstance(metrics.get("valid_loss"), int | float):
                text += f", validation loss={metrics['valid_loss']:.4f}"
            self._events.append(JobEvent(text, kind=EventKind.METRICS, data=metrics))

    def _take_event(self, message: dict[str, Any]) -> None:
        data = message.get("data")
        data = data if isinstance(data, dict) and data else None
        level = str(message.get("level"))
        known = Level(level) if level in {item.value for item in Level} else Level.INFO
        self._events.append(JobEvent(str(message.get("message", "")), level=known, data=data))
        resolved = (data or {}).get("hyperparameters")
        if isinstance(resolved, dict):
            self._resolved = resolved
