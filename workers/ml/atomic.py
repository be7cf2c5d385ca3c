"""Folders that appear whole or not at all.

Knows: temporary sibling, fsync, rename.
Refuses to know: what is written.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write `files` (plain names) as `folder`, replacing an older one."""

    def fill(into: Path) -> None:
        for name, content in files.items():
            (into / name).write_bytes(content)

    fill_folder(folder, fill)


def fill_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a temporary sibling, then give it the name `folder`.

    A crash, a full disk or an exception in `fill` leaves the old folder (or none), never a part of the new one.
    A reader sees the old folder, for an instant none, then the new one.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        fill(fresh)
        _sync_tree(fresh)
        _exchange(fresh, folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    _sync(folder.parent)


def _exchange(fresh: Path, folder: Path) -> None:
    fresh.chmod(0o755)
    if not folder.exists():
        fresh.rename(folder)
        return
    # A folder that is not empty cannot be renamed over.
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    folder.rename(old / folder.name)
    try:
        fresh.rename(folder)
    except BaseException:
        (old / folder.name).rename(folder)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
