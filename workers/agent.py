"""The loop that both sizes run: claim, supervise, publish. One agent has one trainer at a time.

Knows: what a worker owes its lease: stop when it is lost, when the customer cancels, when the machine drains;
write only under the fence; leave nothing behind.
Refuses to know: how the pipeline works, and how a claim is won.

    python -m workers.agent
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from app import telemetry
from app.database import open_engine, unit_of_work
from app.kit.ids import new_id
from app.settings import Settings, get_settings
from app.storage import Storage, open_storage
from app.tables.work import WorkKind
from app.work import service as work
from workers.draining import DrainSignal
from workers.keeper import LeaseKeeper
from workers.leftovers import end_leftovers
from workers.reaper import reap
from workers.run import JobRun
from workers.scratch import folder_for, remove_litter

log = structlog.get_logger(__name__)

Stop = Callable[[], bool]
KINDS = (WorkKind.TUNE,)


class Agent:
    """One worker. `owner` is its name in leases and logs."""

    def __init__(self, engine: Engine, storage: Storage, settings: Settings) -> None:
        self.engine = engine
        self.storage = storage
        self.settings = settings
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{new_id('', 6)}"
        self._reaped_at = 0.0

    def run(self, stop: Stop) -> None:
        """Works until `stop` says so. A database that is away is waited for."""
        log.info("agent.started", owner=self.owner)
        self.clean_up()
        while not stop():
            try:
                self._reap_if_due()
                worked = self.run_next(stop)
            except SQLAlchemyError as error:
                log.warning("agent.database_away", error=type(error).__name__)
                worked = False
            if not worked:
                time.sleep(self.settings.worker.poll_seconds)
        log.info("agent.stopped", owner=self.owner)

    def run_waiting(self, stop: Stop) -> int:
        """Works until nothing waits: what a ring of the doorbell means. Says how many items that were."""
        count = 0
        while not stop() and self.run_next(stop):
            count += 1
        return count

    def run_next(self, stop: Stop) -> bool:
        """Claims one item and sees it through; False when nothing waits."""
        claimed_at = time.monotonic()
        with unit_of_work(self.engine) as session:
            lease = work.claim(session, self.owner, KINDS, lease_seconds=self.settings.worker.lease_seconds)
        if lease is None:
            return False
        with (
            structlog.contextvars.bound_contextvars(job=lease.subject_id, fence=lease.fence),
            folder_for(self.settings, lease) as scratch,
            LeaseKeeper(self.engine, lease, self.settings.worker, claimed_at=claimed_at) as keeper,
        ):
            JobRun(self.engine, self.storage, self.settings, keeper, scratch=scratch, drain=stop).perform()
        return True

    def clean_up(self) -> None:
        """Ends trainers and removes folders that earlier workers left when they died."""
        end_leftovers(records_folder(self.settings))
        remove_litter(self.engine, self.settings, WorkKind.TUNE)

    def _reap_if_due(self) -> None:
        if time.monotonic() - self._reaped_at >= self.settings.worker.reap_seconds:
            self._reaped_at = time.monotonic()
            reap(self.engine, self.settings.worker)


def records_folder(settings: Settings) -> Path:
    return settings.home / "run" / "trainers"


def main() -> None:
    settings = get_settings()
    telemetry.configure(settings.log_level)
    stop = DrainSignal()
    engine = open_engine(settings.resolved_database_url)
    Agent(engine, open_storage(settings), settings).run(stop)
    engine.dispose()


if __name__ == "__main__":
    main()
