"""What surrounds every request: its id, its log line, and a limit on its body.

Knows: ASGI messages. Refuses to know: routes, beyond which of them take large bodies.
"""

from __future__ import annotations

import time
from collections.abc import Collection

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import telemetry
from app.envelope import render, unexpected
from app.errors import InvalidRequest, PayloadTooLarge

log = telemetry.get_logger(__name__)


class BodyLimit:
    """Answers a body that is too large with 413: before reading it when its length is declared, else as soon as it is.

    What the application made of the cut-off body is dropped: the framework would call it malformed.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, exempt: Collection[tuple[str, str]]) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.exempt = exempt

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (scope["method"], scope["path"]) in self.exempt:
            await self.app(scope, receive, send)
            return
        refusal = PayloadTooLarge(f"The request body may have at most {self.max_bytes:,} bytes.")
        declared = _header(scope, b"content-length")
        if declared.isdecimal() and int(declared) > self.max_bytes:
            await render(refusal)(scope, receive, send)
            return
        read, cut_off, started = 0, False, False

        async def receive_within_limit() -> Message:
            nonlocal read, cut_off
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.max_bytes:
                cut_off = True
                raise refusal
            return message

        async def send_unless_cut_off(message: Message) -> None:
            nonlocal started
            if started or not cut_off:
                started = True
                await send(message)

        try:
            await self.app(scope, receive_within_limit, send_unless_cut_off)
        except PayloadTooLarge:
            if started:
                raise
        if cut_off and not started:
            await render(refusal)(scope, receive, send)


class RequestScope:
    """Gives each request its id and time, on the answer and on every log line, and has an answer for every fault."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        token = telemetry.request_id.set(telemetry.choose_request_id(_header(scope, b"x-request-id")))
        answer = _Answer(send)
        try:
            if "\0" in scope["path"] or b"%00" in scope["query_string"]:
                refusal = InvalidRequest("A URL may not hold U+0000.", code="malformed_request")
                await render(refusal)(scope, receive, answer.send)
            else:
                await self.app(scope, receive, answer.send)
        except ClientDisconnect:
            log.info("client_gone")
        except Exception:
            log.exception("unexpected_error")
            if answer.sent_status:
                raise  # the answer has begun; breaking the connection is all that is left to say
            await render(unexpected())(scope, receive, answer.send)
        finally:
            route = getattr(scope.get("route"), "path", None)
            log.info("request", method=scope["method"], route=route, status=answer.sent_status, ms=answer.elapsed_ms())
            telemetry.request_id.reset(token)


class _Answer:
    """Passes an answer on with the headers every answer has."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._began = time.perf_counter()
        self.sent_status = 0

    def elapsed_ms(self) -> int:
        return int((time.perf_counter() - self._began) * 1000)

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.sent_status = message["status"]
            message.setdefault("headers", []).extend(
                [
                    (b"x-request-id", telemetry.request_id.get().encode()),
                    (b"openai-processing-ms", str(self.elapsed_ms()).encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"cache-control", b"no-store"),
                ]
            )
        await self._send(message)


def _header(scope: Scope, wanted: bytes) -> str:
    return next((value.decode("latin-1") for name, value in scope["headers"] if name == wanted), "")
