"""Everything short: validation, webhooks, sweeps. A process of its own, so that none of it waits behind training.

Knows: that the three go on independently: a slow webhook receiver delays no validation, a large file no sweep.
Refuses to know: what each of them does.

    python -m workers.side
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import structlog
from sqlalchemy import Engine

from app import telemetry
from app.database import open_engine
from app.settings import Settings, get_settings
from app.storage import Storage, open_storage
from app.webhooks.delivery import Deliverer
from workers.draining import DrainSignal
from workers.sweeps import Sweep, run_due
from workers.validating import Validator

log = structlog.get_logger(__name__)

TICK_SECONDS = 0.5
PAUSE_AFTER_FAULT_SECONDS = 2.0
Stop = Callable[[], bool]


def run(engine: Engine, storage: Storage, settings: Settings, stop: Stop) -> None:
    """Until `stop` says so. Validation stays in the main thread, because its child dies with the thread."""
    log.info("side.started")
    threads = [
        threading.Thread(target=again, args=(deliver_webhooks, engine, settings, stop), name="webhooks"),
        threading.Thread(target=again, args=(sweep, engine, storage, settings, stop), name="sweeps"),
    ]
    for thread in threads:
        thread.start()
    again(Validator(engine, storage, settings).run, stop)
    for thread in threads:
        thread.join()
    log.info("side.stopped")


def again(loop: Callable[..., None], *arguments: object) -> None:
    """Keeps one loop going whatever it stumbles over; the last argument says when it is over."""
    stop = arguments[-1]
    assert callable(stop)
    while not stop():
        try:
            loop(*arguments)
        except Exception:
            log.exception("side.loop_failed", loop=getattr(loop, "__name__", "loop"))
            time.sleep(PAUSE_AFTER_FAULT_SECONDS)


def deliver_webhooks(engine: Engine, settings: Settings, stop: Stop) -> None:
    asyncio.run(Deliverer(engine, settings.webhooks).run(stop))


def sweep(engine: Engine, storage: Storage, settings: Settings, stop: Stop) -> None:
    due: dict[Sweep, float] = {}
    while not stop():
        run_due(due, stop, engine, storage, settings)
        time.sleep(TICK_SECONDS)


def main() -> None:
    settings = get_settings()
    telemetry.configure(settings.log_level)
    stop = DrainSignal()
    engine = open_engine(settings.resolved_database_url)
    run(engine, open_storage(settings), settings, stop)
    engine.dispose()


if __name__ == "__main__":
    main()
