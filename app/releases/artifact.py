"""The bytes of a released bundle, each block checked just before it is sent.

Knows: ranges, blocks and a deterministic tar. A block that is not what the manifest says ends the stream, so that a
client never holds a byte the gate did not judge.
Refuses to know: HTTP objects and who is asking.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from app.errors import RangeNotSatisfiable, ServiceError
from app.releases.manifest import MANIFEST_NAME
from app.storage import Storage
from app.tables.releases import Release

RANGE = re.compile(r"bytes=(\d*)-(\d*)")
POSITION_DIGITS = 19
TAR_BLOCK = 512
TAR_RECORD = 10_240


class ArtifactCorrupt(ServiceError):
    status = 503
    code = "artifact_corrupt"


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes `start` to `end` of a file, the latter excluded."""

    start: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.start


def parse_range(header: str | None, size: int) -> Span | None:
    """The one range asked for; None for no range, for several (which a server may ignore) or another unit."""
    match = RANGE.fullmatch(header.strip()) if header else None
    if match is None or match.group(0) == "bytes=-":
        return None
    first, last = match.groups()
    if first == "":
        start, end = max(0, size - _position(last, size)), size
    else:
        start, end = _position(first, size), min(size, _position(last, size) + 1 if last else size)
    if start >= end:
        raise RangeNotSatisfiable(f"The file has {size} bytes.", param="Range")
    return Span(start, end)


def _position(digits: str, size: int) -> int:
    """No file is so long that its positions need more digits, and Python refuses to read thousands of them."""
    return int(digits) if len(digits) < POSITION_DIGITS else size


def stream_file(storage: Storage, release: Release, entry: Mapping[str, Any], span: Span) -> Iterator[bytes]:
    """The span's bytes. The first block is read and checked before this returns, so that a fault there is an answer."""
    blocks = _verified_blocks(storage, release, entry, span)
    first = next(blocks, b"")

    def rest() -> Iterator[bytes]:
        yield first
        yield from blocks

    return rest()


def tar_bytes(release: Release) -> int:
    sizes = [entry["bytes"] for entry in release.manifest["files"]] + [len(manifest_bytes(release))]
    content = sum(TAR_BLOCK + _padded(size, TAR_BLOCK) for size in sizes)
    return _padded(content + 2 * TAR_BLOCK, TAR_RECORD)


def stream_tar(storage: Storage, release: Release) -> Iterator[bytes]:
    """The whole bundle and its manifest; the same bytes at every download."""
    sent = 0
    manifest = manifest_bytes(release)
    for entry in release.manifest["files"]:
        yield _tar_header(entry["path"], entry["bytes"])
        yield from _verified_blocks(storage, release, entry, Span(0, entry["bytes"]))
        yield _padding(entry["bytes"])
        sent += TAR_BLOCK + _padded(entry["bytes"], TAR_BLOCK)
    yield _tar_header(MANIFEST_NAME, len(manifest)) + manifest + _padding(len(manifest))
    sent += TAR_BLOCK + _padded(len(manifest), TAR_BLOCK)
    yield bytes(tar_bytes(release) - sent)


def manifest_bytes(release: Release) -> bytes:
    return json.dumps(release.manifest, sort_keys=True, indent=1).encode()


def _verified_blocks(storage: Storage, release: Release, entry: Mapping[str, Any], span: Span) -> Iterator[bytes]:
    block_bytes, size = int(release.manifest["block_bytes"]), int(entry["bytes"])
    key = f"{release.storage_prefix}/{entry['path']}"
    for index in range(span.start // block_bytes, -(-span.end // block_bytes)):
        low, high = index * block_bytes, min((index + 1) * block_bytes, size)
        block = _read(storage, key, low, high)
        if hashlib.sha256(block).hexdigest() != entry["blocks"][index]:
            raise ArtifactCorrupt("The stored bytes are not the ones the gate judged; nothing more is sent.")
        yield block[max(span.start - low, 0) : min(span.end, high) - low]


def _read(storage: Storage, key: str, low: int, high: int) -> bytes:
    try:
        return storage.get_range(key, low, high)
    except Exception as error:
        # A file that is gone or cut short is as unfit as one with other bytes.
        raise ArtifactCorrupt("The stored bytes cannot be read as the manifest describes them.") from error


def _tar_header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o644, 0
    return info.tobuf(format=tarfile.USTAR_FORMAT)


def _padding(size: int) -> bytes:
    return bytes(_padded(size, TAR_BLOCK) - size)


def _padded(size: int, unit: int) -> int:
    return -(-size // unit) * unit
