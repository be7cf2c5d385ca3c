"""Names looked up and requests made while the customer waits: registration's check and the test event.

Knows: that receivers and name servers may never answer, so nothing here holds a thread of the pool that all tenants
share, everything ends at one deadline, and neither a project nor all of them together may have many on the way.
Refuses to know: rows and HTTP on our side.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from app.errors import InvalidRequest, TooManyRequests
from app.kit.ssrf import ForbiddenTarget, Resolver, Rules, parse_target, system_resolver, vet_async
from app.settings import WebhookSettings
from app.webhooks import delivery
from app.webhooks.sender import Answer, Sender
from app.webhooks.service import Sample


class Places:
    """How many may be on the way in this process, and of one project among them."""

    def __init__(self, in_all: int, per_project: int) -> None:
        self._in_all = in_all
        self._per_project = per_project
        self._taken: Counter[str] = Counter()

    @contextmanager
    def take(self, project_id: str) -> Iterator[None]:
        if self._taken[project_id] >= self._per_project or self._taken.total() >= self._in_all:
            raise TooManyRequests("Earlier requests to webhook endpoints are still waiting for their answers.")
        self._taken[project_id] += 1
        try:
            yield
        finally:
            self._taken[project_id] -= 1
            self._taken += Counter()  # drops projects at zero, or every one that ever asked would be kept


CHECKS = Places(in_all=64, per_project=4)
TESTS = Places(in_all=32, per_project=1)


async def check_url(project_id: str, url: str, settings: WebhookSettings, resolver: Resolver = system_resolver) -> None:
    """Refuses at registration what every attempt would refuse."""
    rules = Rules(allow_private=settings.allow_private, allow_http=settings.allow_http)
    try:
        with CHECKS.take(project_id):
            async with asyncio.timeout(settings.timeout_seconds):
                await vet_async(parse_target(url, rules), rules, resolver)
    except ForbiddenTarget as error:
        raise InvalidRequest(str(error), code="webhook_url_refused", param="url") from None
    except TimeoutError:
        message = f"The URL's name could not be looked up within {settings.timeout_seconds:g} s."
        raise InvalidRequest(message, code="webhook_url_refused", param="url") from None


async def send_sample(project_id: str, url: str, sample: Sample, settings: WebhookSettings) -> Answer:
    """One signed test event, now."""
    with TESTS.take(project_id):
        return await delivery.send(Sender(settings), url, sample.secrets, sample.message_id, sample.body)
