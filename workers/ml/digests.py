"""Digests of files and folders: the names by which bytes are pinned, checked and released.

Knows: how a folder's content becomes one sha256, independent of order, time stamps and machine.
Refuses to know: what the files mean. Standard library only, so that a gateway may import it.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from workers.ml.errors import IntegrityError

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class FileDigest:
    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class FolderDigest:
    """`files` maps the path inside the folder (with "/") to what the file holds."""

    digest: str
    files: Mapping[str, FileDigest]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())


def digest_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> FileDigest:
    """Streamed, so that a file larger than memory is no problem."""
    hasher, size = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            hasher.update(chunk)
            size += len(chunk)
    return FileDigest(hasher.hexdigest(), size)


def combine(files: Mapping[str, FileDigest]) -> str:
    """sha256 over the lines "sha256, two spaces, path" sorted by path: what `sha256sum` would print."""
    lines = (f"{files[path].sha256}  {path}\n" for path in sorted(files))
    return digest_bytes("".join(lines).encode("utf-8"))


def digest_folder(folder: Path) -> FolderDigest:
    """Digest of every file below `folder`, hidden ones included.

    A link to a file counts as the file (a hub cache is made of such links); a link to a folder, a pipe or a
    device is refused, because walking them could leave the folder or never end.
    """
    if not folder.is_dir():
        raise IntegrityError(f"There is no folder {folder.name!r} to take the digest of.", "path")
    files = {path.relative_to(folder).as_posix(): digest_file(path) for path in _regular_files(folder)}
    if not files:
        raise IntegrityError(f"The folder {folder.name!r} is empty.", "path")
    return FolderDigest(combine(files), files)


def _regular_files(folder: Path) -> Iterable[Path]:
    for root, folders, names in os.walk(folder, followlinks=False):
        for name in sorted(folders):
            if (Path(root) / name).is_symlink():
                raise IntegrityError(f"{name!r} is a link to a folder; the digest covers real folders only.", "path")
        for name in sorted(names):
            path = Path(root) / name
            if "\n" in name or not stat.S_ISREG(path.stat().st_mode):
                raise IntegrityError(f"{name!r} is not a plain file.", "path")
            yield path
