"""Webhook endpoints and their deliveries, as customers and the side process use them.

Knows: who may listen to what, how an event becomes deliveries, and what an attempt's outcome changes.
Refuses to know: sockets (`sender`), the order of a signature's bytes (`signing`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import orjson
from sqlalchemy.orm import Session

from app import doorbell, outbox
from app.database import db_now
from app.domain.events import OPENAI_TOPICS, Level, Topic
from app.errors import Conflict, InvalidRequest, NotFound
from app.kit.clock import now
from app.kit.ids import new_id
from app.kit.pagination import Page
from app.settings import WebhookSettings
from app.tables.webhooks import DeliveryState, WebhookDelivery, WebhookEndpoint
from app.webhooks import repository, schedule, signing
from app.webhooks.sender import Answer

MAX_ENDPOINTS = 10
ROTATION_OVERLAP_SECONDS = 24 * 3600.0
FAN_OUT_BATCH = 200
GONE = 410


@dataclass(frozen=True, slots=True)
class DueDelivery:
    """Everything one attempt needs, read while nothing else holds it. `claimed_until` proves the claim."""

    id: str
    endpoint_id: str
    url: str
    secrets: tuple[str, ...]
    message_id: str
    body: bytes
    attempts: tuple[dict[str, Any], ...]
    claimed_until: float


@dataclass(frozen=True, slots=True)
class Sample:
    """What one attempt needs when no delivery stands behind it."""

    secrets: tuple[str, ...]
    message_id: str
    body: bytes


def create(session: Session, project_id: str, *, name: str, url: str, event_types: Sequence[str]) -> WebhookEndpoint:
    """A new endpoint with a secret of its own. The address is vetted at every attempt (and before, by `probing`)."""
    if repository.count_endpoints(session, project_id) >= MAX_ENDPOINTS:
        raise InvalidRequest(f"A project may have {MAX_ENDPOINTS} webhook endpoints.", code="too_many_endpoints")
    moment = now()
    endpoint = WebhookEndpoint(
        id=new_id("whe_"),
        project_id=project_id,
        name=name,
        url=url,
        event_types=known_topics(event_types),
        secret=signing.new_secret(),
        created_at=moment,
        updated_at=moment,
    )
    session.add(endpoint)
    session.flush()
    return endpoint


def known_topics(event_types: Sequence[str]) -> list[str]:
    """OpenAI's three when none is named; ours are opt-in, because strict clients do not know them."""
    unknown = sorted(set(event_types) - {topic.value for topic in Topic})
    if unknown:
        raise InvalidRequest(f"Unknown event type: {unknown[0]!r}.", code="unknown_event_type", param="event_types")
    return sorted(set(event_types)) if event_types else sorted(topic.value for topic in OPENAI_TOPICS)


def get(session: Session, project_id: str, endpoint_id: str) -> WebhookEndpoint:
    endpoint = repository.find_endpoint(session, project_id, endpoint_id)
    if endpoint is None:
        raise NotFound(f"There is no webhook endpoint {endpoint_id!r}.", param="webhook_endpoint_id")
    return endpoint


def list_(session: Session, project_id: str, *, after: str | None, limit: int) -> Page[WebhookEndpoint]:
    cursor = None
    if after is not None:
        # Also one that was deleted meanwhile: the page goes on behind it.
        last = session.get(WebhookEndpoint, after)
        if last is None or last.project_id != project_id:
            raise InvalidRequest(f"There is no webhook endpoint {after!r} to continue after.", param="after")
        cursor = (last.created_at, last.id)
    return repository.page_of_endpoints(session, project_id, cursor=cursor, limit=limit)


def change(session: Session, project_id: str, endpoint_id: str, **values: Any) -> WebhookEndpoint:
    """`name`, `url` and `event_types`; what is None stays."""
    endpoint = get(session, project_id, endpoint_id)
    if values.get("event_types") is not None:
        values["event_types"] = known_topics(values["event_types"])
    changed = {key: value for key, value in values.items() if value is not None and getattr(endpoint, key) != value}
    for key, value in changed.items():
        setattr(endpoint, key, value)
    if changed:
        endpoint.updated_at = now()
    return endpoint


def delete(session: Session, project_id: str, endpoint_id: str) -> None:
    endpoint = get(session, project_id, endpoint_id)
    endpoint.deleted_at = now()
    repository.drop_pending(session, endpoint.id)


def enable(session: Session, project_id: str, endpoint_id: str) -> WebhookEndpoint:
    """After a repair. What failed meanwhile is replayed on request, not by itself."""
    endpoint = get(session, project_id, endpoint_id)
    endpoint.disabled_at = endpoint.failing_since = None
    return endpoint


def rotate_secret(session: Session, project_id: str, endpoint_id: str, *, keep_old: bool) -> WebhookEndpoint:
    endpoint = get(session, project_id, endpoint_id)
    endpoint.previous_secret = endpoint.secret if keep_old else None
    endpoint.previous_secret_until = now() + ROTATION_OVERLAP_SECONDS if keep_old else None
    endpoint.secret = signing.new_secret()
    endpoint.updated_at = now()
    return endpoint


def active_secrets(endpoint: WebhookEndpoint) -> tuple[str, ...]:
    """Newest first."""
    until = endpoint.previous_secret_until
    if endpoint.previous_secret is not None and until is not None and until > now():
        return endpoint.secret, endpoint.previous_secret
    return (endpoint.secret,)


def fan_out(session: Session) -> int:
    """Turns facts that nobody was told about into one delivery per listening endpoint; says how many facts."""
    events = repository.unsent_events(session, FAN_OUT_BATCH)
    for event in events:
        for endpoint in repository.listeners(session, event.project_id):
            if event.topic in endpoint.event_types:
                session.add(
                    WebhookDelivery(
                        id=new_id("dlv_"),
                        endpoint_id=endpoint.id,
                        event_id=event.id,
                        message_id=message_id(event.id),
                        next_attempt_at=db_now(),
                    )
                )
    if events:
        session.flush()
        repository.mark_fanned_out(session, [event.seq for event in events])
    return len(events)


def message_id(event_id: str) -> str:
    """`webhook-id`: one per event, so that a receiver knows every attempt and every replay for the same fact."""
    return "msg_" + event_id.removeprefix("evt_")


def body_of(event_id: str, topic: str, subject_id: str, created_at: float) -> bytes:
    """OpenAI's thin body, and the ISO time that Standard Webhooks asks for. The same bytes at every attempt."""
    moment = datetime.fromtimestamp(created_at, UTC)
    return orjson.dumps(
        {
            "object": "event",
            "id": event_id,
            "type": topic,
            "created_at": int(created_at),
            "timestamp": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "data": {"id": subject_id},
        }
    )


def sample(endpoint: WebhookEndpoint, topic: str) -> Sample:
    """A test event: real in form, about a job that does not exist."""
    event_id = new_id("evt_")
    body = body_of(event_id, topic, "ftjob-test", now())
    return Sample(active_secrets(endpoint), message_id(event_id), body)


def claim_due(
    session: Session, settings: WebhookSettings, *, limit: int, busy: Collection[str], per_endpoint: int
) -> list[DueDelivery]:
    """Deliveries whose time has come, ours until the request's deadline is long over."""
    rows = repository.claim_due(
        session, limit=limit, busy=busy, per_endpoint=per_endpoint, claim_seconds=settings.timeout_seconds + 30
    )
    return [
        DueDelivery(
            id=delivery.id,
            endpoint_id=endpoint.id,
            url=endpoint.url,
            secrets=active_secrets(endpoint),
            message_id=delivery.message_id,
            body=body_of(event.id, event.topic, event.subject_id, event.created_at),
            attempts=tuple(delivery.attempts),
            claimed_until=delivery.claimed_until,
        )
        for delivery, endpoint, event in rows
    ]


def settle(session: Session, due: DueDelivery, answer: Answer, settings: WebhookSettings) -> None:
    """Writes one attempt down and decides what follows: delivered, later, or never again."""
    attempt = {
        "at": round(now() - answer.seconds, 3),
        "status": answer.status,
        "ms": round(answer.seconds * 1000),
        "error": answer.error,
    }
    attempts = [*due.attempts, attempt]
    values: dict[str, Any] = {"attempts": attempts, "next_attempt_at": None}
    wait = schedule.next_wait(
        len(attempts), settings.retry_schedule_seconds, retry_after_seconds=answer.retry_after_seconds
    )
    if answer.delivered:
        values["state"] = DeliveryState.DELIVERED
    elif answer.status == GONE or wait is None:
        values["state"] = DeliveryState.FAILED
    else:
        values["state"] = DeliveryState.PENDING
        values["next_attempt_at"] = db_now() + wait
    if not repository.settle_claimed(session, due.id, due.claimed_until, **values):
        return
    if answer.delivered:
        repository.mark_working(session, due.endpoint_id)
        return
    failing_seconds = repository.mark_failing(session, due.endpoint_id)
    if answer.status == GONE or failing_seconds > settings.disable_after_seconds:
        _disable(session, due.endpoint_id, "it answered 410" if answer.status == GONE else "it failed for days")


def _disable(session: Session, endpoint_id: str, reason: str) -> None:
    endpoint = session.get_one(WebhookEndpoint, endpoint_id)
    if repository.disable(session, endpoint_id):
        outbox.record(
            session,
            project_id=endpoint.project_id,
            subject_id=endpoint.id,
            topic=Topic.ENDPOINT_DISABLED,
            level=Level.WARN,
            message=f"Webhook endpoint {endpoint.name!r} was disabled because {reason}.",
        )


def deliveries(
    session: Session, project_id: str, endpoint_id: str, *, after: str | None, limit: int
) -> tuple[Page[WebhookDelivery], dict[str, str]]:
    """A page of an endpoint's deliveries and the topic of each event."""
    get(session, project_id, endpoint_id)
    cursor = None
    if after is not None:
        last = repository.find_delivery(session, project_id, after)
        if last is None:
            raise InvalidRequest(f"There is no delivery {after!r} to continue after.", param="after")
        cursor = (last.created_at, last.id)
    page = repository.page_of_deliveries(session, endpoint_id, cursor=cursor, limit=limit)
    return page, repository.topics(session, [delivery.event_id for delivery in page.data])


def replay(session: Session, project_id: str, delivery_id: str) -> tuple[WebhookDelivery, str]:
    """Sends one delivery again: same `webhook-id`, new time. Returns it with its event's topic."""
    delivery = repository.find_delivery(session, project_id, delivery_id)
    if delivery is None:
        raise NotFound(f"There is no delivery {delivery_id!r}.", param="delivery_id")
    _require_enabled(get(session, project_id, delivery.endpoint_id))
    repository.requeue(session, delivery.endpoint_id, delivery_id=delivery.id)
    doorbell.ring_after_commit(session, doorbell.Bell.WEBHOOKS)
    session.refresh(delivery)
    return delivery, repository.topics(session, [delivery.event_id])[delivery.event_id]


def replay_range(
    session: Session,
    project_id: str,
    endpoint_id: str,
    *,
    since: float,
    until: float | None,
    state: DeliveryState | None,
) -> int:
    _require_enabled(get(session, project_id, endpoint_id))
    count = repository.requeue(session, endpoint_id, since=since, until=until, state=state)
    doorbell.ring_after_commit(session, doorbell.Bell.WEBHOOKS)
    return count


def _require_enabled(endpoint: WebhookEndpoint) -> None:
    if endpoint.disabled_at is not None:
        host = urlsplit(endpoint.url).hostname
        raise Conflict(f"The endpoint at {host} is disabled; enable it first.", code="webhook_endpoint_disabled")
