"""Webhooks as a short Celery task, where a deployment runs side work in Celery.

Knows: the time one task may take. Refuses to know: deliveries; doing it twice is harmless.
"""

import asyncio

from app.doorbell import TaskName
from app.webhooks.delivery import Deliverer
from workers.celery_app import app
from workers.runtime import runtime

SECONDS = 20.0


@app.task(
    name=TaskName.WEBHOOKS.value,
    acks_late=True,
    reject_on_worker_lost=True,
    max_retries=5,
    soft_time_limit=45,
    time_limit=60,
)  # type: ignore[untyped-decorator]
def webhooks() -> None:
    asyncio.run(Deliverer(runtime().engine, runtime().settings.webhooks).run_until_idle(SECONDS))
