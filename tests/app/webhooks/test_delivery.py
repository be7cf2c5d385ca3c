"""Deliveries over real sockets: signed, retried, never lost, never followed, never held up."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable

import openai
import pytest
import standardwebhooks
from sqlalchemy import Engine, select

from app.database import read_session, unit_of_work
from app.domain.events import OPENAI_TOPICS, Topic
from app.errors import Conflict, InvalidRequest
from app.settings import WebhookSettings
from app.tables.events import Event
from app.tables.webhooks import DeliveryState, WebhookDelivery, WebhookEndpoint
from app.webhooks import probing, service
from app.webhooks.delivery import Deliverer
from app.webhooks.sender import Sender


@pytest.fixture
def deliver(engine: Engine, settings: WebhookSettings) -> Callable[..., int]:
    def run(seconds: float = 5.0, using: WebhookSettings = settings) -> int:
        return asyncio.run(Deliverer(engine, using).run_until_idle(seconds))

    return run


@pytest.fixture
def all_deliveries(engine: Engine) -> Callable[[], list[WebhookDelivery]]:
    def read() -> list[WebhookDelivery]:
        with read_session(engine) as session:
            return list(session.scalars(select(WebhookDelivery).order_by(WebhookDelivery.created_at)))

    return read


def test_openai_and_the_reference_library_accept_the_signature(receiver, new_endpoint, happen, deliver):
    endpoint = new_endpoint(receiver.url)
    event_id = happen(subject_id="ftjob-abc")
    assert deliver() == 1
    [(headers, body)] = receiver.requests
    event = openai.OpenAI(api_key="none").webhooks.unwrap(body, headers, secret=endpoint.secret)
    assert (event.id, event.type, event.data.id) == (event_id, "fine_tuning.job.succeeded", "ftjob-abc")
    assert event.object == "event"
    unsigned = standardwebhooks.Webhook(endpoint.secret).verify(body, headers)
    assert unsigned["timestamp"].endswith("Z")
    assert headers["webhook-id"].startswith("msg_")
    assert len(body) < 20_000


def test_a_changed_body_or_another_secret_is_refused_by_receivers(receiver, new_endpoint, happen, deliver):
    endpoint = new_endpoint(receiver.url)
    happen()
    deliver()
    [(headers, body)] = receiver.requests
    client = openai.OpenAI(api_key="none")
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(body.replace(b"succeeded", b"cancelled"), headers, secret=endpoint.secret)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(body, headers, secret=service.signing.new_secret())


def test_during_a_rotation_both_secrets_verify(engine, receiver, new_endpoint, happen, deliver):
    old = new_endpoint(receiver.url)
    with unit_of_work(engine) as session:
        new = service.rotate_secret(session, "proj_a", old.id, keep_old=True).secret
    happen()
    deliver()
    [(headers, body)] = receiver.requests
    for secret in (old.secret, new):
        standardwebhooks.Webhook(secret).verify(body, headers)
    with unit_of_work(engine) as session:
        service.rotate_secret(session, "proj_a", old.id, keep_old=False)
    happen()
    deliver()
    headers, body = receiver.requests[-1]
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        standardwebhooks.Webhook(new).verify(body, headers)


def test_an_endpoint_hears_openais_three_topics_unless_it_asks_for_more(receiver, new_endpoint, happen, deliver):
    assert set(new_endpoint(receiver.url).event_types) == OPENAI_TOPICS
    for topic in (Topic.JOB_CREATED, Topic.JOB_FAILED, Topic.MODEL_RELEASED):
        happen(topic)
    deliver()
    assert [b'"fine_tuning.job.failed"' in body for _, body in receiver.requests] == [True]
    new_endpoint(receiver.url, "model.released")
    happen(Topic.MODEL_RELEASED)
    deliver()
    assert len(receiver.requests) == 2


def test_an_unknown_topic_is_refused(receiver, new_endpoint):
    with pytest.raises(InvalidRequest) as refused:
        new_endpoint(receiver.url, "fine_tuning.job.exploded")
    assert (refused.value.code, refused.value.param) == ("unknown_event_type", "event_types")


def test_another_projects_facts_are_not_told(receiver, new_endpoint, new_project, happen, deliver):
    new_endpoint(receiver.url)
    new_project("proj_b")
    happen(project_id="proj_b")
    assert deliver() == 0
    assert receiver.requests == []


def test_a_failing_receiver_is_tried_again_with_the_same_id_and_a_new_signature(
    receiver, new_endpoint, happen, deliver, all_deliveries
):
    endpoint = new_endpoint(receiver.url)
    receiver.answers = [500, 503]
    happen()
    deliver()
    assert len({headers["webhook-id"] for headers, _ in receiver.requests}) == 1
    assert len({body for _, body in receiver.requests}) == 1
    for headers, body in receiver.requests:
        standardwebhooks.Webhook(endpoint.secret).verify(body, headers)
    [delivery] = all_deliveries()
    assert delivery.state is DeliveryState.DELIVERED
    assert [attempt["status"] for attempt in delivery.attempts] == [500, 503, 200]


def test_a_used_up_schedule_ends_as_failed_and_can_be_replayed(
    engine, receiver, new_endpoint, happen, deliver, all_deliveries
):
    new_endpoint(receiver.url)
    receiver.answers = [500] * 3
    happen()
    deliver()
    [delivery] = all_deliveries()
    assert (delivery.state, len(delivery.attempts)) == (DeliveryState.FAILED, 3)
    with unit_of_work(engine) as session:
        service.replay(session, "proj_a", delivery.id)
    deliver()
    [delivery] = all_deliveries()
    assert delivery.state is DeliveryState.DELIVERED
    assert len({headers["webhook-id"] for headers, _ in receiver.requests}) == 1


def test_a_range_can_be_replayed(engine, receiver, new_endpoint, happen, deliver):
    endpoint = new_endpoint(receiver.url)
    for _ in range(3):
        happen()
    deliver()
    with unit_of_work(engine) as session:
        count = service.replay_range(session, "proj_a", endpoint.id, since=0, until=None, state=DeliveryState.DELIVERED)
    deliver()
    assert (count, len(receiver.requests)) == (3, 6)


def test_a_redirect_is_a_failure_and_is_not_followed(receiver, new_endpoint, happen, deliver, all_deliveries):
    new_endpoint(receiver.url)
    receiver.answers = [302, 307, 308]
    receiver.headers = {"location": receiver.url + "/elsewhere"}
    happen()
    deliver()
    assert [attempt["status"] for attempt in all_deliveries()[0].attempts] == [302, 307, 308]
    assert len(receiver.requests) == 3


def test_a_receiver_that_drips_is_cut_at_the_deadline(receiver, new_endpoint, happen, settings, engine):
    new_endpoint(receiver.url)
    receiver.drip = True
    started = time.monotonic()
    answer = asyncio.run(Sender(settings).post(receiver.url, {}, b"{}"))
    assert answer.status is None
    assert "within 1 s" in answer.error
    assert 0.9 < time.monotonic() - started < 2.0


def test_an_endless_fast_body_is_not_read(receiver, settings):
    receiver.headers = {"content-length": str(1 << 40)}
    answer = asyncio.run(Sender(settings).post(receiver.url, {}, b"{}"))
    assert answer.seconds < 1.5


def test_410_disables_the_endpoint_and_says_so(engine, receiver, new_endpoint, happen, deliver, all_deliveries):
    endpoint = new_endpoint(receiver.url)
    receiver.answers = [410]
    happen()
    deliver()
    assert all_deliveries()[0].state is DeliveryState.FAILED
    with read_session(engine) as session:
        assert session.get(WebhookEndpoint, endpoint.id).disabled_at is not None
        assert session.scalars(select(Event).where(Event.topic == "webhook_endpoint.disabled")).one()
    happen()
    assert deliver() == 0, "a disabled endpoint hears nothing"
    with pytest.raises(Conflict), unit_of_work(engine) as session:
        service.replay(session, "proj_a", all_deliveries()[0].id)
    with unit_of_work(engine) as session:
        service.enable(session, "proj_a", endpoint.id)
        service.replay(session, "proj_a", all_deliveries()[0].id)
    assert deliver() == 1


def test_days_of_failure_disable_the_endpoint(engine, receiver, new_endpoint, happen, deliver, settings):
    endpoint = new_endpoint(receiver.url)
    receiver.answers = [500, 500]
    happen()
    deliver(using=settings.model_copy(update={"disable_after_seconds": -1.0}))
    with read_session(engine) as session:
        assert session.get(WebhookEndpoint, endpoint.id).disabled_at is not None


def test_success_forgets_earlier_failures(engine, receiver, new_endpoint, happen, deliver):
    endpoint = new_endpoint(receiver.url)
    receiver.answers = [500, 200]
    happen()
    deliver()
    with read_session(engine) as session:
        assert session.get(WebhookEndpoint, endpoint.id).failing_since is None


def test_private_addresses_are_refused_at_every_attempt_unless_allowed(
    receiver, new_endpoint, happen, deliver, all_deliveries
):
    new_endpoint(receiver.url)
    happen()
    deliver(using=WebhookSettings(allow_http=True, retry_schedule_seconds=(0,), timeout_seconds=1))
    [delivery] = all_deliveries()
    assert delivery.state is DeliveryState.FAILED
    assert "not public" in delivery.attempts[0]["error"]
    assert receiver.requests == []


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/", "https://127.0.0.1/", "https://169.254.169.254/latest/"])
def test_registration_refuses_what_delivery_would_refuse(url):
    with pytest.raises(InvalidRequest) as refused:
        asyncio.run(probing.check_url("proj_a", url, WebhookSettings()))
    assert refused.value.param == "url"


def test_an_address_that_is_not_written_in_ascii_is_delivered_to(receiver, new_endpoint, happen, deliver):
    new_endpoint(receiver.url + "/größe?für=élan")
    happen()
    deliver()
    assert len(receiver.requests) == 1


def test_whatever_goes_wrong_counts_as_an_attempt_and_not_for_ever(
    new_endpoint, happen, deliver, all_deliveries, receiver, monkeypatch
):
    async def surprised(*_: object) -> None:
        raise TypeError("nobody thought of this")

    monkeypatch.setattr(Sender, "_exchange", surprised)
    new_endpoint(receiver.url)
    happen()
    assert deliver() == 3
    [delivery] = all_deliveries()
    assert delivery.state is DeliveryState.FAILED
    assert {attempt["error"] for attempt in delivery.attempts} == {"the request could not be made (TypeError)"}


def test_a_slow_endpoint_does_not_delay_another(engine, receiver, new_endpoint, happen, settings):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        new_endpoint(f"http://127.0.0.1:{silent.getsockname()[1]}/", project_id="proj_slow")
        new_endpoint(receiver.url)
        for _ in range(20):
            happen(project_id="proj_slow")
        happen()
        stop = time.monotonic() + 0.6
        asyncio.run(Deliverer(engine, settings).run(lambda: time.monotonic() > stop or bool(receiver.requests)))
    assert len(receiver.requests) == 1


def test_two_deliverers_send_each_delivery_once(engine, receiver, new_endpoint, happen, settings):
    new_endpoint(receiver.url)
    ids = [happen() for _ in range(12)]

    async def both() -> None:
        await asyncio.gather(*(Deliverer(engine, settings).run_until_idle(5) for _ in range(2)))

    asyncio.run(both())
    sent = sorted(headers["webhook-id"] for headers, _ in receiver.requests)
    assert sent == sorted(service.message_id(event_id) for event_id in ids)


def test_a_dead_senders_claim_runs_out(engine, receiver, new_endpoint, happen, settings, deliver):
    new_endpoint(receiver.url)
    happen()
    hurried = settings.model_copy(update={"timeout_seconds": -27.0})  # a claim of 3 s
    with unit_of_work(engine) as session:
        service.fan_out(session)
    with unit_of_work(engine) as session:
        assert len(service.claim_due(session, hurried, limit=5, busy=[], per_endpoint=4)) == 1
    assert deliver() == 0
    time.sleep(3.1)
    assert deliver() == 1


def test_a_rolled_back_fact_is_never_told(engine, receiver, new_endpoint, deliver):
    new_endpoint(receiver.url)
    with pytest.raises(RuntimeError), unit_of_work(engine) as session:
        service.outbox.record(session, project_id="proj_a", subject_id="ftjob-1", topic=Topic.JOB_SUCCEEDED)
        raise RuntimeError("the job did not succeed after all")
    assert deliver() == 0


def test_a_project_may_have_ten_endpoints(receiver, new_endpoint):
    for _ in range(10):
        new_endpoint(receiver.url)
    with pytest.raises(InvalidRequest) as refused:
        new_endpoint(receiver.url)
    assert refused.value.code == "too_many_endpoints"
