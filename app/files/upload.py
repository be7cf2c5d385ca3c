"""A multipart upload, parsed as it arrives and written once.

Knows: OpenAI's form (`file`, `purpose`, `expires_after[…]`) with its parts in any order, byte limits and how long a
silent client is waited for.
Refuses to know: the database. An upload that ends in an error leaves no object.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.errors import InvalidRequest, PayloadTooLarge, RequestTimeout
from app.files.names import display_name
from app.files.service import PURPOSES, NewFile, new_file_id, storage_key
from app.storage import ObjectWriter, Storage, StoredObject

MAX_FIELD_BYTES = 8 << 10
MAX_PARTS = 16
IDLE_SECONDS = 30.0
# What the form adds around the file's own bytes, with room to spare.
FORM_OVERHEAD_BYTES = 64 << 10
WRITE_BYTES = 256 << 10
FIELDS = frozenset({"purpose", "expires_after[anchor]", "expires_after[seconds]"})
EXPIRY_SECONDS = (3600, 2_592_000)


@dataclass(frozen=True, slots=True)
class Upload:
    """A complete upload: its object is in the store, its row is not written yet."""

    new: NewFile
    stored: StoredObject


@dataclass(frozen=True, slots=True)
class PartBegun:
    name: str
    filename: str | None


@dataclass(frozen=True, slots=True)
class PartEnded:
    pass


FormEvent = PartBegun | PartEnded | bytes


class FormReader:
    """Turns chunks of a multipart body into events. Holds nothing but the chunk at hand."""

    def __init__(self, content_type: str) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise InvalidRequest("Send the file as multipart/form-data.", param="file")
        self.events: deque[FormEvent] = deque()
        self.ended = False
        self._header_name, self._header_value = b"", b""
        self._headers: dict[bytes, bytes] = {}
        with _malformed_named():
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._headers.clear,
                    "on_header_field": self._on_header_field,
                    "on_header_value": self._on_header_value,
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers_finished,
                    "on_part_data": lambda data, start, end: self.events.append(data[start:end]),
                    "on_part_end": lambda: self.events.append(PartEnded()),
                    "on_end": self._on_end,
                },
            )

    def feed(self, chunk: bytes) -> None:
        with _malformed_named():
            self._parser.write(chunk)

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name, self._header_value = b"", b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name, filename = options.get(b"name"), options.get(b"filename")
        self.events.append(
            PartBegun(_text(name or b""), None if filename is None else _text(filename)),
        )

    def _on_end(self) -> None:
        self.ended = True


@contextmanager
def _malformed_named() -> Iterator[None]:
    try:
        yield
    except FormParserError as error:
        raise InvalidRequest("The multipart form is malformed.", code="malformed_form", param="file") from error


class _Receiver:
    """Collects fields and passes the file's bytes on, whichever comes first."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._pending = bytearray()
        self.fields: dict[str, bytearray] = {}
        self.filename: str | None = None
        self._current: bytearray | None = None
        self._parts = 0

    async def take(self, event: FormEvent, writer: ObjectWriter) -> None:
        if isinstance(event, PartBegun):
            self._begin(event)
        elif isinstance(event, bytes):
            await self._data(event, writer)
        else:
            self._current = None

    async def flush(self, writer: ObjectWriter) -> None:
        if self._pending:
            await writer.write(bytes(self._pending))
            self._pending.clear()

    def _begin(self, part: PartBegun) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise InvalidRequest(f"The form has more than {MAX_PARTS} parts.", code="malformed_form")
        if part.name == "file":
            if self.filename is not None:
                raise InvalidRequest("Send one file per request.", param="file")
            self.filename, self._current = part.filename or "", None
            return
        if part.name not in FIELDS:
            raise InvalidRequest(
                "The form has a field this endpoint does not know; it takes file, purpose and expires_after.",
                code="unknown_parameter",
            )
        self._current = self.fields.setdefault(part.name, bytearray())

    async def _data(self, data: bytes, writer: ObjectWriter) -> None:
        if self._current is not None:
            self._current += data
            if len(self._current) > MAX_FIELD_BYTES:
                raise InvalidRequest("A field of the form is too long.", code="malformed_form")
            return
        if writer.bytes + len(self._pending) + len(data) > self._max_bytes:
            raise too_large(self._max_bytes)
        self._pending += data
        if len(self._pending) >= WRITE_BYTES:
            await self.flush(writer)


async def receive(
    body: AsyncIterator[bytes],
    content_type: str,
    storage: Storage,
    *,
    project_id: str,
    max_bytes: int,
    idle_seconds: float = IDLE_SECONDS,
) -> Upload:
    """Reads the form to its end and nothing after it; on any error nothing of it remains in the store."""
    reader, receiver = FormReader(content_type), _Receiver(max_bytes)
    file_id = new_file_id()
    key = storage_key(project_id, file_id)
    async with storage.writer(key) as writer:
        received = 0
        async for chunk in unless_silent(body, idle_seconds):
            received += len(chunk)
            if received > max_bytes + FORM_OVERHEAD_BYTES:
                raise too_large(max_bytes)
            reader.feed(chunk)
            while reader.events:
                await receiver.take(reader.events.popleft(), writer)
            if reader.ended:
                break
        if not reader.ended:
            raise InvalidRequest("The upload ended before the form did.", code="incomplete_upload", param="file")
        await receiver.flush(writer)
        new = _describe(file_id, receiver, writer.bytes)
    return Upload(new, StoredObject(key, writer.bytes, writer.sha256))


async def unless_silent(body: AsyncIterator[bytes], idle_seconds: float) -> AsyncIterator[bytes]:
    """The body's chunks; RequestTimeout when none comes for so long."""
    iterator = body.__aiter__()
    while True:
        try:
            async with asyncio.timeout(idle_seconds):
                chunk = await anext(iterator, None)
        except TimeoutError as error:
            raise RequestTimeout(f"No data came for {idle_seconds:g} seconds.") from error
        if chunk is None:
            return
        yield chunk


def _describe(file_id: str, receiver: _Receiver, size: int) -> NewFile:
    if receiver.filename is None:
        raise InvalidRequest("The form has no file.", code="missing_required_parameter", param="file")
    if size == 0:
        raise InvalidRequest("The file is empty.", code="empty_file", param="file")
    purpose = _field(receiver, "purpose")
    if purpose is None:
        raise InvalidRequest("The form has no purpose.", code="missing_required_parameter", param="purpose")
    if purpose not in PURPOSES:
        offered = ", ".join(repr(name) for name in PURPOSES)
        raise InvalidRequest(f"This service takes files of purpose {offered}.", code="invalid_purpose", param="purpose")
    return NewFile(file_id, display_name(receiver.filename), purpose, _expiry(receiver))


def _expiry(receiver: _Receiver) -> int | None:
    anchor, seconds = _field(receiver, "expires_after[anchor]"), _field(receiver, "expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise InvalidRequest("expires_after[anchor] must be 'created_at'.", param="expires_after[anchor]")
    low, high = EXPIRY_SECONDS
    if seconds is None or not seconds.isdecimal() or len(seconds) > 9 or not low <= int(seconds) <= high:
        message = f"expires_after[seconds] must be a whole number from {low} to {high}."
        raise InvalidRequest(message, param="expires_after[seconds]")
    return int(seconds)


def _field(receiver: _Receiver, name: str) -> str | None:
    value = receiver.fields.get(name)
    return None if value is None else _text(bytes(value))


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", errors="replace")


def too_large(max_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"A file may have at most {max_bytes:,} bytes.", code="file_too_large", param="file")
