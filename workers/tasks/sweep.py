"""Sweeps as a short Celery task, where a deployment runs side work in Celery.

Knows: that beat rings every few seconds and each sweep has its own pace. Refuses to know: what is swept.
"""

import time

from app.doorbell import TaskName
from workers.celery_app import app
from workers.runtime import runtime
from workers.sweeps import SCHEDULE

_last: dict[object, float] = {}


@app.task(
    name=TaskName.SWEEP.value,
    acks_late=True,
    reject_on_worker_lost=True,
    max_retries=5,
    soft_time_limit=45,
    time_limit=60,
)  # type: ignore[untyped-decorator]
def sweep() -> None:
    for task, interval in SCHEDULE.items():
        if time.monotonic() - _last.get(task, float("-inf")) >= interval:
            _last[task] = time.monotonic()
            task(runtime().engine, runtime().storage, runtime().settings)
