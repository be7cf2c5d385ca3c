"""One claimed job from start to settlement: what happens under a single lease.

Knows: the order lay out, train, package, settle; and each way it can be cut short.
Refuses to know: which job comes next (`agent`) and how heartbeats travel (`keeper`).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from app.database import unit_of_work
from app.domain.job_lifecycle import TERMINAL, JobStatus, Stage
from app.errors import ServiceError
from app.jobs import service as jobs
from app.jobs.outcome import JobOutcome, JobPlan
from app.settings import Settings
from app.storage import Storage
from app.work import service as work
from app.work.errors import LeaseLost
from workers.bridge import Fault, lay_out
from workers.keeper import LeaseKeeper
from workers.packaging import FinishedRun, package
from workers.relay import Relay
from workers.supervisor import (
    Child,
    ChildPlan,
    Ending,
    RunEnd,
    recorded_environment,
    threads_per_child,
    trainer_command,
)

log = structlog.get_logger(__name__)

Result = TypeVar("Result")
DATABASE_AWAY = (OperationalError, InterfaceError, PoolTimeout)
KEPT_LOGS = 50


class Reason(StrEnum):
    """Why a run stops before its end."""

    LOST = "lost"
    CANCELLED = "cancelled"
    DRAINING = "draining"


class Interrupted(Exception):
    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


class JobRun:
    """Everything done for one lease. `drain` says that the worker is asked to leave."""

    def __init__(
        self,
        engine: Engine,
        storage: Storage,
        settings: Settings,
        keeper: LeaseKeeper,
        *,
        scratch: Path,
        drain: Callable[[], bool],
    ) -> None:
        self._engine = engine
        self._storage = storage
        self._settings = settings
        self._keeper = keeper
        self._lease = keeper.lease
        self._scratch = scratch
        self._drain = drain

    def perform(self) -> None:
        """Runs the job and writes what became of it; a zombie writes nothing."""
        try:
            self._conclude(self._outcome)
        except LeaseLost:
            log.warning("job.lease_lost")
        except Exception:
            # The lease runs out by itself; the attempt counts, so a job that cannot be settled ends as dead.
            log.exception("job.not_settled")

    def _conclude(self, produce: Callable[[], JobOutcome]) -> None:
        try:
            outcome = produce()
        except Interrupted as interrupted:
            self._interrupted(interrupted.reason)
        except Fault as fault:
            self._failed(fault)
        except LeaseLost:
            raise
        except Exception as error:
            log.exception("job.worker_fault")
            detail = type(error).__name__
            self._failed(Fault("system_error", "The worker failed.", retryable=True, detail=detail))
        else:
            self._settle(outcome)

    def _outcome(self) -> JobOutcome:
        plan = self._start()
        log.info("job.started", attempt=self._lease.attempt)
        self._scratch.mkdir(parents=True, mode=0o700)
        lay_out(plan, self._storage, self._scratch, tick=self._tick)
        child_plan = self._child_plan()
        end = self._supervise(child_plan)
        if end.ending is not Ending.DONE:
            self._keep_log()
            raise self._fault_of(end)
        self._write(lambda session: jobs.set_stage(session, self._lease, Stage.PACKAGING))
        run = FinishedRun(self._scratch, end.result or {}, recorded_environment(child_plan))
        # No drain from here on: what is left takes seconds, and doing the training again takes more.
        return package(plan, run, self._storage, fence=self._lease.fence, tick=self._tick_packaging)

    def _start(self) -> JobPlan:
        try:
            return self._write(lambda session: jobs.start(session, self._lease))
        except LeaseLost:
            raise
        except ServiceError as error:
            raise Fault(f"system_{error.code}", error.message, retryable=error.retryable) from error

    def _child_plan(self) -> ChildPlan:
        worker = self._settings.worker
        return ChildPlan(
            command=trainer_command(worker.trainer_command, self._scratch),
            folder=self._scratch,
            record=self._settings.home / "run" / "trainers" / f"{self._scratch.name}.json",
            threads=threads_per_child(worker.slots),
            stage_timeout_seconds=worker.stage_timeout_seconds,
            grace_seconds=worker.cancel_grace_seconds,
            memory_limit_bytes=worker.memory_limit_bytes,
        )

    def _supervise(self, plan: ChildPlan) -> RunEnd:
        relay = Relay(self._engine, self._lease)
        child = Child.start(plan)
        self._keeper.guard(child.kill)
        reason: Reason | None = None
        try:
            while (messages := child.read()) is not None:
                for message in messages:
                    relay.take(message)
                self._flush(relay)
                reason = reason or self._why_stop()
                if reason is Reason.LOST:
                    child.kill()
                elif reason is not None:
                    child.stop()
        finally:
            self._keeper.guard(lambda: None)
            end = child.finish()
        # The brake may have been pulled after the last look: then the child's end says nothing about the job.
        if self._keeper.lost or self._keeper.cancel_requested:
            reason = self._why_stop()
        if reason in {Reason.LOST, Reason.CANCELLED} or (reason and end.ending is Ending.STOPPED):
            raise Interrupted(reason)
        self._persist(lambda: relay.flush(force=True))
        return end

    def _flush(self, relay: Relay) -> None:
        try:
            relay.flush()
        except DATABASE_AWAY as error:
            log.warning("job.progress_waits", error=type(error).__name__)

    def _why_stop(self) -> Reason | None:
        if self._keeper.lost:
            return Reason.LOST
        if self._keeper.cancel_requested:
            return Reason.CANCELLED
        return Reason.DRAINING if self._drain() else None

    def _tick(self) -> None:
        reason = self._why_stop()
        if reason is not None:
            raise Interrupted(reason)

    def _tick_packaging(self) -> None:
        reason = self._why_stop()
        if reason in {Reason.LOST, Reason.CANCELLED}:
            raise Interrupted(reason)

    def _fault_of(self, end: RunEnd) -> Fault:
        error = end.error or {}
        said = str(error.get("message") or "")
        # What a bug or a broken machine says of itself was not written for customers.
        fit = bool(said) and end.ending in {Ending.USER_ERROR, Ending.TIMED_OUT}
        return Fault(
            str(error.get("code") or "system_error"),
            said if fit else "The training failed; the fault is the service's.",
            param=str(error["param"]) if error.get("param") else None,
            retryable=end.ending in {Ending.RETRYABLE, Ending.STOPPED},
            detail="" if fit else said,
        )

    def _settle(self, outcome: JobOutcome) -> None:
        def settle(session: Session) -> JobStatus:
            status = jobs.settle(session, self._lease, outcome)
            if status is JobStatus.CANCELLED:
                work.cancelled(session, self._lease)
            else:
                work.complete(session, self._lease)
            return status

        log.info("job.settled", status=self._write(settle).value)

    def _failed(self, fault: Fault) -> None:
        log.warning("job.fault", code=fault.error.code, message=str(fault), retryable=fault.retryable)
        if not fault.retryable:
            self._settle(JobOutcome(error=fault.error))
            return

        def give_back(session: Session) -> JobStatus:
            backoff = self._settings.worker.backoff_seconds
            if work.retry(session, self._lease, str(fault), backoff_seconds=backoff):
                return self._requeue(session)
            return jobs.finish_dead(session, self._lease.subject_id)

        self._write(give_back)

    def _interrupted(self, reason: Reason) -> None:
        log.info("job.interrupted", reason=reason.value)
        if reason is Reason.CANCELLED:
            self._settle(JobOutcome(cancelled=True))
        elif reason is Reason.DRAINING:

            def hand_back(session: Session) -> None:
                work.hand_back(session, self._lease)
                self._requeue(session)

            self._write(hand_back)

    def _requeue(self, session: Session) -> JobStatus:
        """The item is in the queue again; it leaves it when the job was cancelled, or ended otherwise, meanwhile."""
        status = jobs.requeue(session, self._lease.subject_id)
        if status in TERMINAL:
            work.request_cancel(session, self._lease.kind, self._lease.subject_id)
        return status

    def _write(self, act: Callable[[Session], Result]) -> Result:
        def in_transaction() -> Result:
            with unit_of_work(self._engine) as session:
                return act(session)

        return self._persist(in_transaction)

    def _persist(self, act: Callable[[], Result]) -> Result:
        """Tries again while the database is away and the lease may still be ours."""
        while not self._keeper.lost:
            try:
                return act()
            except DATABASE_AWAY as error:
                log.warning("job.database_away", error=type(error).__name__)
                time.sleep(1.0)
        raise LeaseLost(self._lease.work_id, self._lease.fence)

    def _keep_log(self) -> None:
        """The end of a failed trainer's stderr, for the operator on this machine; the newest few."""
        source = self._scratch / "trainer.log"
        folder = self._settings.home / "logs" / "trainers"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if source.exists():
            shutil.copyfile(source, folder / f"{self._scratch.name}.log")
        kept = sorted(folder.glob("*.log"), key=lambda path: path.stat().st_mtime, reverse=True)
        for old in kept[KEPT_LOGS:]:
            old.unlink(missing_ok=True)
