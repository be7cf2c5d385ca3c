"""The local object store: whole or not at all, ranges, and a full disk told as such."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.errors import NotFound, StorageFull
from app.settings import Settings
from app.storage import Storage, open_storage


@pytest.fixture
def store(tmp_path: Path) -> Storage:
    return open_storage(Settings(home=tmp_path))


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Files may grow to 1 MiB only; the system answers further writes as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def stray_files(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "objects").rglob("*") if path.is_file()]


def test_what_is_put_comes_back_with_its_digest(store: Storage, tmp_path: Path) -> None:
    content = bytes(range(256)) * 10_000
    stored = store.put_stream("a/b", iter([content[:1000], content[1000:]]))
    assert (stored.bytes, stored.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert store.get_bytes("a/b") == content
    assert store.get_range("a/b", 250, 260) == content[250:260]
    assert store.size("a/b") == len(content)
    copy = store.get_to_path("a/b", tmp_path / "deep" / "copy")
    assert copy == stored
    assert (tmp_path / "deep" / "copy").read_bytes() == content
    source = tmp_path / "source"
    source.write_bytes(content)
    assert store.put_file("c", source).sha256 == stored.sha256
    assert sorted(store.list("")) == ["a/b", "c"]
    assert list(store.list("a")) == ["a/b"]


def test_what_is_not_there_is_said_to_be_missing(store: Storage, tmp_path: Path) -> None:
    for ask in (store.get_bytes, store.size, lambda key: store.get_range(key, 0, 1)):
        with pytest.raises(NotFound):
            ask("no/such")
    assert store.exists("no/such") is False
    store.delete("no/such")


def test_a_put_that_breaks_leaves_nothing(store: Storage, tmp_path: Path) -> None:
    def breaking() -> Iterator[bytes]:
        yield b"x" * (9 << 20)
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="source broke"):
        store.put_stream("half", breaking())

    async def write_half() -> None:
        async with store.writer("half") as writer:
            await writer.write(b"x" * (9 << 20))
            raise RuntimeError("the client went away")

    with pytest.raises(RuntimeError, match="went away"):
        asyncio.run(write_half())
    assert store.exists("half") is False
    assert stray_files(tmp_path) == []


def test_a_put_over_an_object_that_breaks_keeps_the_old_one(store: Storage) -> None:
    store.put_bytes("key", b"old")

    def breaking() -> Iterator[bytes]:
        yield b"new"
        raise RuntimeError("broke")

    with pytest.raises(RuntimeError):
        store.put_stream("key", breaking())
    assert store.get_bytes("key") == b"old"


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """What was forced to the disk, in order, and whether by the thread that the test runs in."""
    seen: list[tuple[str, bool]] = []

    def note(descriptor: int) -> None:
        here = threading.current_thread() is threading.main_thread()
        seen.append((str(Path(f"/proc/self/fd/{descriptor}").readlink()), here))

    monkeypatch.setattr(os, "fsync", note)
    return seen


def test_every_folder_on_the_way_to_an_object_is_forced_to_the_disk(
    store: Storage, tmp_path: Path, synced: list[tuple[str, bool]]
) -> None:
    store.put_bytes("releases/job/1/weights", b"x")
    folders = ["releases/job/1/weights", "releases/job/1", "releases/job", "releases", "."]
    assert [Path(path) for path, _ in synced] == [tmp_path / "objects" / folder for folder in folders]


def test_the_event_loop_does_not_wait_for_the_disk(store: Storage, synced: list[tuple[str, bool]]) -> None:
    async def write() -> None:
        async with store.writer("files/a") as writer:
            await writer.write(b"x")

    asyncio.run(write())
    assert len(synced) == 3
    assert not any(on_the_loop for _, on_the_loop in synced)


def test_an_object_that_cannot_be_forced_to_the_disk_is_not_kept(
    store: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFull):
        store.put_bytes("key", b"x")
    assert stray_files(tmp_path) == []


@pytest.mark.usefixtures("small_disk")
def test_a_full_disk_is_named_and_leaves_nothing(store: Storage, tmp_path: Path) -> None:
    with pytest.raises(StorageFull):
        store.put_stream("big", iter([b"x" * (1 << 20)] * 3))

    async def write_big() -> None:
        async with store.writer("big") as writer:
            for _ in range(12):
                await writer.write(b"x" * (1 << 20))

    with pytest.raises(StorageFull):
        asyncio.run(write_big())
    assert stray_files(tmp_path) == []
    store.put_bytes("small", b"fits")


@pytest.mark.parametrize("key", ["../outside", "a/../../outside", "/etc/passwd/../x"])
def test_a_key_cannot_leave_the_store(store: Storage, tmp_path: Path, key: str) -> None:
    with pytest.raises(Exception, match=r"[Pp]ath"):
        store.put_bytes(key, b"x")
    assert not (tmp_path / "outside").exists()
