"""What a child writes: lines cut from a stream, messages read from lines, a log that cannot fill the disk.

Knows: that a child's output is untrusted: any bytes, any length, any amount.
Refuses to know: which child, and what its messages are about.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any

LINE_LIMIT_BYTES = 1 << 20
LOG_HEAD_BYTES = 1 << 20
LOG_TAIL_BYTES = 64 << 10
READ_BYTES = 64 << 10


class LineReader:
    """Cuts a byte stream into lines; a line beyond the cap is dropped whole and counted."""

    def __init__(self, limit_bytes: int = LINE_LIMIT_BYTES) -> None:
        self.oversized = 0
        self._limit = limit_bytes
        self._buffer = bytearray()
        self._dropping = False

    def feed(self, data: bytes) -> list[bytes]:
        lines: list[bytes] = []
        for piece in _split_newlines(data):
            complete = piece.endswith(b"\n")
            if not self._dropping:
                self._buffer += piece
                if len(self._buffer) > self._limit:
                    self._dropping, self.oversized = True, self.oversized + 1
                    self._buffer.clear()
            if complete:
                if not self._dropping and self._buffer.strip():
                    lines.append(bytes(self._buffer).strip())
                self._buffer.clear()
                self._dropping = False
        return lines

    def rest(self) -> list[bytes]:
        """What stood after the last newline when the stream ended."""
        return self.feed(b"\n")


def _split_newlines(data: bytes) -> list[bytes]:
    parts = data.split(b"\n")
    return [part + b"\n" for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])


class BoundedLog:
    """A file that keeps the beginning and the end of a stream of any length."""

    def __init__(self, path: Path, head_bytes: int = LOG_HEAD_BYTES, tail_bytes: int = LOG_TAIL_BYTES) -> None:
        self._file = path.open("wb")
        self._room = head_bytes
        self._tail_bytes = tail_bytes
        self._tail = bytearray()
        self._dropped = 0

    def write(self, data: bytes) -> None:
        head, tail = data[: self._room], data[self._room :]
        if head:
            self._room -= len(head)
            self._file.write(head)
            self._file.flush()
        if tail:
            self._tail += tail
            excess = len(self._tail) - self._tail_bytes
            if excess > 0:
                self._dropped += excess
                del self._tail[:excess]

    def close(self) -> None:
        if self._file.closed:
            return
        if self._dropped:
            self._file.write(f"\n… {self._dropped} bytes left out …\n".encode())
        self._file.write(self._tail)
        self._file.close()


def parse_message(line: bytes) -> dict[str, Any] | None:
    """One JSON object with a `type`, else None: a library that prints must not be able to end a job."""
    try:
        # NaN is no JSON and a NUL no text for PostgreSQL: both would fail far from here, while being stored.
        value = json.loads(line.replace(b"\\u0000", b""), parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and isinstance(value.get("type"), str) else None


def read_available(stream: IO[bytes]) -> bytes | None:
    """Bytes that are there now; None at the end of the stream."""
    try:
        return os.read(stream.fileno(), READ_BYTES) or None
    except BlockingIOError:
        return b""
