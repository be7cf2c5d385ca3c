"""`/v1/webhook_endpoints` and `/v1/webhook_deliveries`: who is told what, and what became of it.

Knows: verbs, paths, headers. Refuses to know: sockets and signatures; nothing here holds a transaction or a thread
while it waits for a name server or a receiver.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from starlette.concurrency import run_in_threadpool

from app.accounts.dependencies import Caller, CurrentSettings, Database, Reading, Writing
from app.database import read_session, unit_of_work
from app.domain.events import Topic
from app.errors import InvalidRequest
from app.tables.webhooks import DeliveryState
from app.webhooks import probing, service
from app.webhooks.schemas import (
    DeliveryList,
    DeliveryObject,
    EndpointCreate,
    EndpointDeleted,
    EndpointList,
    EndpointObject,
    EndpointUpdate,
    EndpointWithSecret,
    EventTypeList,
    Replayed,
    ReplayRange,
    RotateSecret,
    TestRequest,
    TestResult,
    delivery_object,
    endpoint_object,
    endpoint_with_secret,
)

router = APIRouter(tags=["webhooks"])
After = Annotated[str | None, Query(max_length=64)]
Limit = Annotated[int, Query(ge=1, le=100)]


@router.get("/webhook_event_types", response_model=EventTypeList)
def event_types(caller: Caller) -> EventTypeList:  # noqa: ARG001 - the key is what it asks for
    """List every event an endpoint can subscribe to."""
    return EventTypeList(data=sorted(topic.value for topic in Topic))


@router.post("/webhook_endpoints", response_model=EndpointWithSecret)
async def create(
    body: EndpointCreate, caller: Caller, engine: Database, settings: CurrentSettings
) -> EndpointWithSecret:
    """Register a URL. The signing secret is in this answer and in no later one."""
    await probing.check_url(caller.project_id, body.url, settings.webhooks)

    def write() -> EndpointWithSecret:
        with unit_of_work(engine) as session:
            return endpoint_with_secret(service.create(session, caller.project_id, **dict(body)))

    return await run_in_threadpool(write)


@router.get("/webhook_endpoints", response_model=EndpointList)
def list_endpoints(caller: Caller, session: Reading, after: After = None, limit: Limit = 20) -> EndpointList:
    """List the project's endpoints, newest first."""
    page = service.list_(session, caller.project_id, after=after, limit=limit)
    data = [endpoint_object(endpoint) for endpoint in page.data]
    return EndpointList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=page.has_more,
    )


@router.get("/webhook_endpoints/{endpoint_id}", response_model=EndpointObject)
def retrieve(endpoint_id: str, caller: Caller, session: Reading) -> EndpointObject:
    """Look at one endpoint."""
    return endpoint_object(service.get(session, caller.project_id, endpoint_id))


@router.post("/webhook_endpoints/{endpoint_id}", response_model=EndpointObject)
async def update(
    endpoint_id: str, body: EndpointUpdate, caller: Caller, engine: Database, settings: CurrentSettings
) -> EndpointObject:
    """Change name, URL or event types; what is absent stays."""
    if body.url is not None:
        await probing.check_url(caller.project_id, body.url, settings.webhooks)

    def write() -> EndpointObject:
        with unit_of_work(engine) as session:
            return endpoint_object(service.change(session, caller.project_id, endpoint_id, **dict(body)))

    return await run_in_threadpool(write)


@router.delete("/webhook_endpoints/{endpoint_id}", response_model=EndpointDeleted)
def delete(endpoint_id: str, caller: Caller, session: Writing) -> EndpointDeleted:
    """Delete an endpoint; what was waiting for it is not sent."""
    service.delete(session, caller.project_id, endpoint_id)
    return EndpointDeleted(id=endpoint_id)


@router.post("/webhook_endpoints/{endpoint_id}/rotate_secret", response_model=EndpointWithSecret)
def rotate_secret(
    endpoint_id: str, caller: Caller, session: Writing, body: RotateSecret | None = None
) -> EndpointWithSecret:
    """Make a new signing secret; on request the old one signs too for 24 hours."""
    keep = body.keep_old_secret_active_for_24_hours if body is not None else False
    return endpoint_with_secret(service.rotate_secret(session, caller.project_id, endpoint_id, keep_old=keep))


@router.post("/webhook_endpoints/{endpoint_id}/enable", response_model=EndpointObject)
def enable(endpoint_id: str, caller: Caller, session: Writing) -> EndpointObject:
    """Switch an endpoint on again that was disabled after days of failures or a 410."""
    return endpoint_object(service.enable(session, caller.project_id, endpoint_id))


@router.post("/webhook_endpoints/{endpoint_id}/test", response_model=TestResult)
async def test(
    endpoint_id: str, body: TestRequest, caller: Caller, engine: Database, settings: CurrentSettings
) -> TestResult:
    """Send a signed sample event now and answer with the receiver's status."""
    [topic] = service.known_topics([body.event_type])

    def read() -> tuple[str, service.Sample]:
        with read_session(engine) as session:
            endpoint = service.get(session, caller.project_id, endpoint_id)
            return endpoint.url, service.sample(endpoint, topic)

    url, sample = await run_in_threadpool(read)
    answer = await probing.send_sample(caller.project_id, url, sample, settings.webhooks)
    if answer.status is None:
        raise InvalidRequest(f"The endpoint gave no answer: {answer.error}", code="webhook_test_failed")
    return TestResult(webhook_endpoint_id=endpoint_id, event_type=topic, status_code=answer.status)


@router.get("/webhook_endpoints/{endpoint_id}/deliveries", response_model=DeliveryList)
def list_deliveries(
    endpoint_id: str, caller: Caller, session: Reading, after: After = None, limit: Limit = 20
) -> DeliveryList:
    """List what was sent to an endpoint and how it answered, newest first."""
    page, topics = service.deliveries(session, caller.project_id, endpoint_id, after=after, limit=limit)
    data = [delivery_object(row, topics[row.event_id]) for row in page.data]
    return DeliveryList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=page.has_more,
    )


@router.post("/webhook_endpoints/{endpoint_id}/replay", response_model=Replayed)
def replay_range(endpoint_id: str, body: ReplayRange, caller: Caller, session: Writing) -> Replayed:
    """Send a range of past deliveries again, each under its old `webhook-id`."""
    state = DeliveryState(body.state) if body.state is not None else None
    count = service.replay_range(
        session, caller.project_id, endpoint_id, since=body.since, until=body.until, state=state
    )
    return Replayed(count=count)


@router.post("/webhook_deliveries/{delivery_id}/replay", response_model=DeliveryObject)
def replay(delivery_id: str, caller: Caller, session: Writing) -> DeliveryObject:
    """Send one delivery again, under its old `webhook-id`."""
    row, topic = service.replay(session, caller.project_id, delivery_id)
    return delivery_object(row, topic)
