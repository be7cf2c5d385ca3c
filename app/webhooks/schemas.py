"""The JSON of webhook endpoints and deliveries: OpenAI's shapes, and ours where OpenAI has none.

Knows: names and bounds on the wire; that a secret is shown on create and rotate only.
Refuses to know: the database session and how anything is sent.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.tables.webhooks import WebhookDelivery, WebhookEndpoint


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EndpointCreate(Strict):
    name: str = Field(min_length=1, max_length=128)
    url: str = Field(min_length=1, max_length=2048)
    event_types: tuple[str, ...] = Field((), max_length=64, description="none: OpenAI's three job topics")


class EndpointUpdate(Strict):
    """Absent members stay as they are."""

    name: str | None = Field(None, min_length=1, max_length=128)
    url: str | None = Field(None, min_length=1, max_length=2048)
    event_types: tuple[str, ...] | None = Field(None, min_length=1, max_length=64)


class RotateSecret(Strict):
    keep_old_secret_active_for_24_hours: bool = False


class TestRequest(Strict):
    __test__ = False

    event_type: str


class ReplayRange(Strict):
    """Deliveries created between two Unix times; `state` narrows them to delivered or failed ones."""

    since: float = Field(ge=0)
    until: float | None = Field(None, ge=0)
    state: Literal["delivered", "failed"] | None = None


class EndpointObject(BaseModel):
    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    name: str
    url: str
    event_types: list[str]
    created_at: int
    updated_at: int
    signing_secret_hint: str
    disabled_at: int | None


class EndpointWithSecret(EndpointObject):
    """`signing_secret` is shown this once."""

    signing_secret: str


class EndpointList(BaseModel):
    object: Literal["list"] = "list"
    data: list[EndpointObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class EndpointDeleted(BaseModel):
    id: str
    object: Literal["webhook_endpoint.deleted"] = "webhook_endpoint.deleted"
    deleted: bool = True


class TestResult(BaseModel):
    __test__ = False

    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"
    webhook_endpoint_id: str
    event_type: str
    status_code: int
    success: Literal[True] = True


class EventTypeList(BaseModel):
    object: Literal["list"] = "list"
    data: list[str]


class Attempt(BaseModel):
    """`status` is null when no answer came; the receiver's body is never kept."""

    at: float
    status: int | None
    ms: int
    error: str | None


class DeliveryObject(BaseModel):
    id: str
    object: Literal["webhook_delivery"] = "webhook_delivery"
    webhook_endpoint_id: str
    event_id: str
    event_type: str
    webhook_id: str
    state: Literal["pending", "delivered", "failed"]
    attempts: list[Attempt]
    next_attempt_at: float | None
    created_at: int


class DeliveryList(BaseModel):
    object: Literal["list"] = "list"
    data: list[DeliveryObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Replayed(BaseModel):
    object: Literal["webhook_delivery.replay"] = "webhook_delivery.replay"
    count: int


def endpoint_object(endpoint: WebhookEndpoint) -> EndpointObject:
    return EndpointObject(**_endpoint_fields(endpoint))


def endpoint_with_secret(endpoint: WebhookEndpoint) -> EndpointWithSecret:
    return EndpointWithSecret(**_endpoint_fields(endpoint), signing_secret=endpoint.secret)


def delivery_object(delivery: WebhookDelivery, topic: str) -> DeliveryObject:
    return DeliveryObject(
        id=delivery.id,
        webhook_endpoint_id=delivery.endpoint_id,
        event_id=delivery.event_id,
        event_type=topic,
        webhook_id=delivery.message_id,
        state=delivery.state.value,
        attempts=[Attempt.model_validate(attempt) for attempt in delivery.attempts],
        next_attempt_at=delivery.next_attempt_at,
        created_at=int(delivery.created_at),
    )


def _endpoint_fields(endpoint: WebhookEndpoint) -> dict[str, Any]:
    return {
        "id": endpoint.id,
        "name": endpoint.name,
        "url": endpoint.url,
        "event_types": list(endpoint.event_types),
        "created_at": int(endpoint.created_at),
        "updated_at": int(endpoint.updated_at or endpoint.created_at),
        "signing_secret_hint": f"whsec_…{endpoint.secret[-4:]}",
        "disabled_at": int(endpoint.disabled_at) if endpoint.disabled_at else None,
    }
