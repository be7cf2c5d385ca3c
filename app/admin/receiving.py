"""A provider's JSONL as the body of a request, written to a private file as it arrives.

Knows: the byte limit, how long a silent client is waited for, and that the file is gone when the request ends.
Refuses to know: what the lines say.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from app.errors import InvalidRequest, PayloadTooLarge, StorageFull
from app.files.upload import IDLE_SECONDS, unless_silent
from app.storage import FULL

WRITE_BYTES = 1 << 20


@asynccontextmanager
async def received(request: Request, *, max_bytes: int) -> AsyncIterator[Path]:
    """The whole body as a file that only this user may read, for as long as the block lasts."""
    _check_headers(request, max_bytes)
    folder = await run_in_threadpool(tempfile.TemporaryDirectory)
    try:
        path = Path(folder.name) / "body.jsonl"
        await _write(request.stream(), path, max_bytes)
        yield path
    except OSError as error:
        if error.errno in FULL:
            raise StorageFull("The service's temporary folder is full; nothing was kept. Try again later.") from error
        raise
    finally:
        await run_in_threadpool(folder.cleanup)


def _check_headers(request: Request, max_bytes: int) -> None:
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    if request.headers.get("content-encoding", "identity") != "identity":
        raise InvalidRequest("Send the file uncompressed.", code="unsupported_encoding", param="file")
    if request.headers.get("content-type", "").startswith("multipart/"):
        raise InvalidRequest(
            "Send the JSONL itself as the body, not a form: curl --data-binary @rows.jsonl.",
            code="unsupported_media_type",
            param="file",
        )


async def _write(body: AsyncIterator[bytes], path: Path, max_bytes: int) -> None:
    stream = await run_in_threadpool(path.open, "wb")
    try:
        pending, read = bytearray(), 0
        async for chunk in unless_silent(body, IDLE_SECONDS):
            read += len(chunk)
            if read > max_bytes:
                raise _too_large(max_bytes)
            pending += chunk
            if len(pending) >= WRITE_BYTES:
                await run_in_threadpool(stream.write, bytes(pending))
                pending.clear()
        await run_in_threadpool(stream.write, bytes(pending))
    finally:
        await run_in_threadpool(stream.close)


def _too_large(max_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"A provider set may have at most {max_bytes:,} bytes.", code="file_too_large", param="file")
