"""Webhook endpoints and deliveries.

Knows: where to send, which topics, the signing secrets, and every attempt made.
Refuses to know: how a request is signed and sent (`app.webhooks`).
"""

from enum import StrEnum
from typing import Any

from sqlalchemy import ForeignKey, Index, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from app.tables.base import Created, Table, enum_text, one_of


class DeliveryState(StrEnum):
    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"


class WebhookEndpoint(Created, Table):
    __tablename__ = "webhook_endpoint"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("project.id"), index=True)
    name: Mapped[str] = mapped_column(String(128))
    url: Mapped[str] = mapped_column(String(2048))
    event_types: Mapped[list[Any]]
    secret: Mapped[str] = mapped_column(String(128))
    previous_secret: Mapped[str | None] = mapped_column(String(128))
    previous_secret_until: Mapped[float | None]
    updated_at: Mapped[float | None]
    failing_since: Mapped[float | None]
    disabled_at: Mapped[float | None]
    deleted_at: Mapped[float | None]


class WebhookDelivery(Created, Table):
    """One event for one endpoint. `message_id` is the `webhook-id` header of every attempt."""

    __tablename__ = "webhook_delivery"
    __table_args__ = (
        one_of("state", DeliveryState),
        UniqueConstraint("endpoint_id", "event_id"),
        Index("ix_webhook_delivery_due", "state", "next_attempt_at"),
    )

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    endpoint_id: Mapped[str] = mapped_column(ForeignKey("webhook_endpoint.id"))
    event_id: Mapped[str] = mapped_column(ForeignKey("event.id"))
    message_id: Mapped[str] = mapped_column(String(64))
    state: Mapped[DeliveryState] = mapped_column(enum_text(DeliveryState), default=DeliveryState.PENDING)
    attempts: Mapped[list[Any]] = mapped_column(default=list)
    next_attempt_at: Mapped[float | None]
    claimed_until: Mapped[float | None]
