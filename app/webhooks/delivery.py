"""Sends what is due: many endpoints at once, few requests per endpoint, never waiting for the slowest.

Knows: the order of claim, send, settle, each database step a short transaction of its own.
Refuses to know: what an attempt's outcome means (`service.settle`) and how a request is made (`sender`).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable

import structlog
from sqlalchemy import Engine

from app.database import unit_of_work
from app.kit.clock import now
from app.settings import WebhookSettings
from app.webhooks import service, signing
from app.webhooks.sender import Answer, Sender
from app.webhooks.service import DueDelivery

log = structlog.get_logger(__name__)

PER_ENDPOINT = 4
IN_FLIGHT = 32


class Deliverer:
    """The delivery loop of one process. Any number of processes may run one each."""

    def __init__(self, engine: Engine, settings: WebhookSettings, sender: Sender | None = None) -> None:
        self._engine = engine
        self._settings = settings
        self._sender = sender or Sender(settings)
        self._busy: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, stop: Callable[[], bool]) -> None:
        """Until `stop` says so; requests on their way are finished."""
        while not stop():
            if not self._start_due():
                await asyncio.sleep(self._settings.poll_seconds)
            else:
                await asyncio.sleep(0.01)
        await self._finish()

    async def run_until_idle(self, seconds: float) -> int:
        """Fans out and sends until nothing is due, `seconds` at most; says how many attempts were made."""
        deadline, attempts = time.monotonic() + seconds, 0
        while time.monotonic() < deadline:
            started = self._start_due()
            attempts += started
            if not started and not self._tasks:
                break
            await asyncio.sleep(0.02)
        await self._finish()
        return attempts

    def _start_due(self) -> int:
        free = IN_FLIGHT - len(self._tasks)
        with unit_of_work(self._engine) as session:
            service.fan_out(session)
        if free <= 0:
            return 0
        with unit_of_work(self._engine) as session:
            due = service.claim_due(session, self._settings, limit=free, busy=[*+self._busy], per_endpoint=PER_ENDPOINT)
        for delivery in due:
            self._busy[delivery.endpoint_id] += 1
            task = asyncio.create_task(self._deliver(delivery))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return len(due)

    async def _deliver(self, due: DueDelivery) -> None:
        try:
            answer = await send(self._sender, due.url, due.secrets, due.message_id, due.body)
            with unit_of_work(self._engine) as session:
                service.settle(session, due, answer, self._settings)
        except Exception:
            # The claim runs out by itself and the delivery is tried again: nothing is lost, but it must be seen.
            log.exception("webhook.attempt_failed", delivery=due.id)
        finally:
            self._busy[due.endpoint_id] -= 1

    async def _finish(self) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks)


async def send(sender: Sender, url: str, secrets: tuple[str, ...], message_id: str, body: bytes) -> Answer:
    """One signed attempt; the timestamp is this attempt's."""
    return await sender.post(url, signing.headers(secrets, message_id, int(now()), body), body)
