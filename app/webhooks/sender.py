"""One POST to an address that a customer chose: vetted, pinned, bounded in time and size.

Knows: everything that can go wrong on the way, as a value; nothing here raises for the receiver's faults.
Refuses to know: signatures, deliveries, retries.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass

import certifi
import httpcore
import structlog

from app.kit.ssrf import (
    ForbiddenTarget,
    PinnedBackend,
    Resolver,
    Rules,
    Target,
    parse_target,
    system_resolver,
    vet_async,
)
from app.settings import WebhookSettings

log = structlog.get_logger(__name__)

READ_LIMIT_BYTES = 64 << 10
USER_AGENT = "Theriac-Webhooks/1.0"


@dataclass(frozen=True, slots=True)
class Answer:
    """`status` is None when no answer came; `error` then says why. The receiver's body is never kept."""

    status: int | None
    error: str | None
    seconds: float
    retry_after_seconds: float | None = None

    @property
    def delivered(self) -> bool:
        return self.status is not None and 200 <= self.status < 300


class Sender:
    """Settings of all requests of one process; holds no connection between them."""

    def __init__(
        self,
        settings: WebhookSettings,
        *,
        resolver: Resolver = system_resolver,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self.rules = Rules(allow_private=settings.allow_private, allow_http=settings.allow_http)
        self._deadline = settings.timeout_seconds
        self._resolver = resolver
        self._ssl = ssl_context or _default_ssl_context()

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """One attempt under one deadline for name, connection, TLS and answer together."""
        started = time.monotonic()
        status, retry_after, error = None, None, None
        try:
            async with asyncio.timeout(self._deadline):
                target = parse_target(url, self.rules)
                address = await vet_async(target, self.rules, self._resolver)
                status, retry_after = await self._exchange(target, address, headers, body)
        except TimeoutError:
            error = f"no complete answer within {self._deadline:g} s"
        except ForbiddenTarget as forbidden:
            error = str(forbidden)
        except (
            httpcore.TimeoutException,
            httpcore.NetworkError,
            httpcore.ProtocolError,
            ssl.SSLError,
            OSError,
        ) as fault:
            error = f"{type(fault).__name__}: {fault}"[:200]
        except Exception as fault:
            # Not on the list above, so perhaps a bug; but an attempt nobody settles would be repeated for ever.
            log.exception("webhook.request_failed")
            error = f"the request could not be made ({type(fault).__name__})"
        return Answer(status, error, time.monotonic() - started, retry_after)

    async def _exchange(
        self, target: Target, address: str, headers: Mapping[str, str], body: bytes
    ) -> tuple[int, float | None]:
        sent = {"content-type": "application/json", "user-agent": USER_AGENT, "accept": "*/*", **headers}
        pool = httpcore.AsyncConnectionPool(
            ssl_context=self._ssl, network_backend=PinnedBackend(address), max_connections=1, http2=False
        )
        async with pool, pool.stream("POST", target.url, headers=list(sent.items()), content=body) as response:
            # A redirect is a failure like any other status: following it would call an address nobody vetted.
            read = 0
            with contextlib.suppress(httpcore.ReadError, httpcore.RemoteProtocolError):
                async for piece in response.aiter_stream():
                    read += len(piece)
                    if read >= READ_LIMIT_BYTES:
                        break
            return response.status, _retry_after(response.headers)


def _retry_after(headers: list[tuple[bytes, bytes]]) -> float | None:
    for name, value in headers:
        if name.lower() == b"retry-after" and value.strip().isdigit() and len(value) < 10:
            return float(value)
    return None


@functools.cache
def _default_ssl_context() -> ssl.SSLContext:
    """The machine's certificates (SSL_CERT_FILE included) and the bundled ones, which a slim image needs.

    Read once: it takes tens of milliseconds, which an event loop would spend on nobody else.
    """
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context
