"""Validates one uploaded file: fetch, read in a child with limits, write the verdict, wake the jobs that waited.

Knows: that a validator is fed by strangers and may die of it, and that its death is a verdict only when the file
caused it (memory, time), never when the machine did.
Refuses to know: the rules (`app.files.validation`).
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from app.database import unit_of_work
from app.errors import NotFound
from app.files import service as files
from app.files.service import ValidationPlan
from app.files.validation import failure_report
from app.jobs import service as jobs
from app.jobs.outcome import PlannedObject
from app.kit.ids import new_id
from app.settings import Settings
from app.storage import Storage
from app.tables.work import WorkKind
from app.work import service as work
from app.work.errors import LeaseLost
from app.work.lease import Lease
from workers.bridge import Fault, fetch
from workers.keeper import LeaseKeeper
from workers.leftovers import end_leftovers
from workers.scratch import folder_for, remove_litter
from workers.supervisor import Child, ChildPlan, Ending, RunEnd

log = structlog.get_logger(__name__)

Stop = Callable[[], bool]
MEMORY_LIMIT_BYTES = 2 << 30
TIME_LIMIT_SECONDS = 600.0


class Validator:
    """The loop of one process; one file at a time, in the main thread (its child dies with it)."""

    def __init__(self, engine: Engine, storage: Storage, settings: Settings) -> None:
        self._engine = engine
        self._storage = storage
        self._settings = settings
        self._owner = f"{socket.gethostname()}:side:{new_id('', 6)}"

    def run(self, stop: Stop) -> None:
        self.clean_up()
        while not stop():
            try:
                worked = self.run_next(stop)
            except SQLAlchemyError as error:
                log.warning("validator.database_away", error=type(error).__name__)
                worked = False
            if not worked:
                time.sleep(self._settings.worker.poll_seconds)

    def run_waiting(self, stop: Stop) -> int:
        count = 0
        while not stop() and self.run_next(stop):
            count += 1
        return count

    def run_next(self, stop: Stop) -> bool:
        """Claims one file and sees it through; False when none waits."""
        claimed_at = time.monotonic()
        seconds = self._settings.worker.lease_seconds
        with unit_of_work(self._engine) as session:
            lease = work.claim(session, self._owner, (WorkKind.VALIDATE,), lease_seconds=seconds)
        if lease is None:
            return False
        with (
            folder_for(self._settings, lease) as scratch,
            LeaseKeeper(self._engine, lease, self._settings.worker, claimed_at=claimed_at) as keeper,
        ):
            try:
                self._validate(lease, keeper, scratch, stop)
            except LeaseLost:
                log.warning("validation.lease_lost", file=lease.subject_id)
            except Exception:
                # The lease runs out by itself and the attempt counts, so this ends after a few tries.
                log.exception("validation.failed", file=lease.subject_id)
        return True

    def clean_up(self) -> None:
        """Ends validating children and removes folders that an earlier process left when it died."""
        end_leftovers(self._settings.home / "run" / "validators")
        remove_litter(self._engine, self._settings, WorkKind.VALIDATE)

    def _validate(self, lease: Lease, keeper: LeaseKeeper, scratch: Path, stop: Stop) -> None:
        try:
            with unit_of_work(self._engine) as session:
                plan = files.plan_validation(session, lease)
            end = self._read(plan, keeper, scratch, stop)
        except NotFound:
            self._end(lease, work.cancelled)  # deleted before anybody looked
            return
        except Fault as fault:
            self._retry(lease, fault)
            return
        if keeper.lost:
            raise LeaseLost(lease.work_id, lease.fence)
        if keeper.cancel_requested:
            self._end(lease, work.cancelled)
        elif end.ending is Ending.STOPPED:
            self._end(lease, work.hand_back)
        elif end.ending is Ending.RETRYABLE:
            self._retry(lease, Fault("system_validator_killed", "the validating process was killed", retryable=True))
        else:
            self._settle(lease, _report_of(end, scratch, plan))

    def _read(self, plan: ValidationPlan, keeper: LeaseKeeper, scratch: Path, stop: Stop) -> RunEnd:
        path, report = scratch / "dataset.jsonl", scratch / "report.json"
        fetch(self._storage, PlannedObject("dataset", plan.storage_key, plan.sha256), path)
        command = (sys.executable, "-P", "-m", "app.files.validation", str(path), str(report))
        child = Child.start(
            ChildPlan(
                command,
                folder=scratch,
                record=self._settings.home / "run" / "validators" / f"{scratch.name}.json",
                stage_timeout_seconds=TIME_LIMIT_SECONDS,
                grace_seconds=1.0,
                memory_limit_bytes=MEMORY_LIMIT_BYTES,
            )
        )
        keeper.guard(child.kill)
        try:
            while child.read() is not None:
                if keeper.lost or keeper.cancel_requested or stop():
                    child.stop()
        finally:
            keeper.guard(lambda: None)
            end = child.finish()
        return end

    def _settle(self, lease: Lease, report: Mapping[str, Any]) -> None:
        with unit_of_work(self._engine) as session:
            status = files.settle_validation(session, lease, report)
            work.complete(session, lease)
            moved = jobs.files_settled(session, lease.subject_id)
        log.info("file.validated", file=lease.subject_id, status=status.value, jobs_moved=len(moved))

    def _retry(self, lease: Lease, fault: Fault) -> None:
        log.warning("validation.fault", file=lease.subject_id, code=fault.error.code)
        with unit_of_work(self._engine) as session:
            backoff = self._settings.worker.backoff_seconds
            if fault.retryable and work.retry(session, lease, str(fault), backoff_seconds=backoff):
                return
            if not fault.retryable:
                work.fail(session, lease, str(fault))
            files.give_up(session, lease.subject_id, fault.error.message)
            jobs.files_settled(session, lease.subject_id)

    def _end(self, lease: Lease, act: Callable[[Session, Lease], None]) -> None:
        with unit_of_work(self._engine) as session:
            act(session, lease)


def _report_of(end: RunEnd, scratch: Path, plan: ValidationPlan) -> Mapping[str, Any]:
    """The validator's own report, or why there is none; a report about other bytes is none."""
    if end.ending is Ending.TIMED_OUT:
        return failure_report(f"it took longer than {TIME_LIMIT_SECONDS:.0f} s")
    if end.exit_code != 0:
        return failure_report(
            f"it needed more than {MEMORY_LIMIT_BYTES >> 30} GB of memory, or was malformed beyond reading"
        )
    report = json.loads((scratch / "report.json").read_text(encoding="utf-8"))
    if not isinstance(report, dict) or report.get("sha256", plan.sha256) != plan.sha256:
        return failure_report("the bytes that were read are not the ones that were uploaded")
    return report
