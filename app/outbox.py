"""The outbox: facts, written in the transaction that made them true.

Knows: that one row is a line of a job's timeline, the source of webhooks, or both; a fact without its row
(or a row without its fact) cannot exist.
Refuses to know: who listens (`app.webhooks`) and what the facts mean.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from app import doorbell
from app.domain.events import EventKind, Level, Topic
from app.kit.ids import new_id
from app.tables.events import Event

MESSAGE_LENGTH = 4000


def record(
    session: Session,
    *,
    project_id: str,
    subject_id: str,
    topic: Topic | None = None,
    kind: EventKind | None = None,
    level: Level | str = Level.INFO,
    message: str = "",
    data: dict[str, Any] | None = None,
) -> Event:
    """Adds one fact. `topic` sends it to webhook endpoints, `kind` shows it in the subject's timeline."""
    fact = Event(
        id=new_id("evt_"),
        project_id=project_id,
        subject_id=subject_id,
        topic=topic,
        kind=kind,
        level=Level(level),
        message=message[:MESSAGE_LENGTH],
        data=data,
    )
    session.add(fact)
    if topic is not None:
        doorbell.ring_after_commit(session, doorbell.Bell.WEBHOOKS)
    return fact
