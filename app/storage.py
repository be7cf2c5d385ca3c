"""Objects by key: a local folder and an S3 bucket behind the same calls.

Knows: how to write an object whole or not at all, how to read it, and how a full disk shows itself.
Refuses to know: what the keys mean and who may read them.

A key becomes visible only when its last byte is written (obstore writes beside it and renames, or completes the
multipart upload), so a reader never meets half an object.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import re
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, S3Store

from app import telemetry
from app.errors import NotFound, StorageFull
from app.kit.clock import now
from app.settings import Settings

log = telemetry.get_logger(__name__)

PART_BYTES = 8 << 20  # S3 wants parts of at least 5 MiB
READ_BYTES = 1 << 20
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
# What the local store calls an object while it is written; its own listing hides these.
_UNFINISHED = re.compile(r".+#\d+")


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object as it was written: compare with this before trusting what is read back."""

    key: str
    bytes: int
    sha256: str


class ObjectWriter:
    """Counts and digests what passes through; made by `Storage.writer`."""

    def __init__(self, output: obstore.AsyncWritableFile) -> None:
        self._output = output
        self._hasher = hashlib.sha256()
        self.bytes = 0

    async def write(self, chunk: bytes) -> None:
        self._hasher.update(chunk)
        self.bytes += len(chunk)
        with _full_disk_named():
            await self._output.write(chunk)

    @property
    def sha256(self) -> str:
        return self._hasher.hexdigest()


class Storage:
    """One deployment's object store. `folder` is set when it lies on this machine's disk."""

    def __init__(self, store: LocalStore | S3Store, folder: Path | None = None) -> None:
        self._store = store
        self._folder = folder

    def put_file(self, key: str, path: Path) -> StoredObject:
        """Stores a local file's content."""
        with path.open("rb") as stream:
            return self.put_stream(key, iter(lambda: stream.read(READ_BYTES), b""))

    def put_bytes(self, key: str, data: bytes) -> StoredObject:
        return self.put_stream(key, iter([data]))

    def put_stream(self, key: str, chunks: Iterable[bytes]) -> StoredObject:
        """Stores what the iterator yields; nothing remains when it raises."""
        hasher, size = hashlib.sha256(), 0

        def counted() -> Iterator[bytes]:
            nonlocal size
            for chunk in chunks:
                hasher.update(chunk)
                size += len(chunk)
                yield chunk

        with _full_disk_named():
            obstore.put(self._store, key, counted(), use_multipart=True, chunk_size=PART_BYTES)
            self._make_durable(key)
        return StoredObject(key, size, hasher.hexdigest())

    @asynccontextmanager
    async def writer(self, key: str) -> AsyncIterator[ObjectWriter]:
        """An object written piece by piece from an event loop; dropped when the block raises."""
        with _full_disk_named():
            async with obstore.open_writer_async(self._store, key, buffer_size=PART_BYTES) as output:
                yield ObjectWriter(output)
            # Half a gigabyte takes the disk seconds, in which the loop has other requests to serve.
            await asyncio.to_thread(self._make_durable, key)

    def open(self, key: str) -> Iterator[bytes]:
        """The object's content in pieces; raises NotFound before the first."""
        with _missing_named(key):
            result = obstore.get(self._store, key)
        return (bytes(chunk) for chunk in result.stream(min_chunk_size=READ_BYTES))

    def get_bytes(self, key: str) -> bytes:
        return b"".join(self.open(key))

    def get_range(self, key: str, start: int, end: int) -> bytes:
        """Bytes `start` to `end`, the latter excluded; shorter when the object ends before."""
        with _missing_named(key):
            return bytes(obstore.get_range(self._store, key, start=start, end=end))

    def get_to_path(self, key: str, path: Path) -> StoredObject:
        """Copies the object into a local file and says what it held, for comparison with its record."""
        hasher, size = hashlib.sha256(), 0
        path.parent.mkdir(parents=True, exist_ok=True)
        with _full_disk_named(), path.open("wb") as output:
            for chunk in self.open(key):
                hasher.update(chunk)
                size += len(chunk)
                output.write(chunk)
        return StoredObject(key, size, hasher.hexdigest())

    def size(self, key: str) -> int:
        with _missing_named(key):
            return int(obstore.head(self._store, key)["size"])

    def exists(self, key: str) -> bool:
        try:
            obstore.head(self._store, key)
        except FileNotFoundError:
            return False
        return True

    def delete(self, key: str) -> None:
        """Removes the object; one that is not there is fine, so that a deletion can be repeated."""
        try:
            obstore.delete(self._store, key)
        except FileNotFoundError:
            return

    def discard(self, key: str) -> bool:
        """Removes an object that no row needs. False when the store refuses: the log says so, the sweep asks again."""
        try:
            self.delete(key)
        except (BaseError, OSError) as error:
            log.warning("storage.object_left", key=key, error=str(error))
            return False
        return True

    def remove_unfinished(self, *, unchanged_seconds: float) -> int:
        """Removes what a killed process left of objects it was writing; says how many.

        On the local disk only: a bucket keeps the parts of unfinished uploads out of sight and ends them by a rule of
        its own (AbortIncompleteMultipartUpload).
        """
        removed = 0
        for path in self._folder.rglob("*#*") if self._folder is not None else ():
            if _UNFINISHED.fullmatch(path.name) is None:
                continue
            with suppress(FileNotFoundError):  # it was completed or dropped just now
                if path.stat().st_mtime <= now() - unchanged_seconds:
                    path.unlink()
                    removed += 1
        return removed

    def list(self, prefix: str, *, unchanged_seconds: float | None = None) -> Iterator[str]:
        """Keys below a prefix; on request only those whose object was last written so long ago."""
        latest = float("inf") if unchanged_seconds is None else now() - unchanged_seconds
        for batch in obstore.list(self._store, prefix):
            yield from (item["path"] for item in batch if item["last_modified"].timestamp() <= latest)

    def check(self) -> None:
        """Raises when the store cannot be reached."""
        next(iter(obstore.list(self._store, "probe")), None)

    def _make_durable(self, key: str) -> None:
        # A database row is about to say that this object exists; without fsync a power cut could make it lie. Any
        # folder on the way may be new, and is found after a power cut only if the folder above it was synced.
        if self._folder is None:
            return
        path = self._folder / key
        try:
            for entry in (path, *path.parents[: len(path.relative_to(self._folder).parts)]):
                _sync(entry)
        except OSError:
            self.discard(key)
            raise


def open_storage(settings: Settings) -> Storage:
    """The store the settings name: a bucket, or `home`/objects."""
    chosen = settings.storage
    if chosen.bucket is None:
        folder = settings.home / "objects"
        folder.mkdir(parents=True, exist_ok=True)
        return Storage(LocalStore(prefix=folder, mkdir=True), folder)
    secret = chosen.secret_access_key.get_secret_value() if chosen.secret_access_key else None
    store = S3Store(
        chosen.bucket,
        endpoint=chosen.endpoint_url,
        region=chosen.region,
        access_key_id=chosen.access_key_id,
        secret_access_key=secret,
        virtual_hosted_style_request=not chosen.path_style,
        client_options={"allow_http": (chosen.endpoint_url or "").startswith("http://")},
    )
    return Storage(store)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _full_disk_named() -> Iterator[None]:
    try:
        yield
    except (BaseError, OSError) as error:
        if _os_error_number(error) in FULL:
            raise StorageFull(
                "The service's storage is full; nothing was kept of this object. Try again later."
            ) from error
        raise


def _os_error_number(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    # obstore wraps the operating system's error in its own class and keeps the number only in the text.
    match = _OS_ERROR.search(str(error))
    return int(match.group(1)) if match else None


@contextmanager
def _missing_named(key: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound("The object is not in the store.", code="object_missing", param=key) from error
