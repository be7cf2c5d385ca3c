"""SQL of the work table: the only place where a lease is won, renewed or taken away.

Knows: compare-and-set. Every write names the state, owner and fence it expects; rowcount 0 means that the
caller is a zombie. Times are the database's (`db_now`), so that no worker's clock matters.
Refuses to know: what the work is, and what a lost lease means to its holder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, cast

from sqlalchemy import CursorResult, Row, Select, and_, func, or_, select, update
from sqlalchemy.orm import Session, aliased

from app.database import db_now
from app.tables.work import WorkItem, WorkKind, WorkState
from app.work.lease import Lease

AnyRow: TypeAlias = "Row[*tuple[Any, ...]]"


def find(session: Session, kind: WorkKind, subject_id: str) -> WorkItem | None:
    query = select(WorkItem).where(WorkItem.kind == kind, WorkItem.subject_id == subject_id)
    return session.scalars(query.execution_options(populate_existing=True)).one_or_none()


def requeue_ended(session: Session, item: WorkItem, *, priority: int, max_attempts: int) -> bool:
    """Puts an item that already ended back in the queue; its fence stays, so that old holders stay refused."""
    ended = (WorkState.DONE, WorkState.DEAD, WorkState.CANCELLED)
    return _changed(
        session,
        update(WorkItem)
        .where(WorkItem.id == item.id, WorkItem.state.in_(ended))
        .values(
            state=WorkState.QUEUED,
            attempt=0,
            priority=priority,
            max_attempts=max_attempts,
            next_run_at=db_now(),
            cancel_requested_at=None,
            last_error=None,
        ),
    )


def claim(session: Session, owner: str, kinds: Sequence[WorkKind], lease_seconds: float) -> AnyRow | None:
    """One statement: choose, lock, raise the fence, take. Two claimers never get the same row."""
    statement = (
        update(WorkItem)
        .where(WorkItem.id == _next_in_line(kinds).scalar_subquery(), WorkItem.state == WorkState.QUEUED)
        .values(
            state=WorkState.RUNNING,
            fence=WorkItem.fence + 1,
            attempt=WorkItem.attempt + 1,
            owner=owner,
            lease_until=db_now() + lease_seconds,
        )
        .returning(WorkItem.id, WorkItem.kind, WorkItem.subject_id, WorkItem.fence, WorkItem.attempt)
        .execution_options(synchronize_session=False)
    )
    return session.execute(statement).one_or_none()


def _next_in_line(kinds: Sequence[WorkKind]) -> Select[str]:
    """The project with the fewest running items goes first, then priority, then age."""
    running = (
        select(WorkItem.project_id, func.count().label("count"))
        .where(WorkItem.state == WorkState.RUNNING, WorkItem.kind.in_(kinds))
        .group_by(WorkItem.project_id)
        .subquery()
    )
    item = aliased(WorkItem)
    return (
        select(item.id)
        .outerjoin(running, running.c.project_id == item.project_id)
        .where(item.state == WorkState.QUEUED, item.kind.in_(kinds), item.next_run_at <= db_now())
        .order_by(func.coalesce(running.c.count, 0), item.priority.desc(), item.created_at, item.id)
        .limit(1)
        .with_for_update(of=item, skip_locked=True)
    )


def renew(session: Session, lease: Lease) -> AnyRow | None:
    statement = (
        update(WorkItem)
        .where(_held(lease))
        .values(lease_until=db_now() + lease.lease_seconds)
        .returning(WorkItem.cancel_requested_at)
        .execution_options(synchronize_session=False)
    )
    return session.execute(statement).one_or_none()


def holds(session: Session, lease: Lease) -> bool:
    """Locks the row on PostgreSQL, so that the answer stays true until the transaction ends."""
    return session.scalar(select(WorkItem.id).where(_held(lease)).with_for_update()) is not None


def release(session: Session, lease: Lease, state: WorkState, **values: Any) -> bool:
    """Ends the claim by moving the item to `state`; False when the claim was not held any more."""
    statement = update(WorkItem).where(_held(lease)).values(state=state, owner=None, lease_until=None, **values)
    return _changed(session, statement)


def mark_cancel(session: Session, kind: WorkKind, subject_id: str) -> bool:
    """Asks the holder to stop. The first request's time stands."""
    statement = (
        update(WorkItem)
        .where(WorkItem.kind == kind, WorkItem.subject_id == subject_id, WorkItem.state == WorkState.RUNNING)
        .values(cancel_requested_at=func.coalesce(WorkItem.cancel_requested_at, db_now()))
    )
    return _changed(session, statement)


def cancel_queued(session: Session, kind: WorkKind, subject_id: str) -> bool:
    statement = (
        update(WorkItem)
        .where(WorkItem.kind == kind, WorkItem.subject_id == subject_id, WorkItem.state == WorkState.QUEUED)
        .values(state=WorkState.CANCELLED, cancel_requested_at=db_now(), fence=WorkItem.fence + 1)
    )
    return _changed(session, statement)


def abandoned(session: Session, cancel_patience_seconds: float, limit: int) -> Sequence[AnyRow]:
    """Running items whose lease ended, or whose holder did not honour a cancel in time; locked for us."""
    overdue = WorkItem.cancel_requested_at + cancel_patience_seconds < db_now()
    query = (
        select(
            WorkItem.id,
            WorkItem.kind,
            WorkItem.subject_id,
            WorkItem.fence,
            WorkItem.attempt,
            WorkItem.max_attempts,
            WorkItem.owner,
            WorkItem.cancel_requested_at,
        )
        .where(WorkItem.state == WorkState.RUNNING, or_(WorkItem.lease_until < db_now(), overdue))
        .order_by(WorkItem.lease_until)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    return session.execute(query).all()


def seize(session: Session, work_id: str, fence: int, state: WorkState, **values: Any) -> bool:
    """Takes an item from its holder: the fence rises, and whatever the holder writes later changes nothing."""
    statement = (
        update(WorkItem)
        .where(WorkItem.id == work_id, WorkItem.fence == fence, WorkItem.state == WorkState.RUNNING)
        .values(state=state, fence=WorkItem.fence + 1, owner=None, lease_until=None, **values)
    )
    return _changed(session, statement)


def count_waiting(session: Session, kinds: Sequence[WorkKind], older_than_seconds: float) -> int:
    query = select(func.count()).where(
        WorkItem.state == WorkState.QUEUED,
        WorkItem.kind.in_(kinds),
        WorkItem.next_run_at + older_than_seconds <= db_now(),
    )
    return session.scalar(query) or 0


def _held(lease: Lease) -> Any:
    return and_(
        WorkItem.id == lease.work_id,
        WorkItem.fence == lease.fence,
        WorkItem.owner == lease.owner,
        WorkItem.state == WorkState.RUNNING,
    )


def _changed(session: Session, statement: Any) -> bool:
    result = session.execute(statement.execution_options(synchronize_session=False))
    return cast("CursorResult[Any]", result).rowcount == 1
