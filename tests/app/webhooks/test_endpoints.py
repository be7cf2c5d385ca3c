"""Webhook endpoints by the unmodified `openai` package against the gateway, and what strangers get."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import httpx
import openai
import pytest
import standardwebhooks
from fastapi import FastAPI

from app import outbox
from app.database import unit_of_work
from app.domain.events import Topic
from app.errors import InvalidRequest
from app.settings import WebhookSettings
from app.webhooks import probing
from app.webhooks.delivery import Deliverer
from tests.app.product import Product

MORE_THAN_THREADS = 41  # the pool that all tenants' requests share has 40


@pytest.fixture
def sdk(product: Product, settings: WebhookSettings, serve: Callable[[FastAPI], str]) -> Iterator[openai.OpenAI]:
    """The customer's client; the gateway runs with a closed network's switches, so that loopback can be told."""
    before = product.app.state.settings
    product.app.state.settings = before.model_copy(update={"webhooks": settings})
    with openai.OpenAI(base_url=serve(product.app) + "/v1", api_key=product.api_key, max_retries=0) as client:
        yield client
    product.app.state.settings = before


@pytest.fixture
def happened(product: Product, settings: WebhookSettings) -> Callable[[], None]:
    """One succeeded job, told to everybody who listens."""

    def tell() -> None:
        with unit_of_work(product.engine) as session:
            project = product.principal.project_id
            outbox.record(session, project_id=project, subject_id="ftjob-1", topic=Topic.JOB_SUCCEEDED)
        asyncio.run(Deliverer(product.engine, settings).run_until_idle(5))

    return tell


def test_the_whole_life_of_an_endpoint_by_the_openai_package(sdk, receiver):
    made = sdk.webhooks.create(name="ci", url=receiver.url, event_types=["fine_tuning.job.succeeded"])
    assert made.signing_secret.startswith("whsec_")
    assert made.id.startswith("whe_")
    seen = sdk.webhooks.retrieve(made.id)
    assert (seen.name, seen.url, seen.event_types) == ("ci", receiver.url, ["fine_tuning.job.succeeded"])
    assert made.signing_secret not in seen.to_json(), "the secret is shown once"
    assert made.signing_secret.endswith(seen.signing_secret_hint[-4:])
    changed = sdk.webhooks.update(made.id, name="renamed", event_types=["fine_tuning.job.failed"])
    assert (changed.name, changed.event_types, changed.url) == ("renamed", ["fine_tuning.job.failed"], receiver.url)
    rotated = sdk.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True)
    assert rotated.signing_secret != made.signing_secret
    assert [endpoint.id for endpoint in sdk.webhooks.list()] == [made.id]
    assert sdk.webhooks.delete(made.id).deleted is True
    with pytest.raises(openai.NotFoundError):
        sdk.webhooks.retrieve(made.id)
    assert list(sdk.webhooks.list()) == []


def test_the_list_of_topics_holds_openais_and_ours(sdk):
    listed = sdk.webhooks.event_types.list().data
    assert {"fine_tuning.job.succeeded", "fine_tuning.job.gate_blocked", "model.released"} <= set(listed)


def test_a_test_event_arrives_signed_and_its_status_comes_back(sdk, receiver):
    made = sdk.webhooks.create(name="ci", url=receiver.url, event_types=["fine_tuning.job.succeeded"])
    receiver.answers = [418]
    result = sdk.webhooks.test(made.id, event_type="fine_tuning.job.succeeded")
    assert (result.status_code, result.success) == (418, True)
    [(headers, body)] = receiver.requests
    event = sdk.webhooks.unwrap(body, headers, secret=made.signing_secret)
    assert event.type == "fine_tuning.job.succeeded"


def test_a_test_that_reaches_nobody_says_why(sdk, product):
    made = sdk.webhooks.create(name="ci", url="http://127.0.0.1:1/", event_types=["fine_tuning.job.succeeded"])
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.webhooks.test(made.id, event_type="fine_tuning.job.succeeded")
    assert refused.value.code == "webhook_test_failed"


def test_deliveries_can_be_read_and_replayed(sdk, receiver, happened):
    made = sdk.webhooks.create(name="ci", url=receiver.url, event_types=["fine_tuning.job.succeeded"])
    happened()
    [delivery] = sdk.get(f"/webhook_endpoints/{made.id}/deliveries", cast_to=object)["data"]
    assert delivery["state"] == "delivered"
    assert [attempt["status"] for attempt in delivery["attempts"]] == [200]
    assert delivery["event_type"] == "fine_tuning.job.succeeded"
    again = sdk.post(f"/webhook_deliveries/{delivery['id']}/replay", cast_to=object)
    assert again["state"] == "pending"
    assert sdk.post(f"/webhook_endpoints/{made.id}/replay", body={"since": 0}, cast_to=object)["count"] == 0
    happened()
    ids = [headers["webhook-id"] for headers, _ in receiver.requests]
    assert len(ids) == 3
    assert ids.count(delivery["webhook_id"]) == 2
    for headers, body in receiver.requests:
        standardwebhooks.Webhook(made.signing_secret).verify(body, headers)


def test_listings_are_cut_into_pages(sdk, receiver):
    made = [sdk.webhooks.create(name=str(n), url=receiver.url, event_types=[]).id for n in range(5)]
    assert [endpoint.id for endpoint in sdk.webhooks.list(limit=2)] == made[::-1]


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"url": "http://example.com/"}, "url", "webhook_url_refused"),
        ({"url": "https://127.0.0.1/"}, "url", "webhook_url_refused"),
        ({"url": "https://169.254.169.254/"}, "url", "webhook_url_refused"),
        ({"url": "https://93.184.215.14/", "event_types": ["no.such"]}, "event_types", "unknown_event_type"),
    ],
)
def test_bad_endpoints_are_refused_by_name(client, body, param, code):
    answer = client.post("/webhook_endpoints", json={"name": "x", **body})
    assert answer.status_code == 400
    assert (answer.json()["error"]["param"], answer.json()["error"]["code"]) == (param, code)


def test_foreign_endpoints_and_deliveries_do_not_exist(sdk, receiver, happened, stranger, anybody):
    made = sdk.webhooks.create(name="ci", url=receiver.url, event_types=["fine_tuning.job.succeeded"])
    happened()
    [delivery] = sdk.get(f"/webhook_endpoints/{made.id}/deliveries", cast_to=object)["data"]
    calls = [
        ("GET", f"/webhook_endpoints/{made.id}", None),
        ("POST", f"/webhook_endpoints/{made.id}", {"name": "mine"}),
        ("DELETE", f"/webhook_endpoints/{made.id}", None),
        ("POST", f"/webhook_endpoints/{made.id}/rotate_secret", {}),
        ("POST", f"/webhook_endpoints/{made.id}/enable", None),
        ("POST", f"/webhook_endpoints/{made.id}/test", {"event_type": "fine_tuning.job.succeeded"}),
        ("GET", f"/webhook_endpoints/{made.id}/deliveries", None),
        ("POST", f"/webhook_endpoints/{made.id}/replay", {"since": 0}),
        ("POST", f"/webhook_deliveries/{delivery['id']}/replay", None),
    ]
    for method, path, body in calls:
        assert stranger.request(method, path, json=body).status_code == 404, path
        assert anybody.request(method, path, json=body).status_code == 401, path
    assert stranger.get("/webhook_endpoints").json()["data"] == []
    assert sdk.webhooks.retrieve(made.id).name == "ci"


@asynccontextmanager
async def in_process(product: Product) -> AsyncIterator[Callable[[str, str, object], asyncio.Task[httpx.Response]]]:
    """Asks the application in this very loop: by key, path and body, or None for a GET."""
    transport = httpx.ASGITransport(product.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway/v1", timeout=30) as client:

        def ask(key: str, path: str, body: object = None) -> asyncio.Task[httpx.Response]:
            headers = {"authorization": f"Bearer {key}"}
            sent = client.get(path, headers=headers) if body is None else client.post(path, headers=headers, json=body)
            return asyncio.create_task(sent)

        yield ask


async def statuses(requests: list[asyncio.Task[httpx.Response]], until: int) -> list[int]:
    """Of the first so many that were answered."""
    answered = []
    for request in asyncio.as_completed(requests, timeout=15):
        answered.append((await request).status_code)
        if len(answered) == until:
            break
    return sorted(answered)


@pytest.fixture
def patient(product, sdk) -> openai.OpenAI:
    """The customer's client, of a gateway whose deadline is further away than the test's end."""
    current = product.app.state.settings
    webhooks = current.webhooks.model_copy(update={"timeout_seconds": 60.0})
    product.app.state.settings = current.model_copy(update={"webhooks": webhooks})
    return sdk


def test_a_receiver_that_never_answers_holds_up_nobody_and_its_project_has_one_test_at_a_time(
    product, patient, receiver
):
    silent = socket.create_server(("127.0.0.1", 0))
    made = patient.webhooks.create(name="ci", url=f"http://127.0.0.1:{silent.getsockname()[1]}/", event_types=[])

    async def play() -> None:
        async with in_process(product) as ask:
            body = {"event_type": "fine_tuning.job.succeeded"}
            tests = [ask(product.api_key, f"/webhook_endpoints/{made.id}/test", body) for _ in range(MORE_THAN_THREADS)]
            refused = [429] * (MORE_THAN_THREADS - 1)
            assert await statuses(tests, until=len(refused)) == refused
            assert await statuses([ask(product.other_key, "/models")], until=1) == [200]
            silent.close()
            assert await statuses(tests, until=MORE_THAN_THREADS) == [400, *refused]

    asyncio.run(play())
    patient.webhooks.update(made.id, url=receiver.url)
    assert patient.webhooks.test(made.id, event_type="fine_tuning.job.succeeded").success, "the place is free again"


def test_a_name_server_that_never_answers_holds_up_nobody(product, patient, monkeypatch):
    released = threading.Event()
    known = socket.getaddrinfo

    def hang(host, *args, **named):
        if host == "slow.example":
            released.wait(30)
            raise socket.gaierror(-2, "Name or service not known")
        return known(host, *args, **named)

    monkeypatch.setattr(socket, "getaddrinfo", hang)

    async def play() -> None:
        async with in_process(product) as ask:
            body = {"name": "x", "url": "https://slow.example/"}
            waiting = [ask(product.api_key, "/webhook_endpoints", body) for _ in range(MORE_THAN_THREADS)]
            refused = [429] * (MORE_THAN_THREADS - 4)
            assert await statuses(waiting, until=len(refused)) == refused
            assert await statuses([ask(product.other_key, "/models")], until=1) == [200]
            released.set()
            assert await statuses(waiting, until=MORE_THAN_THREADS) == [400] * 4 + refused

    try:
        asyncio.run(play())
    finally:
        released.set()


def test_a_name_that_is_not_found_in_time_is_refused():
    def hang(_host: str, _port: int) -> list[str]:
        time.sleep(1)
        return []

    check = probing.check_url("p", "https://slow.example/", WebhookSettings(timeout_seconds=0.1), hang)
    with pytest.raises(InvalidRequest, match=r"within 0\.1 s"):
        asyncio.run(check)
