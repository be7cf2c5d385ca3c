"""Keeps one lease alive in the background, and pulls the brake before it can be given away.

Knows: heartbeats, and this machine's monotonic clock: no confirmed heartbeat for `self_fence_seconds` means
that the lease may soon be somebody else's, so the trainer is killed without asking the database. The brake has a
thread of its own, because a heartbeat can hang in a network that swallows packets.
Refuses to know: what the work is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from app.database import unit_of_work
from app.settings import WorkerSettings
from app.work import service as work
from app.work.lease import Lease

log = structlog.get_logger(__name__)

RETRY_SECONDS = 1.0
BRAKE_SECONDS = 0.2
ENDING_SECONDS = 0.3
# A heartbeat that hangs cannot be interrupted; its daemon thread is left behind, the lease is over anyway.
JOIN_SECONDS = 20.0


class LeaseKeeper:
    """Two threads per lease. Its flags only ever go from False to True."""

    def __init__(self, engine: Engine, lease: Lease, settings: WorkerSettings, *, claimed_at: float) -> None:
        self.lease = lease
        self.lost = False
        self.cancel_requested = False
        self._engine = engine
        self._settings = settings
        self._confirmed_at = claimed_at
        self._on_lost: Callable[[], None] = lambda: None
        self._done = threading.Event()
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._renew, self._brake)]

    def __enter__(self) -> LeaseKeeper:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join(JOIN_SECONDS)

    def guard(self, on_lost: Callable[[], None]) -> None:
        """What to kill when the lease is lost; called at once if it already is."""
        self._on_lost = on_lost
        if self.lost:
            on_lost()

    def _renew(self) -> None:
        wait = self._settings.heartbeat_seconds
        while not self._done.wait(wait) and not self.lost:
            wait = self._settings.heartbeat_seconds if self._beat() else RETRY_SECONDS

    def _brake(self) -> None:
        while not self._done.wait(BRAKE_SECONDS) and not self.lost:
            if time.monotonic() - self._confirmed_at > self._settings.self_fence_seconds:
                log.error("lease.self_fenced", subject=self.lease.subject_id, fence=self.lease.fence)
                self._lose()

    def _beat(self) -> bool:
        # The time before the question counts: the lease runs from when the database answered it, or later.
        asked_at = time.monotonic()
        try:
            with unit_of_work(self._engine) as session:
                answer = work.heartbeat(session, self.lease)
        except (SQLAlchemyError, OSError) as error:
            log.warning("lease.heartbeat_failed", subject=self.lease.subject_id, error=type(error).__name__)
            return False
        if not answer.alive:
            # The holder itself may just have ended the claim; it says so in a moment.
            if self._done.wait(ENDING_SECONDS):
                return True
            log.warning("lease.taken_away", subject=self.lease.subject_id, fence=self.lease.fence)
            self._lose()
            return True
        self._confirmed_at = asked_at
        self.cancel_requested = self.cancel_requested or answer.cancel_requested
        return True

    def _lose(self) -> None:
        self.lost = True
        self._on_lost()
