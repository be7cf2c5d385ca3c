"""SQL of webhook endpoints and deliveries, and the outbox's unsent half.

Knows: that a delivery is made once per (endpoint, event), claimed for a while by whoever sends it, and
settled only by that claim.
Refuses to know: HTTP, signatures, schedules.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, TypeAlias, cast

from sqlalchemy import CursorResult, Row, Select, func, or_, select, update
from sqlalchemy.orm import Session

from app.database import db_now
from app.kit.pagination import Keyset, Page, fetch_page
from app.tables.events import Event
from app.tables.webhooks import DeliveryState, WebhookDelivery, WebhookEndpoint

AnyRow: TypeAlias = "Row[*tuple[Any, ...]]"


def endpoints_of(project_id: str) -> Select[WebhookEndpoint]:
    return select(WebhookEndpoint).where(WebhookEndpoint.project_id == project_id, WebhookEndpoint.deleted_at.is_(None))


def find_endpoint(session: Session, project_id: str, endpoint_id: str) -> WebhookEndpoint | None:
    return session.scalars(endpoints_of(project_id).where(WebhookEndpoint.id == endpoint_id)).one_or_none()


def page_of_endpoints(
    session: Session, project_id: str, *, cursor: tuple[float, str] | None, limit: int
) -> Page[WebhookEndpoint]:
    keyset = Keyset(WebhookEndpoint.created_at, WebhookEndpoint.id)
    return fetch_page(session, endpoints_of(project_id), keyset, cursor=cursor, limit=limit)


def count_endpoints(session: Session, project_id: str) -> int:
    return session.scalar(select(func.count()).select_from(endpoints_of(project_id).subquery())) or 0


def listeners(session: Session, project_id: str) -> Sequence[WebhookEndpoint]:
    return session.scalars(endpoints_of(project_id).where(WebhookEndpoint.disabled_at.is_(None))).all()


def unsent_events(session: Session, limit: int) -> Sequence[Event]:
    query = (
        select(Event)
        .where(Event.topic.is_not(None), Event.fanned_out_at.is_(None))
        .order_by(Event.seq)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    return session.scalars(query).all()


def mark_fanned_out(session: Session, seqs: Sequence[int]) -> None:
    session.execute(update(Event).where(Event.seq.in_(seqs)).values(fanned_out_at=db_now()))


def claim_due(
    session: Session, *, limit: int, busy: Collection[str], per_endpoint: int, claim_seconds: float
) -> Sequence[AnyRow]:
    """Takes up to `limit` deliveries whose time has come: few per endpoint, and none of those in `busy`, so that a
    slow endpoint delays nobody else."""
    candidate = _due(per_endpoint, busy)
    ids = session.scalars(
        select(candidate.c.id).order_by(candidate.c.place, candidate.c.next_attempt_at).limit(limit)
    ).all()
    if not ids:
        return []
    free = or_(WebhookDelivery.claimed_until.is_(None), WebhookDelivery.claimed_until < db_now())
    locked = session.scalars(
        select(WebhookDelivery.id)
        .where(WebhookDelivery.id.in_(ids), WebhookDelivery.state == DeliveryState.PENDING, free)
        .with_for_update(skip_locked=True)
    ).all()
    claimed = session.execute(
        update(WebhookDelivery)
        .where(WebhookDelivery.id.in_(locked))
        .values(claimed_until=db_now() + claim_seconds)
        .returning(WebhookDelivery.id, WebhookDelivery.claimed_until)
        .execution_options(synchronize_session=False)
    ).all()
    return [row for delivery_id, token in claimed if (row := _loaded(session, delivery_id, token)) is not None]


def _due(per_endpoint: int, excluded: Collection[str]) -> Any:
    place = func.row_number().over(partition_by=WebhookDelivery.endpoint_id, order_by=WebhookDelivery.next_attempt_at)
    due = (
        select(WebhookDelivery.id, WebhookDelivery.next_attempt_at, place.label("place"))
        .where(
            WebhookDelivery.state == DeliveryState.PENDING,
            WebhookDelivery.next_attempt_at <= db_now(),
            or_(WebhookDelivery.claimed_until.is_(None), WebhookDelivery.claimed_until < db_now()),
            WebhookDelivery.endpoint_id.not_in(excluded),
        )
        .subquery()
    )
    return select(due).where(due.c.place <= per_endpoint).subquery()


def _loaded(session: Session, delivery_id: str, token: float | None) -> AnyRow | None:
    query = (
        select(WebhookDelivery, WebhookEndpoint, Event)
        .join(WebhookEndpoint, WebhookEndpoint.id == WebhookDelivery.endpoint_id)
        .join(Event, Event.id == WebhookDelivery.event_id)
        .where(WebhookDelivery.id == delivery_id, WebhookDelivery.claimed_until == token)
        .execution_options(populate_existing=True)
    )
    return session.execute(query).one_or_none()


def settle_claimed(session: Session, delivery_id: str, claimed_until: float, **values: Any) -> bool:
    """False when the claim ran out and somebody else took the delivery: their outcome counts."""
    statement = (
        update(WebhookDelivery)
        .where(WebhookDelivery.id == delivery_id, WebhookDelivery.claimed_until == claimed_until)
        .values(claimed_until=None, **values)
        .execution_options(synchronize_session=False)
    )
    return cast("CursorResult[Any]", session.execute(statement)).rowcount == 1


def mark_failing(session: Session, endpoint_id: str) -> float:
    """Remembers since when every attempt failed; returns how many seconds that is."""
    statement = (
        update(WebhookEndpoint)
        .where(WebhookEndpoint.id == endpoint_id)
        .values(failing_since=func.coalesce(WebhookEndpoint.failing_since, db_now()))
        .returning(db_now() - WebhookEndpoint.failing_since)
        .execution_options(synchronize_session=False)
    )
    return float(session.execute(statement).scalar_one())


def mark_working(session: Session, endpoint_id: str) -> None:
    session.execute(
        update(WebhookEndpoint)
        .where(WebhookEndpoint.id == endpoint_id, WebhookEndpoint.failing_since.is_not(None))
        .values(failing_since=None)
    )


def disable(session: Session, endpoint_id: str) -> bool:
    """True for the one caller that switched the endpoint off. What waited for it is failed, to be replayed later."""
    statement = (
        update(WebhookEndpoint)
        .where(WebhookEndpoint.id == endpoint_id, WebhookEndpoint.disabled_at.is_(None))
        .values(disabled_at=db_now())
        .execution_options(synchronize_session=False)
    )
    if cast("CursorResult[Any]", session.execute(statement)).rowcount != 1:
        return False
    drop_pending(session, endpoint_id)
    return True


def drop_pending(session: Session, endpoint_id: str) -> None:
    session.execute(
        update(WebhookDelivery)
        .where(WebhookDelivery.endpoint_id == endpoint_id, WebhookDelivery.state == DeliveryState.PENDING)
        .values(state=DeliveryState.FAILED, next_attempt_at=None, claimed_until=None)
    )


def find_delivery(session: Session, project_id: str, delivery_id: str) -> WebhookDelivery | None:
    query = _deliveries(project_id).where(WebhookDelivery.id == delivery_id)
    return session.scalars(query).one_or_none()


def page_of_deliveries(
    session: Session, endpoint_id: str, *, cursor: tuple[float, str] | None, limit: int
) -> Page[WebhookDelivery]:
    keyset = Keyset(WebhookDelivery.created_at, WebhookDelivery.id)
    query = select(WebhookDelivery).where(WebhookDelivery.endpoint_id == endpoint_id)
    return fetch_page(session, query, keyset, cursor=cursor, limit=limit)


def topics(session: Session, event_ids: Sequence[str]) -> dict[str, str]:
    rows = session.execute(select(Event.id, Event.topic).where(Event.id.in_(event_ids))).all()
    return {event_id: topic or "" for event_id, topic in rows}


def requeue(session: Session, endpoint_id: str, **where: Any) -> int:
    """Makes settled deliveries pending again: one by `delivery_id`, or a range by `state`, `since`, `until`."""
    statement = update(WebhookDelivery).where(WebhookDelivery.endpoint_id == endpoint_id)
    statement = statement.where(WebhookDelivery.state != DeliveryState.PENDING)
    if (delivery_id := where.get("delivery_id")) is not None:
        statement = statement.where(WebhookDelivery.id == delivery_id)
    if (state := where.get("state")) is not None:
        statement = statement.where(WebhookDelivery.state == state)
    if (since := where.get("since")) is not None:
        statement = statement.where(WebhookDelivery.created_at >= since)
    if (until := where.get("until")) is not None:
        statement = statement.where(WebhookDelivery.created_at <= until)
    statement = statement.values(state=DeliveryState.PENDING, next_attempt_at=db_now(), claimed_until=None)
    result = session.execute(statement.execution_options(synchronize_session=False))
    return cast("CursorResult[Any]", result).rowcount


def _deliveries(project_id: str) -> Select[WebhookDelivery]:
    return (
        select(WebhookDelivery)
        .join(WebhookEndpoint, WebhookEndpoint.id == WebhookDelivery.endpoint_id)
        .where(WebhookEndpoint.project_id == project_id, WebhookEndpoint.deleted_at.is_(None))
    )
