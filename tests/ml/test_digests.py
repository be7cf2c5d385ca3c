"""Digests pin bytes: any change of any file changes them, nothing else does."""

import hashlib
import os
from pathlib import Path

import pytest

from workers.ml.digests import digest_file, digest_folder
from workers.ml.errors import IntegrityError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    (made / "inner").mkdir(parents=True)
    (made / "b.txt").write_bytes(b"bee")
    (made / "inner" / "a.txt").write_bytes(b"ay")
    return made


def test_the_digest_is_what_sha256sum_would_say_about_its_own_lines(folder: Path) -> None:
    lines = [f"{hashlib.sha256(b'bee').hexdigest()}  b.txt\n", f"{hashlib.sha256(b'ay').hexdigest()}  inner/a.txt\n"]
    found = digest_folder(folder)
    assert found.digest == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert found.files["inner/a.txt"].bytes == 2
    assert found.bytes == 5


def test_any_byte_any_name_and_any_extra_file_change_the_digest(folder: Path) -> None:
    seen = {digest_folder(folder).digest}
    (folder / "b.txt").write_bytes(b"bef")
    seen.add(digest_folder(folder).digest)
    (folder / "b.txt").rename(folder / "c.txt")
    seen.add(digest_folder(folder).digest)
    (folder / ".hidden").write_bytes(b"")
    seen.add(digest_folder(folder).digest)
    assert len(seen) == 4


def test_times_and_the_place_do_not_change_the_digest(folder: Path) -> None:
    before = digest_folder(folder).digest
    os.utime(folder / "b.txt", (1, 1))
    moved = folder.rename(folder.parent / "elsewhere")
    assert digest_folder(moved).digest == before


def test_a_link_to_a_file_counts_as_the_file_and_a_link_to_a_folder_is_refused(folder: Path) -> None:
    before = digest_folder(folder).digest
    blob = (folder / "b.txt").rename(folder.parent / "blob")
    (folder / "b.txt").symlink_to(blob)
    assert digest_folder(folder).digest == before
    (folder / "up").symlink_to(folder.parent, target_is_directory=True)
    with pytest.raises(IntegrityError, match="link to a folder"):
        digest_folder(folder)


def test_pipes_and_empty_or_missing_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(IntegrityError, match="is empty"):
        digest_folder(tmp_path / "empty")
    with pytest.raises(IntegrityError, match="no folder"):
        digest_folder(tmp_path / "missing")
    os.mkfifo(tmp_path / "empty" / "pipe")
    with pytest.raises(IntegrityError, match="not a plain file"):
        digest_folder(tmp_path / "empty")


def test_a_file_larger_than_a_chunk_is_digested_whole(tmp_path: Path) -> None:
    data = b"x" * (3 << 20) + b"y"
    (tmp_path / "big").write_bytes(data)
    found = digest_file(tmp_path / "big")
    assert (found.sha256, found.bytes) == (hashlib.sha256(data).hexdigest(), len(data))
