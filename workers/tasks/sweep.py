"""Sweeps as a short Celery task, where a deployment runs side work in Celery.

Knows: that beat rings every few seconds and each sweep has its own pace. Refuses to know: what is swept.
"""

from app.doorbell import TaskName
from workers.celery_app import app, draining
from workers.runtime import runtime
from workers.sweeps import Sweep, run_due

_due: dict[Sweep, float] = {}


@app.task(
    name=TaskName.SWEEP.value,
    acks_late=True,
    reject_on_worker_lost=True,
    max_retries=5,
    soft_time_limit=45,
    time_limit=60,
)  # type: ignore[untyped-decorator]
def sweep() -> None:
    run_due(_due, draining, runtime().engine, runtime().storage, runtime().settings)
