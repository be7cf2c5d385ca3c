"""Work items: enqueue, claim, keep, give back, take away. Written once for every kind of work.

Knows: the rules of a lease (docs/decisions/0002): a claim raises the attempt, so that any kind of death
counts; only the current fence may write; whoever finds an expired lease may take it away.
Refuses to know: jobs and files. The caller moves those in the same transaction.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy.orm import Session

from app import doorbell
from app.database import db_now
from app.kit.ids import new_id
from app.settings import get_settings
from app.tables.work import WorkItem, WorkKind, WorkState
from app.work import repository
from app.work.errors import LeaseLost
from app.work.lease import (
    BACKOFF_SECONDS,
    CANCEL_PATIENCE_SECONDS,
    LEASE_SECONDS,
    HeartbeatAnswer,
    Lease,
    ReapedItem,
    ReapOutcome,
)

BELLS = {WorkKind.TUNE: doorbell.Bell.TUNING, WorkKind.VALIDATE: doorbell.Bell.VALIDATION}
REAP_BATCH = 100
ERROR_LENGTH = 2000


def enqueue(
    session: Session,
    kind: WorkKind,
    subject_id: str,
    project_id: str,
    *,
    priority: int = 0,
    max_attempts: int | None = None,
) -> None:
    """Makes one item of this kind for the subject claimable, and rings after the commit.

    An item that ended (a resumed job, a file to be validated again) is queued anew; a live one is left alone.
    """
    max_attempts = max_attempts or get_settings().worker.max_attempts
    existing = repository.find(session, kind, subject_id)
    if existing is not None:
        repository.requeue_ended(session, existing, priority=priority, max_attempts=max_attempts)
    else:
        session.add(
            WorkItem(
                id=new_id("work_"),
                kind=kind,
                subject_id=subject_id,
                project_id=project_id,
                priority=priority,
                max_attempts=max_attempts,
                next_run_at=db_now(),
            )
        )
        session.flush()
    doorbell.ring_after_commit(session, BELLS[kind])


def claim(
    session: Session, owner: str, kinds: Sequence[WorkKind], *, lease_seconds: float = LEASE_SECONDS
) -> Lease | None:
    """The next item in line, now held by `owner`; None when nothing waits."""
    row = repository.claim(session, owner, kinds, lease_seconds)
    if row is None:
        return None
    return Lease(
        work_id=row.id,
        kind=row.kind,
        subject_id=row.subject_id,
        fence=row.fence,
        owner=owner,
        attempt=row.attempt,
        lease_seconds=lease_seconds,
    )


def heartbeat(session: Session, lease: Lease) -> HeartbeatAnswer:
    """Renews the lease and carries a customer's cancel back."""
    row = repository.renew(session, lease)
    if row is None:
        return HeartbeatAnswer(alive=False, cancel_requested=False)
    return HeartbeatAnswer(alive=True, cancel_requested=row.cancel_requested_at is not None)


def holds(session: Session, lease: Lease) -> bool:
    """Whether the lease is current; stays true until the transaction ends."""
    return repository.holds(session, lease)


def require(session: Session, lease: Lease) -> None:
    """Raises `LeaseLost` unless the lease is current."""
    if not repository.holds(session, lease):
        raise LeaseLost(lease.work_id, lease.fence)


def is_current(session: Session, kind: WorkKind, subject_id: str, fence: int) -> bool:
    """Whether somebody works on the subject under exactly this fence; anything left by another fence is litter."""
    item = repository.find(session, kind, subject_id)
    return item is not None and item.state is WorkState.RUNNING and item.fence == fence


def complete(session: Session, lease: Lease) -> None:
    _release(session, lease, WorkState.DONE)


def cancelled(session: Session, lease: Lease) -> None:
    """The holder stopped because it was asked to."""
    _release(session, lease, WorkState.CANCELLED)


def fail(session: Session, lease: Lease, error: str) -> None:
    """Ends the item without another attempt."""
    _release(session, lease, WorkState.DEAD, last_error=error[:ERROR_LENGTH])


def retry(
    session: Session, lease: Lease, error: str, *, counted: bool = True, backoff_seconds: float = BACKOFF_SECONDS
) -> bool:
    """Puts the item back after a fault of ours. False when its attempts are used up: then it is dead."""
    item = repository.find(session, lease.kind, lease.subject_id)
    if item is None:
        raise LeaseLost(lease.work_id, lease.fence)
    message = error[:ERROR_LENGTH]
    if counted and lease.attempt >= item.max_attempts:
        _release(session, lease, WorkState.DEAD, last_error=message)
        return False
    wait = backoff(lease.attempt, backoff_seconds) if counted else 0.0
    attempt = lease.attempt if counted else lease.attempt - 1
    _release(session, lease, WorkState.QUEUED, last_error=message, attempt=attempt, next_run_at=db_now() + wait)
    return True


def hand_back(session: Session, lease: Lease) -> None:
    """A draining worker returns what it holds; the attempt does not count, and the next worker may start at once."""
    _release(session, lease, WorkState.QUEUED, attempt=lease.attempt - 1, next_run_at=db_now())
    doorbell.ring_after_commit(session, BELLS[lease.kind])


def request_cancel(session: Session, kind: WorkKind, subject_id: str) -> bool:
    """Nobody holds it: cancelled here and now (False). Held: the holder is asked by its next heartbeat (True)."""
    if repository.cancel_queued(session, kind, subject_id):
        return False
    return repository.mark_cancel(session, kind, subject_id)


def reap(
    session: Session,
    *,
    backoff_seconds: float = BACKOFF_SECONDS,
    cancel_patience_seconds: float = CANCEL_PATIENCE_SECONDS,
) -> list[ReapedItem]:
    """Takes away what nobody keeps alive. Any process may call it at any time; the caller moves the subjects."""
    reaped = []
    for row in repository.abandoned(session, cancel_patience_seconds, REAP_BATCH):
        error = f"worker {row.owner} stopped renewing its lease (attempt {row.attempt} of {row.max_attempts})"
        values: dict[str, object] = {"last_error": error[:ERROR_LENGTH]}
        if row.cancel_requested_at is not None:
            state, outcome = WorkState.CANCELLED, ReapOutcome.CANCELLED
        elif row.attempt >= row.max_attempts:
            state, outcome = WorkState.DEAD, ReapOutcome.DEAD
        else:
            state, outcome = WorkState.QUEUED, ReapOutcome.QUEUED
            values["next_run_at"] = db_now() + backoff(row.attempt, backoff_seconds)
        if repository.seize(session, row.id, row.fence, state, **values):
            reaped.append(ReapedItem(row.id, row.kind, row.subject_id, outcome, error))
    return reaped


def ring_for_waiting(session: Session, *, older_than_seconds: float = 5.0) -> list[doorbell.Bell]:
    """The reconciler: rings again for items that wait although somebody should have come for them."""
    late = [bell for kind, bell in BELLS.items() if repository.count_waiting(session, [kind], older_than_seconds) > 0]
    for bell in late:
        doorbell.ring_after_commit(session, bell)
    return late


def backoff(attempt: int, base_seconds: float) -> float:
    """30 s, 60 s, 120 s for the defaults."""
    return float(base_seconds * 2 ** max(0, attempt - 1))


def _release(session: Session, lease: Lease, state: WorkState, **values: object) -> None:
    if not repository.release(session, lease, state, **values):
        raise LeaseLost(lease.work_id, lease.fence)
